"""Seeing whether attention is well conditioned, saturated or fine."""

import importlib
from typing import TYPE_CHECKING, Any

from .advice import Advice, advise
from .capture import CapturedAttention, capture
from .head_products import HeadProducts, head_products, value_path
from .heads import AttentionHead
from .indicator import Indicator, jacobian_indicator, softmax_jacobian_extremes
from .jacobian import JacobianSpectrum, NotConvergedError, jacobian_spectrum
from .saturation import GradientNorms, Saturation, attention_entropy, gradient_norms, saturation
from .spectra import FullSpectrum, ProjectionSpectra, effective_rank, spectra

if TYPE_CHECKING:
    from .attention_report import Diagnosis, JacobianRow, diagnose, write_report, write_training_report
    from .monitor import SpectralMonitor

# Public name -> its module, imported when the name is first used: the monitor brings the Trainer's callbacks, and PEFT.
_HOMES = {
    "Diagnosis": "attention_report",
    "JacobianRow": "attention_report",
    "SpectralMonitor": "monitor",
    "diagnose": "attention_report",
    "write_report": "attention_report",
    "write_training_report": "attention_report",
}

__all__ = [
    "Advice",
    "AttentionHead",
    "CapturedAttention",
    "Diagnosis",
    "FullSpectrum",
    "GradientNorms",
    "HeadProducts",
    "Indicator",
    "JacobianRow",
    "JacobianSpectrum",
    "NotConvergedError",
    "ProjectionSpectra",
    "Saturation",
    "SpectralMonitor",
    "advise",
    "attention_entropy",
    "capture",
    "diagnose",
    "effective_rank",
    "gradient_norms",
    "head_products",
    "jacobian_indicator",
    "jacobian_spectrum",
    "saturation",
    "softmax_jacobian_extremes",
    "spectra",
    "value_path",
    "write_report",
    "write_training_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
