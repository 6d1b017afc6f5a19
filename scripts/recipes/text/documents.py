"""What a corpus is made of, and the error for a corpus that cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass


class CorpusError(ValueError):
    """A corpus cannot be read or used; the message names the file, the problem and the way out."""


@dataclass(frozen=True)
class Document:
    """One text with a name that is unique in its corpus and the same on every reading."""

    name: str
    text: str


def parts_of(text: str, characters: int) -> Iterator[str]:
    """Cut a text into parts of at most so many characters: after a line's end, else after a space, else anywhere."""
    start = 0
    while len(text) - start > characters:
        stop = start + characters
        end = (text.rfind("\n", start, stop) + 1) or (text.rfind(" ", start, stop) + 1) or stop
        yield text[start:end]
        start = end
    yield text[start:]
