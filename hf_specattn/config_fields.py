"""The fields that a conditioned configuration has beside its stock ones: their names, the settings they mean, and refusals.

They are keyword arguments of `from_pretrained` and fields of config.json alike.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from .config import PROJECTIONS, TARGETS, SpectralConfig, is_positive_number
from .preconditioner import PreconditionerConfig

MODEL_TYPE_PREFIX = "specattn_"
FLAG = "spectral_conditioning"
SPECTRAL_FIELDS = (
    FLAG,
    "lambda_",
    "spectral_method",
    "spectral_targets",
    "spectral_granularity",
    "spectral_refresh_every",
)
PRECONDITIONER_FLAG = "attention_preconditioner"
# The flag is the axis. The last one is measured, never set by the user: the norms that `preconditioner_scale="match"`
# sets.
PRECONDITIONER_FIELDS = (
    PRECONDITIONER_FLAG,
    "preconditioner_gradient",
    "preconditioner_scale",
    "preconditioner_eps",
    "preconditioner_norms",
)
FIELDS = (*SPECTRAL_FIELDS, *PRECONDITIONER_FIELDS)  # preconditioner_norms is the last
SIMILAR = 0.8  # to a field: difflib's ratio of a name that is a misspelled one
# Fields that say how training continues, not what the loaded function is; they may differ from the checkpoint's.
TRAINING_FIELDS = ("spectral_refresh_every",)


def spectral_settings(fields: Mapping[str, Any]) -> SpectralConfig:
    """The settings among keyword arguments or the fields of a configuration, by the names that those have."""
    return SpectralConfig(
        fields.get("spectral_method", "identity"),
        fields.get("lambda_"),
        fields.get("spectral_targets", PROJECTIONS),
        fields.get("spectral_granularity", "projection"),
        fields.get("spectral_refresh_every"),
    )


def preconditioner_settings(fields: Mapping[str, Any]) -> PreconditionerConfig | None:
    """The preconditioner among keyword arguments or the fields of a configuration; None where none is asked for.

    Raises:
        ValueError: for bad values, and for its other fields without the flag.
    """
    names = {name: name.removeprefix("preconditioner_") for name in PRECONDITIONER_FIELDS[1:-1]}
    given = {names[name]: fields[name] for name in names if name in fields}
    axis = fields.get(PRECONDITIONER_FLAG)
    if axis is not None and axis is not False:
        return PreconditionerConfig(axis, **given)
    if stray := [name for name in PRECONDITIONER_FIELDS[1:] if fields.get(name) is not None]:
        raise ValueError(
            f"{stray[0]}={fields[stray[0]]!r} does nothing without attention_preconditioner='row' or 'column'; add it, or "
            f"leave {stray[0]} out."
        )
    return None


def checked_norms(norms: Any, preconditioner: PreconditionerConfig) -> list[float]:
    """The norms to match as a list of numbers.

    Raises:
        ValueError: unless they are what [`precondition`] measures.
    """
    numbers = list(norms) if isinstance(norms, (list, tuple)) else []
    if preconditioner.scale != "match" or not numbers or not all(is_positive_number(norm) for norm in numbers):
        raise ValueError(
            f"preconditioner_norms={norms!r} must be a list of finite numbers > 0, one for each attention, and belongs to "
            "preconditioner_scale='match'. It is measured by hf_specattn.precondition, not set by hand."
        )
    return [float(norm) for norm in numbers]


def refuse_misspelt(fields: Mapping[str, Any], stock: type[PretrainedConfig], with_init: bool = False) -> None:
    """Refuse names that can only be meant for one of our fields: a configuration silently keeps, or drops, any name.

    Args:
        fields: keyword arguments, or the fields of a config.json.
        stock: the stock configuration class, whose own fields may be called anything.
        with_init: accept `spectral_init`, which is an argument of `from_pretrained` and not a field.

    Raises:
        ValueError: naming what is meant.
    """
    for name, value in fields.items():
        if name in FIELDS or hasattr(stock, name) or (with_init and name == "spectral_init"):
            continue
        if name == "spectral_init":
            raise ValueError(
                f"spectral_init={value!r} is an argument of a model's from_pretrained, not a field of a "
                "configuration: it says how the weights of a stock checkpoint enter, and would be applied again on "
                "each loading. Leave it out here."
            )
        small = name.lower()
        parts = (small, small.removeprefix("spectral_").removeprefix("preconditioner_"))
        close = [found for part in parts for found in difflib.get_close_matches(part, FIELDS, 1, SIMILAR)]
        if close or small == "spectral" or small.startswith(("spectral_", "preconditioner_")):
            meant = f"Did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{name}={value!r} is not a field of conditioning. {meant}The fields are {', '.join(FIELDS)}."
            )


def refuse_lost_fields(config_dict: Mapping[str, Any]) -> None:
    """Every saved configuration has all fields of the methods it uses, so one that lacks some was edited or is damaged."""
    needed = () if config_dict.get(FLAG) is False else SPECTRAL_FIELDS
    if config_dict.get(PRECONDITIONER_FLAG):
        matched = config_dict.get("preconditioner_scale") == "match"
        needed = (*needed, *(PRECONDITIONER_FIELDS if matched else PRECONDITIONER_FIELDS[:-1]))
    if lost := [name for name in needed if name not in config_dict]:
        raise ValueError(
            f"The configuration has model_type={config_dict['model_type']!r} and lacks {', '.join(lost)}, which "
            "save_pretrained writes: config.json was edited, or is damaged. Restore it from its source."
        )


def refuse_other_settings(config_dict: dict[str, Any], given: dict[str, Any]) -> None:
    """A conditioned checkpoint loads as it was trained: another correction would change the function."""
    _refuse_other_preconditioner(config_dict, given)
    is_conditioned = config_dict.get(FLAG, True)
    if not is_conditioned:
        asked_for = [name for name in SPECTRAL_FIELDS if given.get(name) not in (None, False)]
        if asked_for:
            raise ValueError(
                f"{asked_for[0]}={given[asked_for[0]]!r}: this checkpoint was trained with a preconditioner and no spectral "
                "conditioning. Load it as it is, then hf_specattn.condition(model, SpectralConfig(...))."
            )
        return
    if given.get("spectral_conditioning", True) not in (True, None):
        raise ValueError(
            f"spectral_conditioning={given['spectral_conditioning']!r}: this checkpoint was trained with spectral "
            "conditioning, and its weights without the corrections compute something else. Load it as it is, call "
            "hf_specattn.fold(model) and save it: that is the same model as a stock checkpoint."
        )
    stored = _comparable({name: config_dict[name] for name in SPECTRAL_FIELDS if name in config_dict})
    for name, wanted in given.items():
        if name in TRAINING_FIELDS or name == "spectral_conditioning" or name not in SPECTRAL_FIELDS:
            continue
        asked = _comparable({**{key: config_dict[key] for key in SPECTRAL_FIELDS if key in config_dict}, name: wanted})
        if asked != stored:
            raise ValueError(
                f"{name}={wanted!r}, but this checkpoint was trained with {name}={config_dict.get(name)!r} and loads as it "
                "was trained. To change it: load it as it is, hf_specattn.fold(model), then hf_specattn.condition(model, "
                "SpectralConfig(...)) again."
            )


def _refuse_other_preconditioner(config_dict: dict[str, Any], given: dict[str, Any]) -> None:
    stored = {name: config_dict.get(name) for name in PRECONDITIONER_FIELDS}
    for name in PRECONDITIONER_FIELDS:
        if name in given and (given[name] or None) != stored[name]:
            trained = f"{name}={stored[name]!r}" if stored[PRECONDITIONER_FLAG] else "no preconditioner"
            way_out = (
                "its weights without it compute something else, and fold does not remove it; start from the stock "
                "model"
                if stored[PRECONDITIONER_FLAG]
                else "load it as it is, then hf_specattn.precondition(model, PreconditionerConfig(...))"
            )
            raise ValueError(
                f"{name}={given[name]!r}, but this checkpoint was trained with {trained} and loads as it was trained. To "
                f"change it: {way_out}."
            )


def _comparable(fields: dict[str, Any]) -> tuple[Any, ...] | None:
    try:
        spectral = spectral_settings({**fields, "spectral_refresh_every": None})
    except ValueError:  # such as the checkpoint's lambda_ with another method: settings that no checkpoint has
        return None
    return (spectral.method, spectral.targets, spectral.granularity, [spectral.lambda_for(p) for p in TARGETS])


def refuse_stored_fields(config_dict: Mapping[str, Any], names: Sequence[str] = FIELDS) -> None:
    """Refuse our fields in the configuration of a stock type: no file says whether its weights are W or W + C.

    Args:
        config_dict: the fields of a config.json.
        names: those that can only mean conditioning: other people's classes may have a `lambda_`.

    Raises:
        ValueError: unless they are absent, or the flag alone says no.
    """
    stored = {name: config_dict[name] for name in names if name in config_dict}
    if all(name in (FLAG, PRECONDITIONER_FLAG) and not value for name, value in stored.items()):
        return
    raise ValueError(
        f"The configuration has model_type={config_dict.get('model_type')!r}, which is not conditioned, and "
        f"{', '.join(f'{name}={value!r}' for name, value in stored.items())}: a stock class wrote it, or somebody "
        "edited it. If the weights are those of a stock model, remove these fields from config.json, and pass "
        "spectral_conditioning=True (or attention_preconditioner) to from_pretrained to condition them. If they were "
        "trained with corrections (a stock class opened a conditioned checkpoint and saved it), they are W without "
        "C: go back to the conditioned checkpoint, or to hf_specattn.fold(model) of it."
    )
