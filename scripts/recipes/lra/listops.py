"""ListOps of Long Range Arena: making its expressions from a seed, reading them, and two guesses that do not nest.

An expression is a tree of digits and of MIN, MAX, MED (the median, truncated) and SM (the sum modulo 10), written as
`[MAX 4 [MIN 2 9 ] 0 ]`; its label is its value. LRA's files hold it as nested binary pairs in parentheses, which no model
sees. The distribution is that of `data/listops.py` of https://github.com/google-research/long-range-arena.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from .parallel import in_order

OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
OPERATORS, DIGITS = tuple(OPERATIONS), tuple("0123456789")
# LRA's order of ids is that in which its encoder met the tokens; this one is fixed. 0 is padding.
IDS = {token: number for number, token in enumerate((*DIGITS, *OPERATORS, "]"), start=1)}
FIRST_OPERATOR, CLOSE, UNKNOWN = IDS["[MIN"], IDS["]"], 16
PARENTHESES = str.maketrans("()", "  ")

MAX_DEPTH, OPERATOR_SHARE, MAX_ARGUMENTS = 10, 0.25, 10
TREES_PER_CHUNK = 1000


class _TooLong(Exception):
    pass


def random_tree(draw: Callable[[], float], below: int) -> tuple[list[str], int] | None:
    """A random expression with an operator at its root, as tokens and value; None for one of `below` tokens or more.

    Args:
        draw: Uniform numbers in [0, 1).
    """
    tokens: list[str] = []

    def node(depth: int) -> int:
        # A root that is a digit is too short for any use.
        if depth > 1 and (depth == MAX_DEPTH or draw() > OPERATOR_SHARE):
            digit = int(10 * draw())
            tokens.append(DIGITS[digit])
            return digit
        place = len(tokens)
        tokens.append("")
        values = [node(depth + 1) for _ in range(2 + int((MAX_ARGUMENTS - 1) * draw()))]
        if len(tokens) + 1 >= below:
            raise _TooLong
        tokens[place] = OPERATORS[int(4 * draw())]
        tokens.append("]")
        return OPERATIONS[tokens[place]](values)

    try:
        value = node(1)
    except _TooLong:
        return None
    return tokens, value


def as_pairs(tokens: Sequence[str]) -> str:
    """The expression as LRA's files have it: `[MAX 4 0 ]` is `( ( ( [MAX 4 ) 0 ) ] )`."""
    opened: list[int] = []
    parts: list[str] = []
    for token in tokens:
        if token in OPERATIONS:
            opened.append(len(parts))
            parts.append(token)
            continue
        parts.append(token)
        if token == "]":
            place = opened.pop()
            parts[place:] = [
                "( " * (len(parts) - place - 1) + parts[place] + " " + " ) ".join(parts[place + 1 :]) + " )"
            ]
    return " ".join(parts)


def make_chunk(seed: int, above: int, below: int, chunk: int) -> list[tuple[str, int]]:
    """`TREES_PER_CHUNK` expressions in LRA's form with their values, of more than `above` and fewer than `below` tokens."""
    draw = random.Random(seed << 32 | chunk).random
    found: list[tuple[str, int]] = []
    while len(found) < TREES_PER_CHUNK:
        tree = random_tree(draw, below)
        if tree is not None and len(tree[0]) > above:
            found.append((as_pairs(tree[0]), tree[1]))
    return found


def make_trees(count: int, seed: int, above: int, below: int, processes: int) -> list[tuple[str, int]]:
    """So many different expressions with their values, the same for any number of processes.

    Raises:
        ValueError: for lengths that hardly any expression has.
    """
    if not 0 < above + 1 < below:
        raise ValueError(
            f"No expression has more than {above} and fewer than {below} tokens; leave room between them."
        )
    found: dict[str, int] = {}
    chunks = 0
    while len(found) < count:
        before, more = len(found), -(-(count - len(found)) // TREES_PER_CHUNK)
        jobs = [(seed, above, below, chunk) for chunk in range(chunks, chunks + more)]
        for trees in in_order(make_chunk, jobs, processes):
            found.update(trees)
        chunks += more
        if len(found) - before < more * TREES_PER_CHUNK / 100:
            raise ValueError(
                f"{count:,} different expressions of more than {above} and fewer than {below} tokens are hard to find; "
                f"after {chunks * TREES_PER_CHUNK:,} there are {len(found):,}. Allow longer ones, or ask for fewer."
            )
    return list(found.items())[:count]


def encode(expression: str) -> NDArray[np.uint16]:
    """Token ids of an expression, of LRA's form or of the original's."""
    return np.array([IDS.get(token, UNKNOWN) for token in expression.translate(PARENTHESES).split()], dtype=np.uint16)


# --- guesses that do not nest ----------------------------------------------------------------------------------------


def root_of(ids: NDArray[np.integer]) -> tuple[int, list[int], list[int]]:
    """The root's operator, its digits, and the operators among its arguments; operators as ids."""
    opens = (ids >= FIRST_OPERATOR) & (ids < CLOSE)
    depth = np.cumsum(opens) - np.cumsum(ids == CLOSE)
    digits = (ids[(depth == 1) & (ids < FIRST_OPERATOR)] - 1).tolist()
    return int(ids[0]), digits, ids[opens & (depth == 2)].tolist()


def guesses(
    train: Iterator[NDArray[np.integer]],
    train_labels: NDArray[np.integer],
    test: Iterator[NDArray[np.integer]],
    test_labels: NDArray[np.integer],
) -> dict[str, float]:
    """Accuracy of guesses that need no nesting, fitted on the training part.

    Returns:
        `root_operator`: of the usual value of the root's operator; `root_literals`: of the root, computed from its digits,
        with the usual value of its operator in place of each argument that is an expression.
    """
    counts: dict[int, Counter[int]] = {}
    for ids, label in zip(train, train_labels.tolist()):
        counts.setdefault(int(ids[0]), Counter())[label] += 1
    usual = {operator: seen.most_common(1)[0][0] for operator, seen in counts.items()}
    by_operator = by_literals = 0
    for ids, label in zip(test, test_labels.tolist()):
        operator, digits, nested = root_of(ids)
        by_operator += usual.get(operator) == label
        operation = (
            OPERATIONS.get(OPERATORS[operator - FIRST_OPERATOR]) if FIRST_OPERATOR <= operator < CLOSE else None
        )
        values = digits + [usual.get(each, 0) for each in nested]
        by_literals += bool(operation and values and operation(values) == label)
    return {"root_operator": by_operator / len(test_labels), "root_literals": by_literals / len(test_labels)}
