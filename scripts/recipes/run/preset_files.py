"""Presets: values of flags in YAML, which stand in the repository or are a user's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ENDINGS = (".yaml", ".yml")


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a mapping.

    Raises:
        ValueError: for a file that is absent or holds anything else.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__} and no mapping of flags to values, such as seed: 1.")
    return content


def on_one_gpu(recipe: Mapping[str, Any], one_gpu: Mapping[str, Any]) -> dict[str, Any]:
    """A published recipe as a preset: its batch, that of all processes together, is cut for one GPU.

    Args:
        recipe: Values by the names of flags, and `global_batch_size`.
        one_gpu: What runs on one GPU besides, with the batch that fits there.
    """
    values = {name: value for name, value in recipe.items() if name != "global_batch_size"}
    cuts = recipe["global_batch_size"] // one_gpu["per_device_train_batch_size"]
    return {**values, **one_gpu, "gradient_accumulation_steps": cuts}


def find_preset(name: str, presets: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The values of `--preset`: one of the script's by name, or those of a user's own file.

    Raises:
        ValueError: for a name that is neither, and for a file that is not a preset.
    """
    if name in presets:
        return presets[name]
    if name.endswith(ENDINGS):
        return read_yaml(Path(name).expanduser())
    raise ValueError(f"--preset {name} is neither one of {', '.join(presets)} nor a file that ends in .yaml.")


def as_defaults(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a preset as defaults of a parser, which has those `known`; numbers as text, which it reads as a flag's.

    Raises:
        ValueError: for a name that is not a flag, and for a value that a flag cannot have.
    """
    if unknown := sorted(str(name) for name in values if name not in known or name == "preset"):
        raise ValueError(f"The preset sets {', '.join(unknown)}: no such flag; --help lists them, by the same names.")
    if nested := sorted(name for name, value in values.items() if isinstance(value, dict)):
        raise ValueError(f"The preset sets {', '.join(nested)} to a mapping; a flag has one value, or a list of them.")
    return {
        name: str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        for name, value in values.items()
    }
