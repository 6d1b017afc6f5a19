"""A destination folder that is written completely or not at all, with weights split into files as in the source."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checksums import CORRECTION, order_metadata, with_checksums
from ..compat import not_saved, saved_state
from ..files import (
    TEMPORARY_NAME,
    CannotWriteError,
    bytes_of,
    holds_files,
    is_being_written,
    is_disk_full,
    megabytes,
    replace_folder,
    require_writable,
    sync,
    temporary_name,
)
from .source_checkpoint import SAFETENSORS, SAFETENSORS_INDEX, Source

logger = logging.get_logger(__name__)

WEIGHT = ".weight"

# What `replace_folder` calls an existing folder while it puts another in its place.
REPLACED = "-replaced"

# What belongs to the weights and is copied unchanged: tokenizers, processors, and the modules of Sentence
# Transformers. If such a file names the model's classes, it names stock ones or none.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
SENTENCE_TRANSFORMERS_MODULES = "modules.json"


class DestinationError(ValueError):
    """A destination must not or cannot be written to; the message says what to do."""


def check_destination(destination: Path, source: Path | None, overwrite: bool) -> None:
    """Before any work, refuse a destination that is not empty, or that is the source or a part of it.

    Args:
        source: The source's folder.
        overwrite: Whether a folder that holds something may be replaced.

    Raises:
        DestinationError: saying why.
    """
    destination = destination.resolve()
    _restore_replaced(destination)
    if source is not None:
        source = source.resolve()
        if source == destination or destination in source.parents:
            raise DestinationError(
                f"DST {destination} {'is' if source == destination else 'contains'} SRC {source}, which would be "
                "lost; choose another folder."
            )
        if source in destination.parents:
            raise DestinationError(
                f"DST {destination} lies in SRC {source}, which is only read: it would become a part of that "
                "checkpoint. Choose a folder elsewhere."
            )
    if destination.exists() and not destination.is_dir():
        raise DestinationError(f"DST {destination} is a file; choose a folder.")
    _refuse_full(destination, overwrite)
    try:
        require_writable(destination.parent, "The folder of DST,")  # it is made beside its place, and renamed
    except CannotWriteError as error:
        raise DestinationError(str(error)) from error


def _refuse_full(destination: Path, overwrite: bool) -> None:
    if holds_files(destination) and not overwrite:
        raise DestinationError(
            f"DST {destination} is not empty; choose another folder, or pass --overwrite (overwrite=True) to replace "
            "the whole folder."
        )


@contextlib.contextmanager
def whole_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to `destination`, which replaces it once the block has run without an error.

    If the process ends earlier, `destination` is unchanged; the next one for the same destination cleans up. An
    interruption between the two renames that replace an existing folder leaves it under a hidden name; the next
    `check_destination` restores its name.

    Args:
        overwrite: As of `check_destination`, which is asked again at the end: files may have come since, of a second command
            for the same destination or of anybody.

    Raises:
        DestinationError: if the disk is full, the folder cannot be made, or is no longer empty.
    """
    destination = destination.resolve()
    present = files_in(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        temporary = destination.with_name(temporary_name(destination.name))
        temporary.mkdir()
    except OSError as error:
        raise DestinationError(f"DST {destination} cannot be written: {error}.") from error
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync(path)
        sync(temporary)
        _refuse_full(destination, overwrite)
        if files_in(destination) != present:
            raise DestinationError(
                f"DST {destination} was changed in the meantime; nothing in it was replaced. Run the command again."
            )
        replace_folder(temporary, destination)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise DestinationError(f"There is not enough space for {destination}; nothing was written.") from error
        raise


def _leftovers(destination: Path) -> Iterator[Path]:
    """What dead processes left of this destination only: the folder around it is the user's."""
    for path in sorted(destination.parent.glob(f".{destination.name}.tmp-*")):
        match = TEMPORARY_NAME.fullmatch(path.name)
        own = None if match is None else f".{destination.name}.tmp-{match[1]}"
        if match and path.name in (own, f"{own}{REPLACED}") and not is_being_written(path, int(match[1])):
            yield path


def _restore_replaced(destination: Path) -> None:
    """Undo a replacement that was interrupted between its two renames: the old folder gets its name back."""
    for path in _leftovers(destination):
        if path.name.endswith(REPLACED) and not destination.exists():
            logger.warning(f"An interrupted conversion had moved {destination} aside; it is back.")
            path.rename(destination)


def _remove_leftovers(destination: Path) -> None:
    for path in _leftovers(destination):
        logger.info(f"Removing {path}, which an interrupted conversion left.")
        shutil.rmtree(path)


def check_space(destination: Path, needed: int) -> None:
    """Before any work, refuse a disk without `needed` free bytes.

    Raises:
        DestinationError: naming both figures.
    """
    existing = next(folder for folder in (destination.resolve(), *destination.resolve().parents) if folder.is_dir())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise DestinationError(
            f"DST {destination} needs about {megabytes(needed)}, and {megabytes(free)} are free on that disk. Free at "
            f"least {megabytes(needed - free)}, or choose a folder on another disk."
        )


def save_model(model: PreTrainedModel, folder: Path, source: Source, without: Collection[str]) -> list[str]:
    """Write the configuration, the generation configuration and the weights, each tensor into the file it came from.

    A correction goes where its weight is. Names are those of the source, where transformers renames them on loading.

    Args:
        without: Names of the model's tensors that are not written: those that the source did not have.

    Returns:
        The names of the files with weights.
    """
    # As `save_pretrained`, which cannot be told into which file a tensor goes.
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    ignored = {*not_saved(model), *without}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    state = saved_state(model, state)
    files = _divide(state, source)
    for file, names in logging.tqdm(files.items(), desc="Writing", disable=True if len(files) < 4 else None):
        tensors = {name: state[name].contiguous() for name in names}
        save_file(tensors, folder / file, metadata=with_checksums(tensors, {"format": "pt"}))
        order_metadata(folder / file)
    if len(files) > 1 or SAFETENSORS not in files:
        _write_index(folder, files, state)
    return list(files)


def _divide(state: Mapping[str, torch.Tensor], source: Source) -> dict[str, list[str]]:
    renamed = {shard: _safetensors_name(shard) for shard in source.shards}
    home = {name: renamed[shard] for shard, names in source.shards.items() for name in names}
    files: dict[str, list[str]] = {file: [] for file in renamed.values()}
    last = list(files)[-1]
    for name in state:
        origin = name.removesuffix(CORRECTION) + WEIGHT if name.endswith(CORRECTION) else name
        files[home.get(origin, last)].append(name)
    return {file: names for file, names in files.items() if names}


def _safetensors_name(shard: str) -> str:
    return (
        "model" + shard.removeprefix("pytorch_model").removesuffix(".bin") + ".safetensors"
        if shard.endswith(".bin")
        else shard
    )


def _write_index(folder: Path, files: Mapping[str, list[str]], state: Mapping[str, torch.Tensor]) -> None:
    tensors = list(state.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    metadata = {"total_parameters": sum(tensor.numel() for tensor in tensors), "total_size": bytes_of(tensors)}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer, the processors and what else belongs to the weights; return the names of the files."""
    names = companions(source)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)  # of what a link in the Hub's cache points to
    return names


def companions(source: Path) -> list[str]:
    """The names of the files that go with the weights.

    Raises:
        DestinationError: for a link to a file outside of the folder.
    """
    files = {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    if (source / SENTENCE_TRANSFORMERS_MODULES).is_file():
        files |= set(module_files(source))
    refuse_links_out(source, files)
    return sorted(file.relative_to(source).as_posix() for file in files)


def refuse_links_out(source: Path, files: Iterable[Path]) -> None:
    """Refuse files that are links out of the checkpoint: what is there must not be copied or published.

    Links into the Hub's cache are how huggingface_hub keeps a checkpoint.
    """
    for file in sorted(files):
        target = file.resolve()
        cached = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if not (cached or source.resolve() in target.parents):
            raise DestinationError(
                f"{file} is a link to a file outside of the checkpoint, {target}. Replace it by a copy if it belongs "
                "to the checkpoint, or remove it."
            )


def module_files(source: Path) -> Iterator[Path]:
    """The files of the modules of Sentence Transformers (pooling and others), each in a folder of its own."""
    modules = json.loads((source / SENTENCE_TRANSFORMERS_MODULES).read_text(encoding="utf-8"))
    for module in modules:
        folder = (source / str(module.get("path", ""))).resolve()
        if folder != source.resolve() and folder.is_dir() and source.resolve() in folder.parents:
            yield from (source / file.relative_to(source.resolve()) for file in folder.iterdir() if file.is_file())


def left_behind(source: Source, written: Collection[str]) -> list[str]:
    """The source's files that have no counterpart in the destination, hidden ones apart."""
    accounted = {*written, *source.shards, SAFETENSORS, SAFETENSORS_INDEX, "pytorch_model.bin.index.json"}
    names = (path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file())
    return sorted(
        name for name in names if name not in accounted and not any(part.startswith(".") for part in name.split("/"))
    )


def files_in(folder: Path) -> list[str]:
    """The names of all files below a folder, with forward slashes, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(os.path.getsize(folder / name) for name in files_in(folder))
