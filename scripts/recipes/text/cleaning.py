"""What the published Crammed BERT recipe does to text before tokenizing it, and which documents it leaves out.

Both are off unless asked for. Every function looks at its arguments alone, and text may be normalized in parts: cut at
line ends, the normalized parts join to the normalized whole.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

_SPACES = re.compile(" {2,}")


def normalize_text(text: str) -> str:
    """Lowercase text, strip its accents, drop what is not ASCII and collapse runs of spaces.

    Accents are stripped through the canonical decomposition: "é" becomes "e". Characters without one, such as a curly
    quotation mark or a letter of another script, are dropped. Line ends and tabs stay.
    """
    if not text.isascii():
        # An accent becomes a combining mark of its own, which is no more ASCII than the characters to drop.
        text = unicodedata.normalize("NFD", text).encode("ascii", "ignore").decode("ascii")
    return _SPACES.sub(" ", text.lower())


@dataclass(frozen=True)
class Cleaning:
    """What happens to documents between the corpus and the packed sequences.

    Attributes:
        normalize: Whether text passes through `normalize_text` before the tokenizer sees it.
        max_tokens_per_character: A document is kept if its tokens, separator not counted, are more than none and fewer
            than this times its characters before normalization (the published 0.25 leaves out what the tokenizer
            cannot shorten, such as tables of numbers). None keeps every document.

    Raises:
        ValueError: if `max_tokens_per_character` is not a number above 0.
    """

    normalize: bool = False
    max_tokens_per_character: float | None = None

    def __post_init__(self) -> None:
        limit = self.max_tokens_per_character
        if limit is not None and not 0 < limit < float("inf"):
            raise ValueError(
                f"max_tokens_per_character is {limit}; allowed are numbers above 0 (0.25 is the published one), or None "
                "to keep every document."
            )

    def apply(self, text: str) -> str:
        """Return the text as the tokenizer is to see it."""
        return normalize_text(text) if self.normalize else text

    def keeps(self, tokens: int, characters: int) -> bool:
        """Say whether a document with these numbers of tokens and (raw) characters stays in the corpus."""
        limit = self.max_tokens_per_character
        return limit is None or 0 < tokens < limit * characters

    def ingredients(self) -> dict[str, Any]:
        """Return what decides the outcome, for the key of a cache; the tables of Unicode differ between Pythons."""
        return {
            "normalize": unicodedata.unidata_version if self.normalize else None,
            "max_tokens_per_character": self.max_tokens_per_character,
        }


NO_CLEANING = Cleaning()
PUBLISHED_CLEANING = Cleaning(normalize=True, max_tokens_per_character=0.25)
