"""Spectral conditioning of attention for Hugging Face Transformers.

Every query, key and value projection uses the effective weight `W + C`. Importing the package teaches the Auto classes
`from_pretrained(..., spectral_conditioning=True)`.
"""

from . import peft
from .auto import register
from .balance import BalanceReport, BalanceReports, OutputChangedError, balance, format_balance
from .callback import SpectralCallback
from .checkpoints import publishing
from .conditioning import (
    AttentionSpec,
    ProjectionReport,
    condition,
    fold,
    format_reports,
    refresh,
)
from .config import SpectralConfig
from .crammed_bert import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    CrammedBertModel,
)
from .version import __version__

register()
peft.register()
publishing.register()

__all__ = [
    "AttentionSpec",
    "BalanceReport",
    "BalanceReports",
    "CrammedBertConfig",
    "CrammedBertForMaskedLM",
    "CrammedBertForSequenceClassification",
    "CrammedBertForTokenClassification",
    "CrammedBertModel",
    "OutputChangedError",
    "ProjectionReport",
    "SpectralCallback",
    "SpectralConfig",
    "__version__",
    "balance",
    "condition",
    "fold",
    "format_balance",
    "format_reports",
    "refresh",
]
