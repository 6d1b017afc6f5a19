"""How much the outputs on a small probe batch change, compared with the error of the dtype itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import OutputChangedError
from ..config import SpectralConfig
from ..layers import HALF_PRECISION, SpectralLayer, correction_matrix, spectral_layers
from ..model_outputs import OutputChange, measured_tolerance, output_change, probe_batch, probe_outputs
from ..projections import find_projections


@dataclass(frozen=True)
class Comparison:
    """The outputs on the probe afterward, compared with those before.

    Attributes:
        absolute: the greatest difference.
        relative: the same relative to the greatest value of the tensor.
        dtype_error: the relative change of the original outputs when the same weights compute in float64; None if it
        was not measured.
        tolerance: the greatest relative change that was allowed; None if the function was meant to change.
    """

    absolute: float
    relative: float
    dtype_error: float | None
    tolerance: float | None

    def describe(self) -> str:
        """One line."""
        line = f"Largest change of an output on the probe: {self.absolute:.2g}, relative {self.relative:.2g}"
        if self.tolerance is None:
            return f"{line}. The function has changed: train the model before use."
        measured = "" if self.dtype_error is None else f", the dtype's own error is {self.dtype_error:.2g}"
        return f"{line} (allowed {self.tolerance:.2g}{measured})."


class Probe:
    """The outputs of a model on a small random batch, kept to compare with.

    Args:
        model: a transformers model, in eval mode.
        keeps_function: whether what follows may change the outputs by no more than the dtype's tolerance, which is measured.

    Raises:
        ValueError: where no batch can be made, or the model cannot run on it.
    """

    def __init__(self, model: Any, keeps_function: bool):
        self.batch = make_batch(model)
        self.before = probe_outputs(model, self.batch)
        if broken := [name for name, value in self.before.items() if value.isnan().any()]:
            raise ValueError(
                f"{', '.join(broken)} of {type(model).__name__} has nan on the probe; check the checkpoint."
            )
        self.tolerance: float | None = None
        self.dtype_error: float | None = None
        if keeps_function:
            self.tolerance, self.dtype_error = measured_tolerance(model, self.batch, self.before, model.dtype)

    def compare(self, model: nn.Module, what: str) -> Comparison:
        """The outputs now.

        Args:
            what: what was done, for the error.

        Raises:
            OutputChangedError: if they changed by more than the tolerance.
        """
        change = output_change(self.before, probe_outputs(model, self.batch))
        if self.tolerance is not None and not change.relative <= self.tolerance:  # nan included
            raise self._too_large(change, what, next(model.parameters()).dtype)
        return Comparison(change.absolute, change.relative, self.dtype_error, self.tolerance)

    def _too_large(self, change: OutputChange, what: str, dtype: torch.dtype) -> OutputChangedError:
        assert self.tolerance is not None
        measured = "" if self.dtype_error is None else f", of which the dtype's own error is {self.dtype_error:.2g}"
        return OutputChangedError(
            f"{what} would change the outputs by {change.relative:.2g} relative to the greatest "
            f"({change.absolute:.2g} absolute), more than the tolerance of {self.tolerance:.2g}{measured}. Nothing "
            f"was written. Rounding to {dtype} loses too much: write a wider type (--dtype {_wider(dtype)}), or "
            "choose a smaller lambda.",
            change,
            self.tolerance,
        )


def _wider(dtype: torch.dtype) -> str:
    return "float64" if dtype == torch.float32 else "float32"


def make_batch(model: Any) -> Mapping[str, Tensor]:
    """As `model_outputs.probe_batch`, in the shape that multiple choice takes too."""
    batch = probe_batch(model)
    if type(model).__name__.endswith("ForMultipleChoice"):
        batch = {name: value.reshape(1, 2, -1) for name, value in batch.items()}
    return batch


class Diagonals:
    """How much of W's diagonal survives the sum with `lambda * I`, which in half precision rounds it away.

    Args:
        model: stock, about to be conditioned with `spectral` and `init="preserve"`; or conditioned, about to be folded.
        spectral: None for a conditioned model.
    """

    def __init__(self, model: nn.Module, spectral: SpectralConfig | None = None):
        self.entries: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        present = next((layer.spectral for _, layer in spectral_layers(model)), spectral)
        self.output = present is not None and "output" in present.targets
        for item in find_projections(model, output=self.output):
            module = item.module
            settings = module.spectral if isinstance(module, SpectralLayer) else spectral
            if settings is None or settings.method != "identity" or module.weight.dtype not in HALF_PRECISION:
                continue
            matrix = item.orient(module.weight.detach())
            correction = correction_matrix(matrix, item.layout, settings)
            touched = correction.nonzero()
            rows, columns = touched[:, 0], touched[:, 1]
            self.entries[item.name] = (touched, matrix[rows, columns].float(), correction[rows, columns].float())

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float | None:
        """Mean error of the entries of W that can be recovered from the model, relative to their mean size.

        Preserved weights are W - C, folded ones W + C. None where nothing is rounded.
        """
        errors = []
        for item in find_projections(model, output=self.output):
            if item.name not in self.entries:
                continue
            touched, before, correction = self.entries[item.name]
            now = item.orient(item.module.weight.detach())[touched[:, 0], touched[:, 1]].float()
            sign = 1 if isinstance(item.module, SpectralLayer) else -1
            errors.append(((now + sign * correction - before).abs().mean() / before.abs().mean()).item())
        return sum(errors) / len(errors) if errors else None
