"""What a real file of text can hold that a parser fails on, or reads as something else."""

import gzip
import json
import subprocess
import sys

import pytest

from recipes.text import text_files
from recipes.text.corpora import corpus_streams
from recipes.text.documents import CorpusError
from recipes.text.hub_datasets import hub_stream
from recipes.text.mlm_data import MlmDataSettings
from recipes.text.streams import file_stream
from recipes.text.text_files import file_documents, parts_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def texts(path, **options):
    return [document.text for document in file_documents(path, **options)]


def refused(path, message, **options):
    with pytest.raises(CorpusError, match=message) as caught:
        texts(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_json_that_json_allows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": ' + "9" * 5000 + ', "text": "a"}\n{"text": "b", "x": NaN, "x": 1}\n')
    assert texts(path) == ["a", "b"]
    path.write_text('{"text": "a"}\n{"text": "b", "x": ' + "[" * 50000 + "]" * 50000 + "}\n")
    refused(path, "line 2: its JSON is nested too deeply")
    path.write_text('{"text": "a", "id": 1}\n{"text": "a", "text": "b"}\n')
    refused(path, r"line 2: the key 'text' occurs twice")
    path.write_text('{"text": ' + "9" * 5000 + "}\n")
    refused(path, r"line 1: the key 'text' holds float inf, not text")
    for constant in ("Infinity", "true", "[]", '{"text": "in"}'):
        path.write_text(f'{{"text": {constant}}}\n')
        refused(path, "line 1: the key 'text' holds")


def test_columns_of_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]), path
    )
    refused(path, r"has 2 columns 'text'")
    nested = pyarrow.table({"a": pyarrow.array([{"text": "in"}]), "a.text": pyarrow.array(["out"])})
    parquet.write_table(nested, path)
    assert texts(path, text_column="a.text") == ["out"]
    refused(path, r"there is no column 'text'; the columns are 'a', 'a\.text'")
    refused(path, r"'a' holds struct<text: string>, not text", text_column="a")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_every_arrow_type_of_text(tmp_path, kind):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", None, "b"]).cast(kind)}), path)
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("kind", [pyarrow.null(), pyarrow.binary(), pyarrow.list_(pyarrow.string())], ids=str)
def test_other_arrow_types_are_refused(tmp_path, kind):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([None], kind)}), path)
    refused(path, "the column 'text' holds .*, not text")


def test_damaged_bytes_in_a_column(tmp_path):
    path = tmp_path / "rows.parquet"
    broken = pyarrow.array([b"good", b"b\xe9d"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), path)
    refused(path, "not an intact Parquet file")


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("two words".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("two words".encode("utf-16-be"), "NUL characters.*UTF-16"),
        (b"\xfe\xff" + "two".encode("utf-16-be"), "iconv -f UTF-16 -t"),
        ("two words".encode("utf-32"), "iconv -f UTF-32 -t"),
        (gzip.compress(b"text"), r"gzipped: give its name the ending \.gz"),
        (b"PK\x03\x04rest", "ZIP archive: unpack"),
        (b"%PDF-1.7\n", "is a PDF: extract its text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS: fetch that"),
        ("caf\u00e9 \u201cquoted\u201d".encode("cp1252"), r"file -i corpus\.txt.*iconv -f ENCODING"),
    ],
    ids=["utf-16", "utf-16 without a mark", "utf-16-be", "utf-32", "gzip", "zip", "pdf", "git lfs", "cp1252"],
)
def test_what_is_no_utf8_is_named(tmp_path, content, advice):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    refused(path, advice)
    zipped = tmp_path / "corpus.txt.gz"
    zipped.write_bytes(gzip.compress(content))
    refused(zipped, advice.replace(r"corpus\.txt", r"corpus\.txt\.gz"))


def test_a_truncated_character_at_the_end(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes("good é".encode()[:-1])
    refused(path, "byte 0xc3 at byte offset 5 cannot")


@pytest.mark.parametrize("size", [7, 16, 64, 1000])
def test_long_lines_are_read_in_pieces(tmp_path, monkeypatch, size):
    content = "äöü one\n\nlong " + "wörter und mehr " * 12 + "\n\n\n" + "ß" * 90 + "\n\fnext\ttwo"
    path = tmp_path / "corpus.txt"
    path.write_text(content, encoding="utf-8")
    whole = texts(path)
    assert [text.strip() for text in whole] == [
        part.strip() for part in content.replace("\f", "\n\n\n").split("\n\n\n")
    ]
    monkeypatch.setattr(text_files, "LINE_BYTES", size)
    assert texts(path) == whole
    joined = {}
    for part in file_documents(path, part_characters=20):
        joined[part.name] = joined.get(part.name, "") + part.text
        assert len(part.text) <= 20 + max(size, 20)
    assert [text.split() for text in joined.values()] == [text.split() for text in whole]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in whole))
    assert texts(rows) == whole


def test_lines_of_json_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LARGEST_ARRAY_BYTES", 100)
    monkeypatch.setattr(text_files, "LINE_BYTES", 30)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 100 + '"}\n')
    refused(path, r"line 2 is longer than 0 MiB.*Divide")
    array = tmp_path / "rows.json.gz"
    array.write_bytes(gzip.compress(b'[{"text": "' + b"b" * 200 + b'"}]'))
    refused(array, r"is one JSON array.*jq -c")


def test_lines_that_end_in_carriage_returns_alone(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"one\rtwo\r\r\rthree\r")
    assert texts(path) == ["one\rtwo\r\r\r", "three\r"]
    path.write_bytes(b"one\rtwo\n\n\nthree\r\r\rfour\n")
    assert [text.strip() for text in texts(path)] == ["one\rtwo", "three\r\r\rfour"]


def test_parts_join_to_the_text():
    text = "word " * 30 + "\n" + "x" * 40 + " end"
    for size in (1, 7, 20, 1000):
        parts = list(parts_of(text, size))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= size
    assert list(parts_of("one two\nthree four", 12)) == ["one two\n", "three four"]
    assert list(parts_of("one two three", 9)) == ["one two ", "three"]


def test_files_that_cannot_be_opened(tmp_path):
    link = tmp_path / "gone.txt"
    link.symlink_to(tmp_path / "nowhere.txt")
    refused(link, "is a broken link")
    with pytest.raises(CorpusError, match="is a broken link"):
        file_stream([link])


def test_whatever_a_reader_raises_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')

    def broken(*args, **kwargs):
        raise KeyError("inside\na parser")

    monkeypatch.setattr(text_files.json, "loads", broken)
    refused(path, r"cannot be read: KeyError: .*Check its permissions")


def test_the_same_file_twice_is_said(tmp_path, warning_log):
    path, link = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("one\n\n\ntwo\n")
    link.symlink_to(path)
    documents = list(file_stream([path, link]).documents())
    assert len(documents) == 4
    assert "is named more than once" in warning_log.messages[-1]
    corpus_streams(MlmDataSettings(train_file=[str(path)], validation_file=[str(link)]))
    assert "Validation uses text that is also trained on" in warning_log.messages[-1]


def test_a_folder_of_the_hub_says_what_it_leaves_out(tmp_path, warning_log):
    pytest.importorskip("datasets")
    (tmp_path / "train").mkdir()
    for name, content in (("a.jsonl", '{"text": "a"}\n'), ("b.jsonl", '{"text": "b"}\n'), ("c.txt", "plain\n")):
        (tmp_path / "train" / name).write_text(content)
    (tmp_path / "README.md").write_text("# text")
    stream = hub_stream(str(tmp_path))
    assert sorted(document.text for document in stream.documents()) == ["a", "b"]
    assert any("leaves out 1 (1 .txt; the first is" in message for message in warning_log.messages)
    (tmp_path / "train" / "a.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n{"text"\n')
    with pytest.raises(CorpusError, match="cannot be loaded") as caught:
        list(hub_stream(str(tmp_path)).documents())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux does")
@pytest.mark.parametrize(("name", "spaces"), [("line.txt", True), ("line.txt", False), ("line.jsonl", False)])
def test_a_line_of_25_mb_needs_little_memory(tmp_path, name, spaces):
    path = tmp_path / name
    word = "word" * 5
    line = (word + " ") * (25_000_000 // 21) if spaces else word * (25_000_000 // 20)
    path.write_text(json.dumps({"text": line}) if name.endswith("jsonl") else line)
    code = f"""
import resource, sys
from recipes.text.streams import file_stream
from recipes.text.token_cache import prepare_tokens
from recipes.text.tokenization import prepare_tokenizer
stream = file_stream([{str(path)!r}])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenizer = prepare_tokenizer(stream, 100, cache_dir={str(tmp_path / "cache")!r})
tokens = prepare_tokens(stream, tokenizer, 16, cache_dir={str(tmp_path / "cache")!r})
assert len(tokens) > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {
        "PYTHONPATH": "scripts",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": "/usr/bin",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout.split()[-1]) < 400 * 1024  # KiB
