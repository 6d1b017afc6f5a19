"""Seeing whether attention is well conditioned, saturated or fine."""

from .estimate import JacobianEstimate, estimate_jacobian
from .heads import AttentionHead
from .indicator import Indicator, jacobian_indicator, softmax_jacobian_extremes
from .jacobian import JacobianSpectrum, NotConvergedError, jacobian_spectrum
from .saturation import attention_entropy
from .spectra import FullSpectrum, ProjectionSpectra, effective_rank, spectra

__all__ = [
    "AttentionHead",
    "FullSpectrum",
    "Indicator",
    "JacobianEstimate",
    "JacobianSpectrum",
    "NotConvergedError",
    "ProjectionSpectra",
    "attention_entropy",
    "effective_rank",
    "estimate_jacobian",
    "jacobian_indicator",
    "jacobian_spectrum",
    "softmax_jacobian_extremes",
    "spectra",
]
