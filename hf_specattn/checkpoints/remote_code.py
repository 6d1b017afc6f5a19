"""The source files in a checkpoint with which `trust_remote_code=True` loads it where the package is missing.

transformers copies such files from one flat folder and follows `from .x import y`; `auto_map` in config.json names the class
for each Auto class. `save_pretrained` would name that of the saved head alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import crammed_bert, modeling
from ..architectures import ARCHITECTURES
from ..compat import relative_imports
from ..config_fields import MODEL_TYPE_PREFIX
from ..modeling import OUTSIDE, conditioned_class, conditioned_models, crammed_bert_classes

CONFIG = "config.json"


def needs_remote_code(config: dict[str, Any]) -> bool:
    """Whether a transformers without this package has no class for a model type."""
    return _module_of(str(config.get("model_type"))) is not None


def auto_map(model_type: str, architectures: Sequence[str] = ()) -> dict[str, str]:
    """Auto class -> `<file>.<class>`, for the configuration and every head of a model type of this package.

    Args:
        model_type: of the checkpoint.
        architectures: the class names in its config.json, which decide where one Auto class has several heads.

    Raises:
        ValueError: for a model type of transformers, or one that `register_architecture` added.
    """
    module = _module_of(model_type)
    if module is None:
        raise ValueError(f"model_type={model_type!r} is transformers' own and needs no remote code.")
    stock_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    classes = conditioned_models(stock_type) if model_type != stock_type else crammed_bert_classes()[1]
    heads = {auto_class: conditioned_class(several, architectures) for auto_class, several in classes.items()}
    config_class = next(iter(heads.values())).config_class
    stem = Path(str(module.__file__)).stem
    named = {"AutoConfig": config_class, **heads}
    return {auto_class: f"{stem}.{target.__name__}" for auto_class, target in named.items()}


def source_files(model_type: str) -> list[Path]:
    """The files that a checkpoint of this model type carries: the module of its classes, and those that it imports."""
    module = _module_of(model_type)
    if module is None:
        return []
    main = Path(str(module.__file__))
    return [main, *relative_imports(main)]


def remote_code(config: dict[str, Any]) -> dict[str, bytes]:
    """What a checkpoint with this config.json lacks for `trust_remote_code`: file name -> content, config.json included.

    Empty for a model type of transformers.
    """
    if not needs_remote_code(config):
        return {}
    model_type = str(config["model_type"])
    files = {file.name: file.read_bytes() for file in source_files(model_type)}
    # Entries of others, such as a tokenizer's, stay.
    complete = {
        **config,
        "auto_map": {**config.get("auto_map", {}), **auto_map(model_type, config.get("architectures") or ())},
    }
    files[CONFIG] = (json.dumps(complete, indent=2, sort_keys=True) + "\n").encode()
    return files


def add_remote_code(folder: Path) -> list[str]:
    """Put the source files and `auto_map` into a saved checkpoint; return the names of the files written."""
    files = remote_code(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(files)


def refuse_outside(model_type: str) -> None:
    """Refuse a model type that `register_architecture` added.

    Raises:
        ValueError: saying why, and the way out.
    """
    stock_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    if stock_type in OUTSIDE:
        config_class = OUTSIDE[stock_type][0]
        raise ValueError(
            f"model type {stock_type!r} was registered by register_architecture: its code ({config_class.__module__}) "
            "is not part of this package and cannot be saved with a checkpoint. Save the model with save_pretrained, "
            "and make the same call before you load it; or fold it (hf_specattn.fold(model)), and share it as you "
            "share your stock model."
        )


def _module_of(model_type: str) -> Any:
    refuse_outside(model_type)
    if model_type.startswith(MODEL_TYPE_PREFIX) and model_type.removeprefix(MODEL_TYPE_PREFIX) in ARCHITECTURES:
        return modeling
    return crammed_bert if model_type == crammed_bert.CrammedBertConfig.model_type else None
