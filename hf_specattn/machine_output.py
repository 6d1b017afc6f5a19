"""The JSON document that `--json` prints, and the environment that numbers come from."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from .version import __version__

# What decides a result, or a message that somebody reports.
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "peft", "timm")


def as_json(value: Any) -> str:
    """Return a value as JSON text.

    Dataclasses become objects, tensors and tuples arrays; JSON has no infinity and no nan, which become null.
    """
    return json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def environment() -> dict[str, Any]:
    """Return the versions of this package, Python and related packages (None: not installed), and the device."""
    return {
        "hf_specattn": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _installed(name) for name in PACKAGES},
        "device": _device(),
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads"
