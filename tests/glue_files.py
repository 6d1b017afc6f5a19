"""Small copies of GLUE's official files, each in its own layout, for the tests of reading and of the script."""

import gzip
import pathlib

HEADERS = {
    "MNLI": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "SST-2": "sentence label",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "RTE": "index sentence1 sentence2 label",
    "QNLI": "index question sentence label",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "MRPC": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "CoLA": "source label star sentence",
}
TEST_HEADERS = {
    "MNLI": HEADERS["MNLI"].removesuffix(" label1 gold_label"),
    "SST-2": "index sentence",
    "STS-B": HEADERS["STS-B"].removesuffix(" score"),
    "RTE": "index sentence1 sentence2",
    "QNLI": "index question sentence",
    "QQP": "id question1 question2",
    "MRPC": "index,#1 ID,#2 ID,#1 String,#2 String",
    "CoLA": "index sentence",
}
LABELS = {
    "MNLI": ["contradiction", "entailment", "neutral"],
    "SST-2": ["1", "0"],
    "STS-B": ["5.000", "0.250", "3.8"],
    "RTE": ["not_entailment", "entailment"],
    "QNLI": ["entailment", "not_entailment"],
    "QQP": ["0", "1"],
    "MRPC": ["1", "0"],
    "CoLA": ["1", "0"],
}
LABEL_COLUMNS = ("gold_label", "label", "score", "is_duplicate", "Quality")
FIRST_TEXTS = ("sentence", "sentence1", "question", "question1", "#1 String")
# A quote opens and does not close, and there are separators of lines that end no line of the file.
ODD = "He said \"yes\x85 \u2028 and 5' more"


def columns_of(title: str, test: bool) -> list[str]:
    header = (TEST_HEADERS if test else HEADERS)[title]
    return header.split("," if "," in header else " ")


def row(title: str, test: bool, number: int, texts: tuple[str, ...], label: str) -> str:
    fields, remaining = [], list(texts)
    for column in columns_of(title, test):
        # QNLI's second text stands in the column that is the first one elsewhere.
        if column in FIRST_TEXTS or column in ("sentence2", "question2", "#2 String"):
            fields.append(remaining.pop(0))
        elif column in LABEL_COLUMNS:
            fields.append(label)
        elif column in ("index", "id"):
            fields.append(str(number))
        else:
            fields.append(f"{column}{number}")
    return "\t".join(fields)


def write(path: pathlib.Path, lines: list[str], newline: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (newline.join(lines) + newline).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_split(
    folder: pathlib.Path,
    title: str,
    stem: str,
    examples: list[tuple[tuple[str, ...], str]],
    *,
    zipped: bool = False,
    first_index: int = 0,
) -> pathlib.Path:
    """Write one official file; MRPC's with a byte-order mark, CoLA's without a header."""
    test = stem.startswith("test")
    lines = [row(title, test, first_index + number, *example) for number, example in enumerate(examples)]
    if test or title != "CoLA":
        lines.insert(0, "\t".join(columns_of(title, test)))
    if title == "MRPC" and not test:
        lines[0] = "\ufeff" + lines[0]
    path = folder / title / f"{stem}.tsv{'.gz' if zipped else ''}"
    write(path, lines)
    return path


def texts_of(title: str, count: int, name: str) -> list[tuple[str, ...]]:
    single = title in ("SST-2", "CoLA")
    texts = [(f"{name} sentence {number} of {title} .", f"its second {number}") for number in range(count)]
    texts[0] = (ODD, texts[0][1])
    return [pair[:1] if single else pair for pair in texts]


def stems_of(title: str) -> list[str]:
    if title == "MNLI":
        return ["train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"]
    return ["train", "dev", "test"]


def write_all(folder: pathlib.Path, *, zipped: bool = False, counts: tuple[int, int, int] = (6, 5, 4)) -> None:
    """Write all eight tasks with so many training, development and test examples; labels alternate."""
    for title, labels in LABELS.items():
        for stem in stems_of(title):
            count = counts[("train", "dev", "test").index(stem.split("_")[0])]
            examples = [
                (texts, labels[number % len(labels)]) for number, texts in enumerate(texts_of(title, count, stem))
            ]
            write_split(folder, title, stem, examples, zipped=zipped)
