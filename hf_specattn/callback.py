"""Dynamic corrections under transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .conditioning import refresh, refresh_interval


class SpectralCallback(TrainerCallback):
    """Recompute the svd corrections of a model conditioned with `refresh_every`, after every so many optimizer steps.

    For `Trainer(..., callbacks=[SpectralCallback()])`. It does nothing to models without dynamic corrections.

    Args:
        exact: whether by an SVD or by matrix products, as [`refresh`] has it; None lets the device decide.
    """

    def __init__(self, exact: bool | None = None) -> None:
        self.exact = exact

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refresh where the number of optimizer steps is a multiple of the model's `refresh_every`."""
        model = kwargs["model"]
        interval = refresh_interval(model)
        if interval is not None and state.global_step % interval == 0:
            refresh(model, exact=self.exact)
