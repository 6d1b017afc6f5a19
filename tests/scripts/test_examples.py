"""The examples of the documentation are run as they stand there, with other sizes alone."""

import ast
import json
import pkgutil
import random
import re

import pytest
from accelerate.state import AcceleratorState, GradientState
from scripts_loading import REPOSITORY, load_script

from recipes.run import run_metrics as metrics


def python_block(page: str, heading: str) -> str:
    """The first Python block below a heading of a page of docs/."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    _, found, section = text.partition(f"\n{heading}\n")
    assert found, f"docs/{page} has no heading {heading!r}"
    return section.split("```python\n", 1)[1].split("```", 1)[0]


def with_values(source: str, **values: object) -> str:
    """The source with other values for variables that it assigns at the top; each must be there."""
    for name, value in values.items():
        source, count = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", source)
        assert count == 1, f"the example does not assign {name} once"
    return source


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = ["the", "model", "reads", "some", "words", "and", "predicts", "those", "that", "a", "mask", "hides", "it"]
    choose = random.Random(0)
    documents = [" ".join(choose.choices(words, k=choose.randint(20, 60))) for _ in range(120)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n\n".join(documents))
    return str(path)


@pytest.mark.parametrize("page", sorted(path.name for path in (REPOSITORY / "docs").glob("*.md")))
def test_every_python_block_is_python(page):
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(block)


# What a checkout holds; the changelog tells of what is gone.
PAGES = [page for page in sorted(REPOSITORY.glob("*.md")) if page.name != "CHANGELOG.md"]
PAGES += [
    page for folder in ("docs", "model_cards", "benchmarks") for page in sorted((REPOSITORY / folder).rglob("*.md"))
]
PATH = re.compile(r"(?<![\w/.-])((?:tests|scripts|hf_specattn|benchmarks|docs|model_cards)/[\w/.-]*\w)")
NAME = re.compile(r"\b((?:hf_specattn|recipes)(?:\.[A-Za-z_]\w*)+)")
LINK = re.compile(r"\]\((?!https?:|#|\{)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_file_and_name_that_a_page_mentions_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert [path for path in PATH.findall(text) if not (REPOSITORY / path).exists()] == []
    assert [path for path in LINK.findall(text) if not (page.parent / path).exists()] == []
    for name in set(NAME.findall(text)):
        pkgutil.resolve_name(name)


def test_data_prepared_beforehand_is_what_the_run_finds(corpus, tmp_path, capsys):
    source = python_block("pretraining.md", "## Data of any size")
    source = with_values(source, TRAIN_FILES=[corpus], CACHE_DIR=str(tmp_path / "prepared"), VOCABULARY=100, BATCH=2)
    exec(compile(source, "example", "exec"), {})
    assert re.search(r"[\d,]+ tokens to train on, [\d,]+ held out", capsys.readouterr().out)
    before = sorted((tmp_path / "prepared").rglob("*"))

    script = load_script(REPOSITORY / "scripts" / "pretrain_mlm.py")
    sizes = [
        "--hidden_size",
        "16",
        "--num_hidden_layers",
        "1",
        "--num_attention_heads",
        "2",
        "--intermediate_size",
        "32",
    ]
    run = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run")]
    data = ["--train_file", corpus, "--vocab_size", "100", "--cache_dir", str(tmp_path / "prepared")]
    script.main([*sizes, *run, *data])
    assert [path for path in sorted((tmp_path / "prepared").rglob("*")) if path.suffix != ".lock"] == [
        path for path in before if path.suffix != ".lock"
    ]


@pytest.mark.slow
def test_the_trainer_reads_and_learns_what_the_script_does(corpus, tmp_path, capsys):
    sizes = {"VOCABULARY": 100, "LENGTH": 16, "LAYERS": 2, "HIDDEN": 16, "HEADS": 2, "FEED_FORWARD": 32}
    run = {"STEPS": 20, "BATCH": 4, "ACCUMULATION": 2, "LEARNING_RATE": 1e-2, "REFRESH_EVERY": 3}
    writing = {"OUTPUT_DIR": str(tmp_path / "trainer"), "LOGGING_STEPS": 1, "SAVE_STEPS": 20, "BF16": False}
    source = python_block("pretraining.md", "## The same run with the Trainer")
    namespace: dict[str, object] = {}
    source = with_values(source, TRAIN_FILES=[corpus], **sizes, **run, **writing)
    exec(compile(source, "example", "exec"), namespace)
    printed = re.search(r"validation loss ([\d.]+) nats", capsys.readouterr().out)
    assert printed is not None
    state = namespace["trainer"].state  # type: ignore[attr-defined]
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = load_script(REPOSITORY / "scripts" / "pretrain_mlm.py")
    flags = {
        "train_file": corpus,
        "vocab_size": 100,
        "max_seq_length": 16,
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "spectral_method": "svd",
        "spectral_refresh_every": 3,
        "logging_steps": 1,
        "output_dir": tmp_path / "script",
    }
    script.main(
        ["--spectral_conditioning", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    )
    recorded = json.loads((tmp_path / "script" / metrics.METRICS_FILE).read_text())
    expected = [entry["train_loss"] for entry in recorded["history"]]
    assert len(expected) == 20
    assert losses == pytest.approx(expected, rel=1e-4)  # the Trainer's logs are rounded
    assert losses[-1] < losses[0] - 0.5
    assert float(printed[1]) == pytest.approx(recorded["final"]["validation_loss"], rel=1e-5)
