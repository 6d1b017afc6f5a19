"""What a corpus is made of, and the error for a corpus that cannot be used."""

from dataclasses import dataclass


class CorpusError(ValueError):
    """A corpus cannot be read or used; the message names the file, the problem and the way out."""


@dataclass(frozen=True)
class Document:
    """One text with a name that is unique in its corpus and the same on every reading."""

    name: str
    text: str
