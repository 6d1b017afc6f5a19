"""Seeing whether attention is well conditioned, saturated or fine."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names
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

# Later: the monitor brings the Trainer's callbacks, and PEFT.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "attention_report": ["Diagnosis", "JacobianRow", "diagnose", "write_report", "write_training_report"],
        "monitor": ["SpectralMonitor"],
    },
)

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
