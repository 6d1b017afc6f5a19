"""Reading GLUE in the official layout and in the Hub's, and every way in which the data can be wrong."""

import gzip
import sys

import glue_files
import numpy as np
import pytest

from recipes.glue.glue_files import Examples, GlueDataError, read_examples
from recipes.glue.tasks import TASKS

ALL_SPLITS = [(task, split) for task in TASKS.values() for split in task.splits]
each_split = pytest.mark.parametrize(
    ("task", "split"), ALL_SPLITS, ids=[f"{task.name}-{split.name}" for task, split in ALL_SPLITS]
)


def split_named(task, name):
    return next(split for split in task.splits if split.name == name)


def read(name, split, *args, **kwargs):
    return read_examples(TASKS[name], split_named(TASKS[name], split), *args, **kwargs)


def expected_labels(task, count):
    spelled = [glue_files.LABELS[task.title][number % len(glue_files.LABELS[task.title])] for number in range(count)]
    return (
        [float(label) for label in spelled] if task.is_regression else [task.labels.index(label) for label in spelled]
    )


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@each_split
def test_every_official_file(task, split, zipped, tmp_path):
    glue_files.write_all(tmp_path, zipped=zipped)
    examples = read_examples(task, split, tmp_path)
    count = {"train": 6, "validation": 5, "test": 4}[split.kind]
    assert examples.texts == glue_files.texts_of(task.title, count, split.stem)
    if split.kind == "test":
        assert examples.labels is None
        assert examples.indices == [str(number) for number in range(count)]
    else:
        assert examples.labels.tolist() == expected_labels(task, count)
        assert examples.labels.dtype == (np.float64 if task.is_regression else np.int64)
    assert split.stem in examples.origin


def test_test_rows_keep_their_own_numbers(tmp_path):
    glue_files.write_split(tmp_path, "QQP", "test", [(("a", "b"), ""), (("c", "d"), "")], first_index=390963)
    assert read("qqp", "test", tmp_path).indices == ["390963", "390964"]


def test_a_carriage_return_ends_no_text(tmp_path):
    path = tmp_path / "SST-2" / "train.tsv"
    glue_files.write(path, ["sentence\tlabel", "one \r two\t1", "three\t0"], newline="\r\n")
    examples = read("sst2", "train", tmp_path)
    assert examples.texts == [("one \r two",), ("three",)]
    assert examples.labels.tolist() == [1, 0]


def test_qqp_leaves_out_rows_that_lack_columns_and_says_how_many(tmp_path, warning_log):
    path = glue_files.write_split(tmp_path, "QQP", "train", [(("a", "b"), "1"), (("", "d"), "0")])
    with path.open("a") as file:
        file.write("7\tqid\n8\tq\tq\te\tf\t1\n")
    examples = read("qqp", "train", tmp_path)
    assert examples.texts == [("a", "b"), ("", "d"), ("e", "f")]
    assert examples.labels.tolist() == [1, 0, 1]
    assert any("1 of 4 rows lack columns and are left out" in message for message in warning_log.messages)
    # but never of a test set, whose predictions must be complete
    path = glue_files.write_split(tmp_path, "QQP", "test", [(("a", "b"), "")])
    with path.open("a") as file:
        file.write("7\tc\n")
    with pytest.raises(GlueDataError, match=r"test\.tsv, line 3: 2 columns where QQP has 3"):
        read("qqp", "test", tmp_path)


@pytest.mark.parametrize("task", ["mnli", "sst2", "stsb", "rte", "qnli", "qqp", "mrpc", "cola"])
@pytest.mark.parametrize("kind", ["train", "validation", "test"])
def test_a_tab_too_many_is_an_error_in_every_file(tmp_path, task, kind):
    split = TASKS[task].splits_of(kind)[0]
    texts = ("a text", "another text")[: len(TASKS[task].hub_text_columns)]
    label = "" if kind == "test" else "2.5" if task == "stsb" else TASKS[task].labels[0]
    path = glue_files.write_split(tmp_path, TASKS[task].title, split.stem, [(texts, label)] * 3)
    assert len(read(task, split.name, tmp_path)) == 3
    lines = path.read_text().split("\n")
    assert lines[-2].count("a text") == 1
    lines[-2] = lines[-2].replace("a text", "a\ttext")
    path.write_text("\n".join(lines))
    with pytest.raises(GlueDataError, match=rf"line {len(lines) - 1}: \d+ columns where .*take the tabs out"):
        read(task, split.name, tmp_path)


def test_a_column_that_stands_twice_is_refused(tmp_path):
    path = glue_files.write_split(tmp_path, "RTE", "train", [(("a", "b"), "entailment")])
    path.write_text(path.read_text().replace("index", "label"))
    with pytest.raises(GlueDataError, match=r"train\.tsv has the column 'label' more than once"):
        read("rte", "train", tmp_path)


def test_whatever_a_reader_raises_names_the_task(tmp_path, monkeypatch):
    glue_files.write_split(tmp_path, "RTE", "train", [(("a", "b"), "entailment")])

    def broken(*arguments):
        raise OverflowError("inside\na parser")

    monkeypatch.setattr("recipes.glue.glue_files.read_tsv", broken)
    with pytest.raises(
        GlueDataError, match="RTE: the train examples of RTE cannot be read: OverflowError: inside a parser"
    ):
        read_examples(TASKS["rte"], TASKS["rte"].splits[0], tmp_path)


# ------------------------------------------------------------------------------------------- MRPC's original layout


@pytest.fixture
def original_mrpc(tmp_path):
    folder = tmp_path / "MRPC"
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = [f"{number % 2}\t{10 + number}\t{20 + number}\tfirst {number}\tsecond {number}" for number in range(5)]
    glue_files.write(folder / "msr_paraphrase_train.txt", [header, *rows], newline="\r\n")
    glue_files.write(folder / "msr_paraphrase_test.txt", [header, rows[4], rows[0]], newline="\r\n")
    glue_files.write(folder / "dev_ids.tsv", ["11\t21", "13\t23", "12\t20"])
    return tmp_path


def test_mrpc_from_its_original_files(original_mrpc):
    train, dev, test = (read("mrpc", name, original_mrpc) for name in ("train", "validation", "test"))
    assert train.texts == [(f"first {number}", f"second {number}") for number in (0, 2, 4)]
    assert train.labels.tolist() == [0, 0, 0]
    assert dev.texts == [(f"first {number}", f"second {number}") for number in (1, 3)]
    assert dev.labels.tolist() == [1, 1]
    assert test.texts == [("first 4", "second 4"), ("first 0", "second 0")]
    assert (test.labels, test.indices) == (None, ["0", "1"])


def test_mrpc_needs_the_list_of_its_development_set(original_mrpc):
    (original_mrpc / "MRPC" / "dev_ids.tsv").unlink()
    assert len(read("mrpc", "test", original_mrpc)) == 2
    with pytest.raises(GlueDataError, match=r"dev_ids\.tsv is missing, which says which rows"):
        read("mrpc", "validation", original_mrpc)


def test_mrpc_prefers_glue_s_own_files(original_mrpc):
    glue_files.write_split(original_mrpc, "MRPC", "train", [(("a", "b"), "1")])
    assert read("mrpc", "train", original_mrpc).texts == [("a", "b")]


# -------------------------------------------------------------------------------------------------------- bad input


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(
        GlueDataError, match=r"--data_dir .*nowhere is not a folder; name the one that holds RTE/train"
    ):
        read("rte", "train", tmp_path / "nowhere")
    (tmp_path / "CoLA").mkdir()
    with pytest.raises(GlueDataError, match=r"RTE/dev\.tsv is missing, and so is dev\.tsv\.gz.*the folders CoLA"):
        read("rte", "validation", tmp_path)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "rte",
            ["index\tpremise\tsentence2\tlabel", "0\ta\tb\tentailment"],
            "lacks the column 'sentence1'; its first line",
        ),
        ("sst2", ["text\tlabel", "good\t1"], "lacks the column 'sentence'"),
        (
            "cola",
            ["a sentence without columns"],
            r"line 1: 1 columns where CoLA has 4 \(source, label, star, sentence\)",
        ),
        ("cola", ["s\t1\t\tone", "s\t1\t\ttwo\tmore"], "line 2: 5 columns where CoLA has 4"),
        ("cola", ["source\tlabel\tstar\tsentence"], "line 1: the label 'label' is none of CoLA's, which are '0', '1'"),
        ("sst2", ["sentence\tlabel", "good\t1", "bad\t2"], "line 3: the label '2' is none of SST-2's"),
        (
            "rte",
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tneutral"],
            "line 2: the label 'neutral' is none of RTE's",
        ),
        ("rte", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb"], "line 2: 3 columns where RTE has 4"),
        ("sst2", ["sentence\tlabel"], "holds no example"),
    ],
)
def test_bad_files(name, lines, message, tmp_path):
    glue_files.write(tmp_path / TASKS[name].title / "train.tsv", lines)
    with pytest.raises(GlueDataError, match=message):
        read(name, "train", tmp_path)


@pytest.mark.parametrize("score", ["5.1", "-0.5", "nan", "high", ""])
def test_bad_similarity(score, tmp_path):
    glue_files.write_split(tmp_path, "STS-B", "train", [(("a", "b"), "1.0"), (("c", "d"), score)])
    with pytest.raises(
        GlueDataError, match=f"line 3: the score '{score}' is none of STS-B's, which lie between 0 and 5"
    ):
        read("stsb", "train", tmp_path)


def test_damaged_files(tmp_path):
    path = tmp_path / "SST-2" / "train.tsv"
    path.parent.mkdir()
    path.write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(GlueDataError, match=r"train\.tsv, line 2, is not UTF-8"):
        read("sst2", "train", tmp_path)
    path.unlink()
    zipped = gzip.compress(b"sentence\tlabel\n" + b"good\t1\n" * 1000)
    path.with_suffix(".tsv.gz").write_bytes(zipped[: len(zipped) // 2])
    with pytest.raises(GlueDataError, match=r"train\.tsv\.gz cannot be read"):
        read("sst2", "train", tmp_path)
    path.with_suffix(".tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(GlueDataError, match=r"train\.tsv\.gz cannot be read"):
        read("sst2", "train", tmp_path)


# -------------------------------------------------------------------------------------------------------------- Hub


HUB_FORMS = {
    "cola": {"sentence": ["a", "b", "c"]},
    "mnli": {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]},
    "stsb": {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"]},
}


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A function: write one split of a task as Parquet in a folder that `datasets` reads as it does the Hub's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "hub"

    def write(task, split, columns, label_feature=None):
        features = {name: datasets.Value("string") for name in columns if name not in ("label", "idx")}
        if "label" in columns:
            features["label"] = label_feature or (
                datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.label_names))
            )
        if "idx" in columns:
            features["idx"] = datasets.Value("int32")
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        path = folder / task.name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)
        configs = ""
        for child in sorted(child for child in folder.iterdir() if child.is_dir()):
            configs += f"- config_name: {child.name}\n  data_files:\n"
            for file in sorted(child.iterdir()):
                configs += f"  - split: {file.name.split('-')[0]}\n    path: {child.name}/{file.name}\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
        return str(folder)

    yield write
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", HUB_FORMS)
def test_the_hub_s_layout(name, hub_folder):
    task = TASKS[name]
    labels = [4.5, 0.0, 5.0] if task.is_regression else [1, 0, 1]
    split = task.splits_of("validation")[0]
    folder = hub_folder(task, split.name, HUB_FORMS[name] | {"label": labels, "idx": [5, 6, 7]})
    examples = read(name, split.name, dataset_name=folder)
    assert examples.texts == list(zip(*HUB_FORMS[name].values()))
    assert examples.labels.tolist() == labels
    assert examples.labels.dtype == (np.float64 if task.is_regression else np.int64)
    assert examples.indices == ["5", "6", "7"]

    split = task.splits_of("test")[0]
    folder = hub_folder(task, split.name, HUB_FORMS[name] | {"label": [-1, -1, -1], "idx": [0, 1, 2]})
    assert read(name, split.name, dataset_name=folder).labels is None


def test_both_sources_give_the_same_fingerprint(hub_folder, tmp_path):
    glue_files.write_split(tmp_path, "CoLA", "dev", [(("a",), "1"), (("b",), "0"), (("c",), "1")])
    from_files = read("cola", "validation", tmp_path)
    columns = HUB_FORMS["cola"] | {"label": [1, 0, 1], "idx": [0, 1, 2]}
    from_hub = read("cola", "validation", dataset_name=hub_folder(TASKS["cola"], "validation", columns))
    assert from_hub.fingerprint() == from_files.fingerprint()


def test_classes_in_another_order_are_renumbered(hub_folder):
    import datasets

    feature = datasets.ClassLabel(names=["acceptable", "unacceptable"])
    folder = hub_folder(TASKS["cola"], "train", HUB_FORMS["cola"] | {"label": [1, 0, 0]}, feature)
    assert read("cola", "train", dataset_name=folder).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"text": ["a"], "label": [0]}, None, r"there is no column 'sentence'; the columns are 'text', 'label'"),
        ({"sentence": ["a"]}, None, "there is no column 'label'"),
        ({"sentence": ["a", None], "label": [0, 1]}, None, "row 1: the column 'sentence' holds None, not text"),
        ({"sentence": ["a"], "label": [0]}, ["good", "bad"], "the classes are 'good', 'bad', but CoLA has"),
        ({"sentence": ["a", "b"], "label": [0, -1]}, None, "row 1: the label -1 is none of CoLA's"),
    ],
)
def test_bad_datasets(columns, names, message, hub_folder):
    import datasets

    feature = None if names is None else datasets.ClassLabel(names=names)
    folder = hub_folder(TASKS["cola"], "train", columns, feature)
    with pytest.raises(GlueDataError, match=message):
        read("cola", "train", dataset_name=folder)


def test_a_dataset_that_cannot_be_loaded(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(GlueDataError, match=r"nowhere, cola, train cannot be loaded: .*--data_dir"):
        read("cola", "train", dataset_name=str(tmp_path / "nowhere"))


def test_without_the_datasets_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        GlueDataError,
        match=r"needs the `datasets` library, which is not installed: pip install 'hf_specattn\[train\]'",
    ):
        read("cola", "train")
    glue_files.write_all(tmp_path)
    assert len(read("cola", "train", tmp_path)) == 6


def test_why_the_official_files_are_not_read_by_datasets(tmp_path, monkeypatch):
    """It fills a short row up, and takes the first column of rows that are too long for their names: ours names both."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = ["sentence1", "sentence2", "label"]
    files = {"short": ["null\tN/A\tentailment", "a\t1"], "long": ["0\ta\tb\t1"]}
    found = {}
    for name, rows in files.items():
        path = tmp_path / "RTE" / f"{name}.tsv"
        glue_files.write(path, ["\t".join(columns), *rows])
        features = datasets.Features({column: datasets.Value("string") for column in columns})
        settings = {"delimiter": "\t", "quoting": 3, "keep_default_na": False, "lineterminator": "\n"}
        read_rows = datasets.load_dataset("csv", data_files=str(path), split="train", features=features, **settings)
        found[name] = [tuple(row.values()) for row in read_rows]
    assert found["short"] == [("null", "N/A", "entailment"), ("a", "1", "")]
    assert found["long"] == [("a", "b", "1")]  # without a word: of a row with a tab too many, all columns are shifted
    for name in files:
        (tmp_path / "RTE" / f"{name}.tsv").rename(tmp_path / "RTE" / "train.tsv")
        with pytest.raises(GlueDataError, match=r"line \d: \d columns where RTE has 3"):
            read("rte", "train", tmp_path)


# ------------------------------------------------------------------------------------------------ parts, fingerprints


def examples_of(count):
    return Examples(
        [(f"text {number}",) for number in range(count)], np.arange(count) % 2, [str(n) for n in range(count)], "here"
    )


def test_a_subset_is_random_the_same_each_time_and_in_order():
    examples = examples_of(1000)
    part = examples.subset(100)
    rows = [int(index) for index in part.indices]
    assert len(set(rows)) == 100
    assert rows == sorted(rows)
    assert rows == [int(index) for index in examples.subset(100).indices]
    assert part.texts == [examples.texts[row] for row in rows]
    assert part.labels.tolist() == examples.labels[rows].tolist()
    # Uniform over the whole: 100 draws from 0..999 have mean 499.5 and a standard error of 27.
    assert abs(np.mean(rows) - 499.5) < 100
    assert examples.subset(None) is examples
    assert examples.subset(1000) is examples
    assert Examples([("a",), ("b",)], None, ["0", "1"], "here").subset(1).labels is None


def test_the_fingerprint_tells_examples_apart():
    base = examples_of(3)
    changed_label = Examples(base.texts, np.array([0, 1, 1]), base.indices, "here")
    changed_text = Examples([*base.texts[:2], ("other",)], base.labels, base.indices, "here")
    moved = Examples(base.texts, base.labels, ["7", "8", "9"], "there")
    cut = [
        Examples([("a", "bc")], np.array([0]), ["0"], "here").fingerprint(),
        Examples([("ab", "c")], np.array([0]), ["0"], "here").fingerprint(),
    ]
    assert moved.fingerprint() == base.fingerprint() == examples_of(3).fingerprint()
    assert len({base.fingerprint(), changed_label.fingerprint(), changed_text.fingerprint(), *cut}) == 5


# ------------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "counts"), [("cola", (8551, 1043, 1063)), ("rte", (2490, 277, 3000)), ("sst2", (67349, 872, 1821))]
)
def test_the_official_files_are_read_whole(name, counts, shared_data):
    for split, count in zip(TASKS[name].splits, counts):
        examples = read(name, split.name, shared_data / "glue")
        assert len(examples) == count
        assert all(all(text.strip() for text in texts) for texts in examples.texts)
        if split.kind == "test":
            assert examples.indices == [str(number) for number in range(count)]
        else:
            assert set(examples.labels.tolist()) == {0, 1}
