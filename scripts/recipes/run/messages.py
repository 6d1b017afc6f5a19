"""Errors of other libraries in the messages of these scripts."""


def one_line(error: BaseException) -> str:
    """Return an error in one line, with its type where it has no text or the text alone would not say what is wrong."""
    text = " ".join(str(error).split())
    return (
        text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}".rstrip(": ")
    )
