"""Seeing whether attention is well conditioned, saturated or fine."""

from .saturation import attention_entropy
from .spectra import FullSpectrum, ProjectionSpectra, effective_rank, spectra

__all__ = ["FullSpectrum", "ProjectionSpectra", "attention_entropy", "effective_rank", "spectra"]
