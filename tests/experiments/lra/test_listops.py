"""ListOps: the expressions against an evaluator of their text, their distribution, and the guesses."""

import gzip
import statistics
from collections import Counter

import numpy as np
import pytest

from recipes.lra.listops import IDS, as_pairs, encode, guesses, make_chunk, make_trees, root_of


def value_of(text):
    """Evaluate nested pairs as they are written, with no help from the generator."""
    words, place = text.split(), 0

    def read():
        """A digit, an operator with the arguments so far, or `]`."""
        nonlocal place
        word = words[place]
        place += 1
        if word != "(":
            return int(word) if word.isdigit() else [word] if word.startswith("[") else word
        left, right = read(), read()
        assert words[place] == ")"
        place += 1
        if right != "]":
            return [*left, right]
        name, *values = left
        if name == "[MED":
            ordered, middle = sorted(values), len(values) // 2
            return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
        return {"[MIN": min, "[MAX": max, "[SM": lambda numbers: sum(numbers) % 10}[name](values)

    value = read()
    assert place == len(words)
    return value


def test_an_independent_evaluator_agrees_on_ten_thousand_trees():
    trees = make_trees(10_000, 3, 10, 200, processes=1)
    assert len({text for text, _ in trees}) == 10_000
    assert [value_of(text) for text, _ in trees] == [value for _, value in trees]


def test_the_original_data_have_these_values(shared_data):
    with gzip.open(shared_data / "listops-original" / "test_d20s.tsv.gz", "rt") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    ids = [encode(text) for _, text in rows]
    assert all(each.min() >= 1 and each.max() <= 15 for each in ids)
    labels = np.array([int(label) for label, _ in rows])
    assert [value_of(text) for _, text in rows[:500]] == labels[:500].tolist()
    # Where the root's arguments are digits, the second guess is the value itself.
    flat = [row for row, each in enumerate(ids) if each[0] >= 11 and not root_of(each)[2]]
    assert len(flat) > 1000
    assert guesses(iter(ids), labels, (ids[row] for row in flat), labels[flat])["root_literals"] == 1


def test_lengths_and_values_are_those_of_lra():
    """2,000 of its size: mean length 1,037; the values 0 and 9 some 17 % each (docs/lra.md)."""
    trees = make_chunk(0, 500, 2000, 0) + make_chunk(0, 500, 2000, 1)
    lengths = [len(encode(text)) for text, _ in trees]
    assert min(lengths) > 500
    assert max(lengths) < 2000
    # Standard error: 9.
    assert statistics.mean(lengths) == pytest.approx(1037, abs=30)
    shares = Counter(value for _, value in trees)
    assert all(shares[end] / 2000 == pytest.approx(0.17, abs=0.03) for end in (0, 9))
    assert all(shares[value] / 2000 == pytest.approx(0.08, abs=0.03) for value in range(1, 9))
    roots = Counter(root_of(encode(text))[0] for text, _ in trees)
    assert all(roots[IDS[name]] / 2000 == pytest.approx(0.25, abs=0.04) for name in ("[MIN", "[MAX", "[MED", "[SM"))


def test_the_guesses_are_as_good_as_they_were_measured():
    """On LRA's sizes the root's operator alone gives 35.6 %, its digits 59.1 %."""
    trees = [tree for chunk in range(5) for tree in make_chunk(1, 500, 2000, chunk)]
    ids, labels = [encode(text) for text, _ in trees], np.array([value for _, value in trees])
    found = guesses(iter(ids[:4000]), labels[:4000], iter(ids[2000:]), labels[2000:])
    assert found["root_operator"] == pytest.approx(0.356, abs=0.02)
    assert found["root_literals"] == pytest.approx(0.591, abs=0.02)


def test_the_same_seed_gives_the_same_trees_on_any_number_of_processes():
    one = make_trees(1500, 5, 10, 64, processes=1)
    assert make_trees(1500, 5, 10, 64, processes=2) == one
    assert make_trees(700, 5, 10, 64, processes=1) == one[:700]
    assert make_trees(700, 6, 10, 64, processes=1) != one[:700]


def test_the_files_form_and_the_tokens():
    tokens = ["[MAX", "4", "[SM", "2", "9", "]", "0", "]"]
    text = as_pairs(tokens)
    assert text == "( ( ( ( [MAX 4 ) ( ( ( [SM 2 ) 9 ) ] ) ) 0 ) ] )"
    assert value_of(text) == 4
    assert encode(text).tolist() == [IDS[token] for token in tokens]
    assert sorted(IDS.values()) == list(range(1, 16))
    assert encode("[MAX 4 nine ]").tolist() == [12, 5, 16, 15]
    assert root_of(encode(text)) == (IDS["[MAX"], [4, 0], [IDS["[SM"]])


@pytest.mark.parametrize(
    ("above", "below", "message"), [(63, 64, "more than 63 and fewer than 64"), (2, 5, "hard to find")]
)
def test_lengths_that_no_or_few_expressions_have_are_refused(above, below, message):
    with pytest.raises(ValueError, match=message):
        make_trees(3000, 0, above, below, processes=1)
