import gzip
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from reference import pack_documents, sequences_fingerprint
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.run.batching import BatchOrder
from recipes.text import prepared_folders, streams, token_cache, tokenization
from recipes.text.cleaning import NO_CLEANING, PUBLISHED_CLEANING, Cleaning, normalize_text
from recipes.text.documents import CorpusError, Document
from recipes.text.streams import CorpusStream, file_stream, split_stream
from recipes.text.text_files import file_documents
from recipes.text.token_cache import TokenCache, prepare_tokens
from recipes.text.tokenization import prepare_tokenizer, train_wordpiece

TEXTS = [
    f"Word{index} and Café.\nSome more. " + "lines, " * (index % 7) + "end.\n" * (index % 5) for index in range(60)
]
DOCUMENTS = [Document(f"d:{index}", text) for index, text in enumerate(TEXTS)]

# Forked, because importing everything anew takes longer than the tests.
FORK = multiprocessing.get_context("fork")


def prepare_slowly(cache_dir, tokenizer, seconds_per_document, results):
    """In a process of its own: prepare a corpus and put down that it was read, what came of it, and the warnings."""

    def documents():
        results.put("read")
        for index in range(100):
            time.sleep(seconds_per_document)
            yield Document(f"d:{index}", f"word{index} and some more. " * 200)

    warnings = []
    prepared_folders.logger.warning = warnings.append
    cache = prepare_tokens(CorpusStream(documents, {"slow": 1}, "slow corpus"), tokenizer, 16, cache_dir=cache_dir)
    results.put((cache.fingerprint, len(cache), cache.tokens.tobytes(), warnings))


def prepare_much(path, cache_dir, results):
    """In a process of its own: train a tokenizer, prepare a large file and put down by how many MB the peak grew."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    train, _ = split_stream(file_stream([path]), 0.01)
    options = {"cache_dir": cache_dir, "cleaning": PUBLISHED_CLEANING}
    tokenizer = prepare_tokenizer(train, 2000, sample_characters=1_000_000, **options)
    cache = prepare_tokens(train, tokenizer, 128, **options)
    results.put((peak() - before, cache.size))


def started(work, *arguments):
    results = FORK.Queue()
    process = FORK.Process(target=work, args=(*arguments, results), daemon=True)
    process.start()
    return process, results


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(DOCUMENTS, 150)


@pytest.fixture
def encoded(monkeypatch):
    """The number of texts that were tokenized."""
    count = [0]
    original = token_cache._Packer._encoded

    def counted(self):
        for pair in original(self):
            count[0] += 1
            yield pair

    monkeypatch.setattr(token_cache._Packer, "_encoded", counted)
    return count


def memory_stream(documents=DOCUMENTS, **ingredients):
    characters = sum(len(document.text) for document in documents)
    return CorpusStream(lambda: iter(documents), {"memory": len(documents), **ingredients}, "memory", characters)


def corpus_file(path, texts=TEXTS):
    path.write_text("\n\n\n".join(texts))
    return path


# ------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("length", [8, 7, 50])
@pytest.mark.parametrize("piece", [10, 20_000])
def test_tokens_are_those_of_pack_documents(tokenizer, tmp_path, monkeypatch, length, piece):
    expected = pack_documents(DOCUMENTS, tokenizer, length)
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(token_cache, "PIECES_PER_CALL", 3)
    cache = prepare_tokens(memory_stream(), tokenizer, length, cache_dir=tmp_path)
    assert cache.shape == cache.tokens.shape == expected.shape
    assert cache.tokens.dtype == expected.dtype
    assert np.array_equal(cache.tokens, expected)
    assert not cache.tokens.flags.writeable


def test_documents_in_parts_are_one_document(tokenizer, tmp_path):
    parts = [
        Document(document.name, line) for document in DOCUMENTS for line in document.text.splitlines(keepends=True)
    ]
    cache = prepare_tokens(memory_stream(parts), tokenizer, 8, cache_dir=tmp_path)
    assert np.array_equal(cache.tokens, pack_documents(DOCUMENTS, tokenizer, 8))
    assert cache.manifest["documents"] == len(DOCUMENTS)


def test_a_tokenizer_with_spaces_in_its_tokens_sees_whole_documents(tmp_path, monkeypatch):
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["[UNK]", "[SEP]"]
    backend.train_from_iterator(
        [*TEXTS, "\n  x\n  y"], trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")
    lines = [f"word{index}\n\n\n    some {index}\n" for index in range(20)]
    ids = [*tokenizer("".join(lines), add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 10)
    whole = [Document("d", "".join(lines))]
    assert pack_documents(whole, tokenizer, 1).flatten().tolist() == ids
    for documents in (whole, [Document("d", line) for line in lines]):
        cache = prepare_tokens(memory_stream(documents), tokenizer, 1, cache_dir=tmp_path)
        assert np.array(cache.tokens).flatten().tolist() == ids


def test_a_long_document_of_a_file_is_one_document(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    monkeypatch.setattr(streams, "PART_CHARACTERS", 50)
    cache = prepare_tokens(file_stream([path]), tokenizer, 8, cache_dir=tmp_path / "cache")
    assert cache.manifest["documents"] == 1
    assert np.array_equal(cache.tokens, pack_documents(list(file_documents(path)), tokenizer, 8))


def test_several_files_follow_each_other(tokenizer, tmp_path):
    (tmp_path / "other").mkdir()
    paths = [corpus_file(tmp_path / "a.txt"), corpus_file(tmp_path / "other" / "a.txt", TEXTS[::-1])]
    paths.append(tmp_path / "b.txt.gz")
    paths[2].write_bytes(gzip.compress(b"zipped. " * 50))
    documents = [document for path in paths for document in file_documents(path)]
    cache = prepare_tokens(file_stream(paths), tokenizer, 8, cache_dir=tmp_path / "cache")
    assert np.array_equal(cache.tokens, pack_documents(documents, tokenizer, 8))


def test_cleaning_normalizes_and_leaves_documents_out(tokenizer, tmp_path):
    useful = [Document(f"u:{index}", "word and CAFÉ  some more lines. " * 3) for index in range(20)]
    trash = Document("t", "0 1 2 3 4 5 6 7 8 9 \n" * 100)
    foreign = Document("f", "走走")
    stream = memory_stream([trash, *useful[:10], trash, foreign, *useful[10:], trash])
    limit = Cleaning(True, 0.4)
    cache = prepare_tokens(stream, tokenizer, 8, cache_dir=tmp_path, cleaning=limit)
    cleaned = [Document(document.name, normalize_text(document.text)) for document in useful]
    assert np.array_equal(cache.tokens, pack_documents(cleaned, tokenizer, 8))
    assert (cache.manifest["documents"], cache.manifest["documents_kept"]) == (24, 20)


def test_the_filter_looks_at_whole_documents(tokenizer, tmp_path):
    # The first half alone would be left out, the whole is kept, and the other way round.
    lines = ["0 1 2 3 4 5\n" * 3, "and and and and some some some more more\n" * 9]
    for order, kept in ((lines, 1), (lines[::-1], 1), (lines[:1], 0)):
        parts = [Document("d", line) for line in order] + [Document("e", "and some more and some more\n" * 9)]
        stream = memory_stream(parts, order=order)
        cache = prepare_tokens(stream, tokenizer, 4, cache_dir=tmp_path, cleaning=Cleaning(False, 0.4))
        assert cache.manifest["documents_kept"] == kept + 1


def test_sequences_as_rows(tokenizer, tmp_path):
    cache = prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
    expected = pack_documents(DOCUMENTS, tokenizer, 8)
    indices = np.array([3, 0, 3, len(expected) - 1])
    assert len(cache) == len(expected)
    assert cache.size == expected.size
    assert np.array_equal(cache[indices], expected[indices])
    assert type(cache[indices]) is np.ndarray
    assert np.array_equal(cache[2:7:2], expected[2:7:2])
    assert cache[indices].flags.writeable
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 1000
    assert np.array_equal(copy[indices], expected[indices])


def test_fingerprint_is_that_of_sequences_in_memory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SCAN_TOKENS", 40)
    cache = prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
    packed = pack_documents(DOCUMENTS, tokenizer, 8)
    assert cache.fingerprint == sequences_fingerprint(packed)


# ------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("scan", [2**20, 24])
def test_published_order_is_a_stable_sort_by_periods(tokenizer, tmp_path, monkeypatch, scan):
    monkeypatch.setattr(token_cache, "SCAN_TOKENS", scan)
    cache = prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
    packed = pack_documents(DOCUMENTS, tokenizer, 8)
    counts = [int((row == tokenizer.convert_tokens_to_ids(".")).sum()) for row in packed]
    expected = sorted(range(len(counts)), key=lambda index: -counts[index])
    assert len(set(counts)) > 2
    published = cache.in_order("published")
    everything = np.arange(len(cache))
    assert np.array_equal(published[everything], packed[expected])
    assert np.array_equal(published.in_order("shuffled")[everything], packed)
    assert np.load(cache.folder / "order.npy").dtype == np.int64
    # How the batch order uses it: unshuffled, and so in the order of the numbers.
    indices = BatchOrder(len(published), seed=0, shuffle=False).batch(4, 4).indices
    assert np.array_equal(published[indices], packed[expected[4:8]])
    copy = pickle.loads(pickle.dumps(published))
    assert np.array_equal(copy[everything], packed[expected])


def test_published_order_needs_a_period(tmp_path):
    documents = [Document("d", "no full stop " * 20)]
    tokenizer = train_wordpiece(documents, 60)
    cache = prepare_tokens(memory_stream(documents), tokenizer, 8, cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r'counts "\." tokens, and this tokenizer has none'):
        cache.in_order("published")


# ------------------------------------------------------------------------------------------------- the key


def test_a_hit_reads_and_tokenizes_nothing(tokenizer, tmp_path, encoded):
    path = corpus_file(tmp_path / "a.txt")
    first = prepare_tokens(file_stream([path]), tokenizer, 8, cache_dir=tmp_path / "cache")
    assert encoded[0] == len(TEXTS)
    stream = file_stream([path])
    unread = CorpusStream(lambda: pytest.fail("the corpus was read"), stream.ingredients, stream.origin)
    again = prepare_tokens(unread, tokenizer, 8, cache_dir=tmp_path / "cache")
    assert encoded[0] == len(TEXTS)
    assert again.folder == first.folder
    assert np.array_equal(again.tokens, first.tokens)


def test_the_key_changes_with_each_ingredient(tokenizer, tmp_path, encoded):
    cache_dir = tmp_path / "cache"
    path = corpus_file(tmp_path / "a.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"a": text, "b": text}) for text in TEXTS))
    train, validation = split_stream(file_stream([path]), 0.3)
    variants = [
        (file_stream([path]), tokenizer, 8, NO_CLEANING),
        (file_stream([path, path]), tokenizer, 8, NO_CLEANING),
        (file_stream([path], max_documents=30), tokenizer, 8, NO_CLEANING),
        (file_stream([rows], "a"), tokenizer, 8, NO_CLEANING),
        (file_stream([rows], "b"), tokenizer, 8, NO_CLEANING),
        (train, tokenizer, 8, NO_CLEANING),
        (validation, tokenizer, 8, NO_CLEANING),
        (split_stream(file_stream([path]), 0.4)[0], tokenizer, 8, NO_CLEANING),
        (file_stream([path]), train_wordpiece(DOCUMENTS, 90), 8, NO_CLEANING),
        (file_stream([path]), tokenizer, 9, NO_CLEANING),
        (file_stream([path]), tokenizer, 8, Cleaning(normalize=True)),
        (file_stream([path]), tokenizer, 8, Cleaning(False, 2.0)),
    ]
    folders = set()
    for stream, its_tokenizer, length, cleaning in variants:
        before = encoded[0]
        folders.add(prepare_tokens(stream, its_tokenizer, length, cache_dir=cache_dir, cleaning=cleaning).folder)
        assert encoded[0] > before
    corpus_file(path, [*TEXTS, "one more"])
    folders.add(prepare_tokens(file_stream([path]), tokenizer, 8, cache_dir=cache_dir).folder)
    assert len(folders) == len(variants) + 1
    # Another time of change with the same content, and another folder, are no other corpus.
    os.utime(path, (1, 1))
    (tmp_path / "moved").mkdir()
    path.rename(tmp_path / "moved" / "a.txt")
    before = encoded[0]
    assert prepare_tokens(file_stream([tmp_path / "moved" / "a.txt"]), tokenizer, 8, cache_dir=cache_dir)
    assert encoded[0] == before


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1]),
        lambda folder: (folder / "tokens.bin").unlink(),
        lambda folder: (folder / "order.npy").write_bytes(b""),
    ],
)
def test_a_damaged_cache_is_made_again_with_a_warning(tokenizer, tmp_path, encoded, warning_log, damage):
    cache = prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
    expected, before = np.array(cache.tokens), encoded[0]
    damage(cache.folder)
    again = prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
    assert encoded[0] == 2 * before
    assert np.array_equal(again.tokens, expected)
    assert any("is damaged" in message and "rebuilt" in message for message in warning_log.messages)


def test_a_failure_leaves_nothing_half_made(tokenizer, tmp_path):
    def documents():
        yield from DOCUMENTS
        raise CorpusError("a.txt is not UTF-8")

    stream = CorpusStream(documents, {"memory": len(DOCUMENTS)}, "memory")
    with pytest.raises(CorpusError, match="not UTF-8"):
        prepare_tokens(stream, tokenizer, 8, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)


def test_a_full_disk_leaves_nothing_half_made(tokenizer, tmp_path, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full on this system")
    original = token_cache._Packer.write

    def write_to_full_disk(self, file):
        with open(full, "wb") as full_file:
            return original(self, full_file)

    with monkeypatch.context() as patched:
        patched.setattr(token_cache._Packer, "write", write_to_full_disk)
        with pytest.raises(
            CorpusError, match=r"The disk of .* is full .*incomplete data are removed.*another cache folder"
        ):
            prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert len(prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)) > 0


def test_too_little_space_is_said_before_anything_is_read(tokenizer, tmp_path):
    huge = CorpusStream(lambda: pytest.fail("the corpus was read"), {}, "The Pile", 10**18)
    with pytest.raises(CorpusError, match=r"Not enough disk space .*The Pile need about .* MB, and .* MB are free"):
        prepare_tokens(huge, tokenizer, 8, cache_dir=tmp_path)


def test_a_folder_that_cannot_be_made(tokenizer, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(CorpusError, match="cannot be written"):
        prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path / "cache")


def test_a_corpus_below_one_sequence_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        CorpusError, match=r"memory is too short: \d+ tokens in 1 documents kept of 1.*sequence of 128"
    ):
        prepare_tokens(memory_stream(DOCUMENTS[:1]), tokenizer, 128, cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"too short: 0 tokens in 0 documents kept of 60"):
        prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path, cleaning=Cleaning(False, 0.01))


def test_a_killed_preparation_is_started_again(tokenizer, tmp_path):
    cache_dir = tmp_path / "cache"
    killed, _ = started(prepare_slowly, cache_dir, tokenizer, 0.005)
    partial = None
    while partial is None or not any(file.stat().st_size for file in partial.glob("tokens.bin")):
        assert killed.is_alive()
        time.sleep(0.005)
        partial = next(cache_dir.glob(".*.partial"), None)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert partial.is_dir()

    # Another key's preparation removes it, too.
    prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=cache_dir)
    assert not list(cache_dir.glob(".*.partial"))
    _, again = started(prepare_slowly, cache_dir, tokenizer, 0)
    _, fresh = started(prepare_slowly, tmp_path / "fresh", tokenizer, 0)
    for results in (again, fresh):
        assert results.get(timeout=60) == "read"
    assert again.get(timeout=60) == fresh.get(timeout=60)


def test_of_two_processes_one_prepares(tokenizer, tmp_path):
    queues = [started(prepare_slowly, tmp_path / "cache", tokenizer, 0.01)[1] for _ in range(2)]
    outcomes = []
    for results in queues:
        outcomes.append([results.get(timeout=60)])
        if outcomes[-1] == ["read"]:
            outcomes[-1].append(results.get(timeout=60))
    waited, prepared = sorted(outcomes, key=len)
    assert prepared[0] == "read"
    assert prepared[1][:3] == waited[0][:3]
    assert (prepared[1][3], waited[0][3]) == (
        [],
        ["Another process is preparing the sequences of slow corpus; waiting until it is done."],
    )


def test_others_preparations_are_no_leftovers(tokenizer, tmp_path):
    busy = tmp_path / "tokens-busy"
    prepared_folders._partial(busy).mkdir()
    with prepared_folders._locked(busy, "something"):
        prepare_tokens(memory_stream(), tokenizer, 8, cache_dir=tmp_path)
        assert prepared_folders._partial(busy).is_dir()
    prepare_tokens(memory_stream(), tokenizer, 9, cache_dir=tmp_path)
    assert not prepared_folders._partial(busy).exists()


def test_a_trained_tokenizer_is_kept(tmp_path, monkeypatch):
    expected = train_wordpiece([Document(item.name, normalize_text(item.text)) for item in DOCUMENTS], 120)
    options = {"cache_dir": tmp_path, "cleaning": PUBLISHED_CLEANING, "max_seq_length": 32}
    trained = prepare_tokenizer(memory_stream(), 120, **options)
    monkeypatch.setattr(tokenization, "train_wordpiece", lambda *_, **__: pytest.fail("trained again"))
    again = prepare_tokenizer(memory_stream(), 120, **options)
    for tokenizer in (trained, again):
        assert tokenizer.get_vocab() == expected.get_vocab()
        assert tokenizer.model_max_length == 32
        assert tokenizer("Word1 [MASK]")["input_ids"] == expected("Word1 [MASK]")["input_ids"]
    folder = next(tmp_path.glob("tokenizer-*"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        prepare_tokenizer(memory_stream(), 120, **options)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    # 45 MB of text: held in lists, the documents and their tokens would take another 65 MB.
    line = "extraordinarily uncharacteristically misunderstandings\n" * 40
    with open(tmp_path / "a.txt", "w") as stream:
        written = 0
        while written < 45_000_000:
            written += stream.write(f"document{written}\n{line}\n\n\n")
    process, results = started(prepare_much, tmp_path / "a.txt", tmp_path / "cache")
    growth, tokens = results.get(timeout=300)
    process.join()
    assert tokens > 2_000_000
    assert growth < 40


def test_class_of_the_cache_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        TokenCache(tmp_path / "tokens-none")
