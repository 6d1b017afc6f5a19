"""What every command does to its terminal and its words before it starts."""

import os
import sys
from collections.abc import Sequence


def tolerate_output() -> None:
    """Let an output that is not UTF-8 show what it cannot spell as escapes: no table or message ends a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook took its place
            stream.reconfigure(errors="backslashreplace")


def expand_home(words: Sequence[str]) -> list[str]:
    """Put the home folder in place of a leading `~`, as shells do not in `--flag=~/folder` and between quotes."""
    expanded = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{flag}{equals}{os.path.expanduser(value)}" if value.startswith("~") else word)
    return expanded
