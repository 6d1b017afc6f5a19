import gzip
import json
import pathlib

import pytest

from recipes.text import text_files
from recipes.text.documents import CorpusError
from recipes.text.text_files import EXTENSIONS, file_documents


def texts(path: pathlib.Path, **options: str) -> list[str]:
    return [document.text.strip() for document in file_documents(path, **options)]


def written(path: pathlib.Path, content: bytes | str) -> pathlib.Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_two_blank_lines_and_form_feeds_part_documents(tmp_path):
    content = "a\n\nb\n\n\nc\n \t\n\n\n\nd\n\fe\r\nf\r\n\r\n\r\n\n"
    for name in ("book.txt", "book.txt.gz", "BOOK.TXT"):
        assert texts(written(tmp_path / name, content)) == ["a\n\nb", "c", "d", "e\r\nf"]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_long_documents_in_parts_under_one_name(tmp_path, size):
    path = written(tmp_path / "book.txt", "a\n\nb\n\n\nc\n \t\n\n\n\nd\n\fe\nlonger line\n\n\n\n")
    whole = {document.name: "".join(document.text.split()) for document in file_documents(path)}
    joined: dict[str, str] = {}
    for part in file_documents(path, part_characters=size):
        joined[part.name] = joined.get(part.name, "") + "".join(part.text.split())
    assert joined == whole
    assert list(whole) == [f"book.txt:{index}" for index in range(4)]


def test_a_large_array_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LARGEST_ARRAY_BYTES", 20)
    with pytest.raises(CorpusError, match=r"rows\.json is one JSON array.*jq -c"):
        texts(written(tmp_path / "rows.json", '[{"text": "a"}, {"text": "b"}]'))


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    assert texts(written(tmp_path / "rows.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')) == ["a\ufffdb \U0001f600"]


def test_names_are_the_file_and_the_index_also_beside_empty_documents(tmp_path):
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": null}\n\n{"text": " "}\n{"text": "b"}\n')
    assert [(document.name, document.text) for document in file_documents(path)] == [
        ("rows.jsonl:0", "a"),
        ("rows.jsonl:3", "b"),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_json_lines(tmp_path, name):
    rows = [{"body": "Ünï\ncode", "id": 1}, {"body": "two"}]
    path = written(tmp_path / name, "\n".join(map(json.dumps, rows)))
    assert texts(path, text_column="body") == ["Ünï\ncode", "two"]


def test_json_array_over_many_lines(tmp_path):
    path = written(tmp_path / "rows.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert texts(path) == ["a", "b"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert texts(path, text_column="body") == ["one", "two"]
    with pytest.raises(CorpusError, match=r"no column 'text'; the columns are 'body', 'n'.*--text_column"):
        texts(path)
    with pytest.raises(CorpusError, match=r"'n' holds int64, not text"):
        texts(path, text_column="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="not an intact Parquet file"):
        texts(path, text_column="body")


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert texts(written(tmp_path / "a.txt", b"\xef\xbb\xbfword\n")) == ["word"]


def test_missing_file_folder_and_unknown_kind(tmp_path):
    with pytest.raises(CorpusError, match=r"gone\.txt does not exist"):
        texts(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CorpusError, match="is a folder, not a file"):
        texts(tmp_path / "folder.txt")
    with pytest.raises(CorpusError, match=r"corpus\.csv: unknown kind") as error:
        texts(written(tmp_path / "corpus.csv", "text\na\n"))
    assert all(extension in str(error.value) for extension in EXTENSIONS)


@pytest.mark.parametrize("content", [b"", b"\n \n\n\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_empty_files(tmp_path, name, content):
    with pytest.raises(CorpusError, match=r"is empty \(0 bytes\)|holds no text"):
        texts(written(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "where"), [("a.txt", "offset 7 cannot"), ("a.txt.gz", "offset 7 of the decompressed")]
)
def test_undecodable_bytes_are_located(tmp_path, name, where):
    with pytest.raises(CorpusError, match=rf"{name} is not UTF-8: byte 0xe9 at byte {where}.*iconv"):
        texts(written(tmp_path / name, b"good\nba\xe9d\n"))


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(bytes(range(65, 91)) * 1000 + b"\n")
    for number, content in enumerate([whole[:-12], b"no gzip at all", whole[:30] + b"\xff\xff\xff" + whole[33:]]):
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"{number}\.txt\.gz is not an intact gzip file"):
            texts(path)


def test_bad_json_is_located_by_line(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": \n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 3.*not valid JSON"):
        texts(path)
    path = written(tmp_path / "b.json", '\n[{"text": "a"},\n{"text" "b"}]')
    with pytest.raises(CorpusError, match=r"b\.json, line 3, column 9: not valid JSON"):
        texts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"body": "a", "id": 1}', r"line 1: there is no column 'text'; the columns are 'body', 'id'"),
        ('{"text": 5}', r"line 1: the key 'text' holds int 5, not text"),
        ('["text"]', r"line 1: expected a JSON object with the key 'text'"),
    ],
)
def test_rows_without_text(tmp_path, row, message):
    with pytest.raises(CorpusError, match=message):
        texts(written(tmp_path / "a.jsonl", row + "\n"))


def test_books_split_into_chapters(shared_data):
    documents = list(file_documents(shared_data / "books-pd" / "val.txt.gz"))
    assert len(documents) > 10
    assert all(document.text.strip() for document in documents)
