"""Seeing whether attention is well conditioned, saturated or fine."""

from .advice import Advice, advise
from .capture import CapturedAttention, capture
from .estimate import JacobianEstimate, estimate_jacobian
from .heads import AttentionHead
from .indicator import Indicator, jacobian_indicator, softmax_jacobian_extremes
from .jacobian import JacobianSpectrum, NotConvergedError, jacobian_spectrum
from .monitor import SpectralMonitor
from .report import Diagnosis, JacobianRow, diagnose, write_report, write_training_report
from .saturation import GradientNorms, Saturation, attention_entropy, gradient_norms, saturation
from .spectra import FullSpectrum, ProjectionSpectra, effective_rank, spectra
from .tracing import TracedAttention, trace_attention

__all__ = [
    "Advice",
    "AttentionHead",
    "CapturedAttention",
    "Diagnosis",
    "FullSpectrum",
    "GradientNorms",
    "Indicator",
    "JacobianEstimate",
    "JacobianRow",
    "JacobianSpectrum",
    "NotConvergedError",
    "ProjectionSpectra",
    "Saturation",
    "SpectralMonitor",
    "TracedAttention",
    "advise",
    "attention_entropy",
    "capture",
    "diagnose",
    "effective_rank",
    "estimate_jacobian",
    "gradient_norms",
    "jacobian_indicator",
    "jacobian_spectrum",
    "saturation",
    "softmax_jacobian_extremes",
    "spectra",
    "trace_attention",
    "write_report",
    "write_training_report",
]
