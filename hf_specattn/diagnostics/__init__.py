"""Seeing whether attention is well conditioned, saturated or fine."""

from .advice import Advice, advise
from .capture import CapturedAttention, capture
from .heads import AttentionHead
from .indicator import Indicator, jacobian_indicator, softmax_jacobian_extremes
from .jacobian import JacobianSpectrum, NotConvergedError, jacobian_spectrum
from .monitor import SpectralMonitor
from .report import Diagnosis, JacobianRow, diagnose, write_report, write_training_report
from .saturation import GradientNorms, Saturation, attention_entropy, gradient_norms, saturation
from .spectra import FullSpectrum, ProjectionSpectra, effective_rank, spectra

__all__ = [
    "Advice",
    "AttentionHead",
    "CapturedAttention",
    "Diagnosis",
    "FullSpectrum",
    "GradientNorms",
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
    "jacobian_indicator",
    "jacobian_spectrum",
    "saturation",
    "softmax_jacobian_extremes",
    "spectra",
    "write_report",
    "write_training_report",
]
