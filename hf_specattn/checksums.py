"""Whether a stored svd correction is the one that was saved: by its checksum, or by what can be verified without one.

A correction is part of the trained function and cannot be recomputed, so a flipped bit would change the function. Each one
has the SHA-256 of its stored bytes, type and shape in the metadata of its safetensors file, under its own name; another
layer's correction, or a transposed one, has a different checksum. Files written before this, or by other tools, have none.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from .layers import SpectralLayer
from .ordinary import read

CORRECTION = ".correction"
KEY = "specattn.sha256."  # and the tensor's name
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# How far from one the singular values of a stored correction over their mean may lie without a checksum: a multiple of the
# rounding of its dtype, and what LAPACK, or the products of a refresh (`polar`), leave open.
ROUNDINGS, EXACT, BY_PRODUCTS = 4, 1e-3, 2e-2


class DamagedCorrectionError(ValueError):
    """A stored correction is not the one that was saved."""

    def __init__(self, where: Any, name: str, what: str) -> None:
        super().__init__(
            f"{where} is damaged: {name} {what}. A correction is part of the trained function and cannot be "
            "recomputed; restore the file from its source."
        )


@dataclass(frozen=True)
class Verified:
    """What the files of a checkpoint say about its corrections.

    Attributes:
        checked: names of those with a correct checksum.
        unproved: names of those without one, with the dtype in which they are stored.
    """

    checked: tuple[str, ...]
    unproved: Mapping[str, torch.dtype]

    @property
    def coarsest(self) -> torch.dtype:
        """The coarsest dtype of those without a checksum; half precision's where no file says."""
        return max(self.unproved.values(), key=lambda dtype: torch.finfo(dtype).eps, default=torch.bfloat16)

    def describe(self) -> str:
        """For people."""
        if self.checked and not self.unproved:
            return f"{len(self.checked)}, each with the checksum that it was saved with"
        count = f"{len(self.unproved)} of {len(self.checked) + len(self.unproved)}" if self.checked else "all"
        return (
            f"{count} without a checksum. Each is a multiple of a semi-orthogonal matrix within its dtype's rounding; "
            "this does not prove that it belongs to its layer, is not transposed and has the right scale"
        )


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, in hexadecimal."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_checksums(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """The metadata of a safetensors file with a checksum for each correction among its tensors."""
    found = {f"{KEY}{name}": checksum(tensor) for name, tensor in tensors.items() if name.endswith(CORRECTION)}
    if not found:
        return None if metadata is None else dict(metadata)
    kept = {key: value for key, value in (metadata or {}).items() if not key.startswith(KEY)}
    return {**kept, **found}


def order_metadata(file: str | os.PathLike) -> None:
    """Sort the metadata of a safetensors file by their keys, in place: the same tensors then give the same file.

    safetensors writes them in an order that differs between processes. The header keeps its length.
    """
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        if len(header.get("__metadata__", ())) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # padded with spaces, as the format has it
            stream.seek(8)
            stream.write(ordered.ljust(length))


def verify(files: Iterable[str | os.PathLike]) -> Verified:
    """Compare the corrections in safetensors files with their checksums.

    Raises:
        DamagedCorrectionError: for the first that differs, or whose checksum has no tensor.
    """
    checked: list[str] = []
    unproved: dict[str, torch.dtype] = {}
    for file in files:
        try:
            _verify_file(file, checked, unproved)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}. Restore it from its source.") from error
    return Verified(tuple(checked), unproved)


def _verify_file(file: str | os.PathLike, checked: list[str], unproved: dict[str, torch.dtype]) -> None:
    with safe_open(file, framework="pt") as stream:
        names = [name for name in stream.keys() if name.endswith(CORRECTION)]  # noqa: SIM118  no mapping
        metadata = stream.metadata() or {}
        expected = {key.removeprefix(KEY): value for key, value in metadata.items() if key.startswith(KEY)}
        if lost := sorted(set(expected) - set(names)):
            raise DamagedCorrectionError(file, lost[0], "has a checksum and is missing")
        for name in names:
            tensor = stream.get_tensor(name)
            if name not in expected:
                unproved[name] = tensor.dtype
            elif checksum(tensor) != expected[name]:
                raise DamagedCorrectionError(file, name, "has a different checksum than when it was saved")
            else:
                checked.append(name)


def weight_files(path: str | os.PathLike, config: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """The safetensors files that `from_pretrained(path, **kwargs)` has read; none where it read others.

    Args:
        config: the model's, which may name them.
        kwargs: its keyword arguments: where the files are, and `variant`.
    """
    if kwargs.get("use_safetensors") is False or kwargs.get("state_dict") is not None:
        return []
    names = ("cache_dir", "local_files_only", "proxies", "token", "revision", "subfolder")
    where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}

    def find(name: str) -> str | None:
        try:
            return cached_file(path, name, **where)
        except OSError:  # it has no such file
            return None

    single, index = getattr(config, "transformers_weights", None) or WEIGHTS, INDEX
    if single.endswith(".json"):
        single, index = WEIGHTS, single
    elif (variant := kwargs.get("variant")) is not None:
        single, index = (f"{name.rpartition('.')[0]}.{variant}.{name.rpartition('.')[2]}" for name in (WEIGHTS, INDEX))
    if (file := find(single)) is not None:
        return [file]
    if (file := find(index)) is None:
        return []
    shards = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
    return [found for shard in shards if (found := find(shard)) is not None]


# --- without a checksum ----------------------------------------------------------------------------------------------


@torch.no_grad()
def check_shape(
    path: Any, layers: Iterable[tuple[str, SpectralLayer]], stored: torch.dtype, by_products: bool
) -> None:
    """Refuse corrections that are no multiple of a semi-orthogonal matrix (one for each head where they are per head).

    Args:
        path: of the checkpoint, for the message.
        layers: with the loaded corrections.
        stored: the dtype in the file, whose rounding they have.
        by_products: whether they may have been computed by matrix products.

    Raises:
        DamagedCorrectionError: naming the layer.
    """
    for name, layer in layers:
        correction = layer.orient(read(layer, "correction")).float()
        rounding = ROUNDINGS * max(torch.finfo(stored).eps, torch.finfo(layer.correction.dtype).eps)
        for projection, matrix in layer.layout.split(correction).items():
            name_of = f"{name}{CORRECTION} ({projection})"
            if not torch.isfinite(matrix).all():
                raise DamagedCorrectionError(path, name_of, "has nan or inf entries")
            if projection not in layer.spectral.targets:
                if matrix.any():
                    raise DamagedCorrectionError(path, name_of, "is not zero, and the projection is not a target")
                continue
            per_head = layer.spectral.granularity == "head"
            blocks = layer.layout.head_blocks(projection, matrix) if per_head else matrix[None]
            deviation = _deviation(blocks).max().item()
            if not deviation <= rounding + (BY_PRODUCTS if by_products else EXACT):
                raise DamagedCorrectionError(
                    path, name_of, f"is not a multiple of a semi-orthogonal matrix (off by {deviation:.2g})"
                )


def _deviation(blocks: Tensor) -> Tensor:
    """`|Q Q^T - I|_2`, `(...,)`, of each `(..., m, n)` matrix (m <= n, or transposed) over its rms singular value.

    By the power method: a lower bound, tight for what some damaged entries do, which costs nothing beside loading.
    """
    blocks = blocks if blocks.shape[-2] <= blocks.shape[-1] else blocks.mT
    rows = blocks.shape[-2]
    scale = torch.linalg.matrix_norm(blocks, keepdim=True) / rows**0.5
    if not (scale > 0).all():
        return torch.full(blocks.shape[:-2], torch.inf)
    unit = blocks / scale
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(rows, min(4, rows), generator=generator).to(unit).expand(*unit.shape[:-2], -1, -1)
    for _ in range(20):
        vectors = torch.linalg.qr(vectors).Q
        vectors = unit @ (unit.mT @ vectors) - vectors
    return torch.linalg.matrix_norm(vectors, ord=2)
