"""Resuming under transformers' Trainer, which loads weights into the model that it has and compares no configuration."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compat_extras import when_imported
from .config_fields import FIELDS, MODEL_TYPE_PREFIX, TRAINING_FIELDS
from .loading import stored_config
from .modeling import SpectralConfigMixin


def register() -> None:
    """Let the Trainer compare, at once if it is imported, otherwise as soon as somebody imports it. Idempotent."""
    when_imported("transformers.trainer", _prepare_trainer)


@functools.cache
def _prepare_trainer() -> None:
    trainer: Any = importlib.import_module("transformers.trainer")
    trainer.Trainer.train = _checked(trainer.Trainer.train, trainer.get_last_checkpoint)


def _checked(train: Callable[..., Any], last_checkpoint: Callable[[str], str | None]) -> Callable[..., Any]:
    @functools.wraps(train)
    def checked(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if folder:
            refuse_other_settings(self.model, folder)
        return train(self, resume_from_checkpoint, *args, **kwargs)

    return checked


def refuse_other_settings(model: Any, checkpoint: str | Path) -> None:
    """Refuse to go on from a checkpoint with a model that is conditioned otherwise: it would compute another function.

    Raises:
        ValueError: naming the setting.
    """
    config, stored = getattr(model, "config", None), stored_config(checkpoint, {})
    if not stored:  # of an adapter
        return
    was = str(stored.get("model_type", "")).startswith(MODEL_TYPE_PREFIX)
    if not was and not isinstance(config, SpectralConfigMixin):
        return
    for name in FIELDS:
        before, now = stored.get(name), vars(config).get(name)
        if name not in TRAINING_FIELDS and before != now:
            raise ValueError(
                f"{checkpoint} was trained with {name}={before!r}, and the model to continue with has {name}={now!r}: "
                "the trained weights would compute another function. Make the model with the settings of the checkpoint "
                f"(AutoConfig.from_pretrained({str(checkpoint)!r})), or start without resume_from_checkpoint."
            )
