"""Dynamic corrections with transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .conditioning import refresh, refresh_interval


class SpectralCallback(TrainerCallback):
    """Recompute the svd corrections of a model every `refresh_every` optimizer steps.

    Use it as `Trainer(..., callbacks=[SpectralCallback()])`. It does nothing to models without dynamic corrections.

    Args:
        exact: whether to use an SVD or matrix products, as in [`refresh`]; None lets the device decide.
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
