"""Seeing whether attention is well conditioned, saturated or fine."""

from .saturation import attention_entropy
from .spectra import ProjectionSpectra, spectra

__all__ = ["ProjectionSpectra", "attention_entropy", "spectra"]
