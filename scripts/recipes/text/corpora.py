"""Which corpus a run reads: the embedded one, files, or a dataset of the Hub; each as a stream of documents."""

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .documents import Document
from .embedded_corpus import EMBEDDED_CORPUS_NAME, SKIPPED_FOLDERS, embedded_documents
from .hub_datasets import hub_stream
from .streams import CorpusStream, file_stream, split_first, split_stream

if TYPE_CHECKING:
    from .mlm_data import MlmDataSettings

logger = logging.get_logger(__name__)


def corpus_streams(
    settings: "MlmDataSettings", *, show_progress: bool = False
) -> tuple[CorpusStream, CorpusStream, str]:
    """Return the training stream, the validation stream, and a sentence about where they come from.

    Validation documents are those of `validation_file` or `dataset_validation_split`; else the first
    `validation_documents` of the corpus, or those whose names hash below `validation_fraction`, held out of training.

    Raises:
        CorpusError: for files or a dataset that do not exist; other faults show while a stream is read.
    """
    train = training_stream(settings, show_progress)
    validation = separate_validation_stream(settings, show_progress)
    if validation is not None:
        if same := {*_resolved(settings.train_file)} & {*_resolved(settings.validation_file)}:
            logger.warning(f"Validation uses text that is also trained on: {', '.join(sorted(map(str, same)))}.")
        return train, validation, f"{train.origin}; validation on {validation.origin}"
    if settings.validation_documents is not None:
        kept, held_out = split_first(train, settings.validation_documents)
        return kept, held_out, f"{train.origin}; its first {settings.validation_documents} documents held out"
    kept, held_out = split_stream(train, settings.validation_fraction)
    share = f"{settings.validation_fraction:.4g} of its documents held out by the hash of their names"
    return kept, held_out, f"{train.origin}; {share}"


def _resolved(files: Sequence[str] | None) -> Iterator[Path]:
    return (Path(file).resolve() for file in files or ())


def training_stream(settings: "MlmDataSettings", show_progress: bool = False) -> CorpusStream:
    """Return the whole training corpus; without files or a dataset the embedded one."""
    if settings.dataset_name is not None:
        return _dataset(settings, settings.dataset_split, settings.max_documents, show_progress)
    if settings.train_file is not None:
        return file_stream(settings.train_file, settings.text_column, settings.max_documents)
    return embedded_stream()


def separate_validation_stream(settings: "MlmDataSettings", show_progress: bool = False) -> CorpusStream | None:
    """Return the validation corpus that is not part of the training corpus, or None."""
    if settings.validation_file is not None:
        return file_stream(settings.validation_file, settings.text_column)
    if settings.dataset_validation_split is not None:
        return _dataset(settings, settings.dataset_validation_split, None, show_progress)
    return None


def _dataset(settings: "MlmDataSettings", split: str, max_documents: int | None, show_progress: bool) -> CorpusStream:
    return hub_stream(
        str(settings.dataset_name),
        settings.dataset_config_name,
        split=split,
        text_column=settings.text_column,
        streaming=settings.streaming,
        revision=settings.dataset_revision,
        max_documents=max_documents,
        show_progress=show_progress,
    )


def embedded_stream(library: Path | None = None) -> CorpusStream:
    """Stream the embedded corpus, which is parsed once and then held: some 2 MB of text.

    Args:
        library: As in `embedded_documents`.
    """
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    held = functools.cache(lambda: tuple(embedded_documents(library)))

    def documents() -> Iterator[Document]:
        yield from held()

    return CorpusStream(documents, {"embedded": _library_state(library)}, EMBEDDED_CORPUS_NAME)


def _library_state(library: Path) -> Any:
    """Return what tells one installation's sources from another's, without parsing them for some seconds."""
    digest = hashlib.sha256()
    for folder, subfolders, names in os.walk(library):
        # In a fixed order, and not into the packages installed beside the library, which change and are not read.
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(library).as_posix()} {content}\n".encode())
    return [sys.version, digest.hexdigest()]
