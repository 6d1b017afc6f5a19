"""Training needs neither `datasets` nor `evaluate` where no reader or metric is called that is theirs.

The processes here find them blocked, which looks to `importlib.util.find_spec`, and so to transformers and accelerate, as if
they were not installed; and so are pyarrow and pandas, which `datasets` brings.
"""

import json
import os
import random
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState, GradientState
from scripts_loading import REPOSITORY, load_script

BLOCKED = ("datasets", "evaluate", "pandas", "pyarrow")
SIZES = ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--intermediate_size", "32"]
STEPS = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
SVD = ["--spectral_conditioning", "--spectral_method", "svd"]


@pytest.fixture
def without_them(tmp_path):
    """A function: run Python with these arguments where they are blocked; returns the ended process."""
    blocker = tmp_path / "blocker" / "sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n")
    paths = os.pathsep.join(filter(None, (str(blocker.parent), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def fresh_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    words = ["the", "model", "reads", "some", "words", "and", "predicts", "those", "that", "a", "mask", "hides", "it"]
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=choose.randint(5, 60))) for _ in range(80)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def losses(folder) -> list[float]:
    return [record["train_loss"] for record in json.loads((folder / "metrics.json").read_text())["history"]]


def test_the_block_is_in_force(without_them):
    done = without_them(
        "-c", f"import importlib.util\nprint([*map(importlib.util.find_spec, {BLOCKED})])\nimport pyarrow"
    )
    assert done.stdout == "[None, None, None, None]\n"
    assert "ModuleNotFoundError: import of pyarrow halted" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("spectral", [[], SVD], ids=["stock", "svd"])
def test_a_prepared_cache_is_all_that_pretraining_needs(
    without_them, corpus, spectral, tmp_path, fresh_accelerator_state
):
    script = REPOSITORY / "scripts" / "pretrain_mlm.py"
    command = ["--train_file", str(corpus), "--cache_dir", str(tmp_path / "cache"), "--vocab_size", "100"]
    command += ["--max_seq_length", "16", *SIZES, *STEPS, *spectral]
    load_script(script).main([*command, "--output_dir", str(tmp_path / "prepared")])
    # The corpus is Parquet, which could not be read again.
    trained = without_them(script, *command, "--output_dir", tmp_path / "blocked")
    assert trained.returncode == 0, trained.stderr
    assert len(losses(tmp_path / "blocked")) == 3
    assert losses(tmp_path / "blocked") == losses(tmp_path / "prepared")


@pytest.mark.slow
def test_the_digits_are_classified_without_them(without_them, tmp_path):
    script = REPOSITORY / "scripts" / "train_image_classification.py"
    trained = without_them(script, *SIZES, *STEPS, "--patch_size", "4", *SVD, "--output_dir", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert len(losses(tmp_path / "run")) == 3


TRAINER = """
import sys, torch, hf_specattn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

torch.manual_seed(0)
config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(config)
hf_specattn.condition(model, hf_specattn.SpectralConfig("svd", refresh_every=1))
before = model.bert.encoder.layer[0].attention.self.query.weight.clone()
rows = [{"input_ids": torch.arange(1, 9), "labels": torch.tensor(1)}] * 4
arguments = TrainingArguments(sys.argv[1], max_steps=1, report_to="none", use_cpu=True)
Trainer(model, arguments, train_dataset=rows, callbacks=[hf_specattn.SpectralCallback()]).train()
assert not torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, before)
"""


@pytest.mark.slow
def test_the_trainer_does_a_step_without_them(without_them, tmp_path):
    done = without_them("-c", TRAINER, tmp_path)
    assert done.returncode == 0, done.stderr


HELP = f"""
import contextlib, io, json, sys
sys.path.insert(0, "scripts")
import eval_glue, pretrain_mlm, train_image_classification
for script in (eval_glue, pretrain_mlm, train_image_classification):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main(["--help"])
    assert "--output_dir" in printed.getvalue()
print(json.dumps(sorted({set(BLOCKED)} & sys.modules.keys())))
"""


@pytest.mark.slow
def test_training_scripts_start_without_importing_them():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
