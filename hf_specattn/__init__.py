"""Spectral conditioning of attention for Hugging Face Transformers.

Every query, key and value projection uses the effective weight `W + C`. Importing the package makes
`from_pretrained(..., spectral_conditioning=True)` work in transformers. Names are imported when they are first used,
which keeps the import light.
"""

from typing import TYPE_CHECKING

from . import auto, peft, resuming
from .balance import balance  # at once: on its first import, the module of this name would take its place
from .lazy_names import lazy_names
from .version import __version__

if TYPE_CHECKING:
    from .auto import register_architecture
    from .balance import BalanceReport, BalanceReports, OutputChangedError, format_balance
    from .callback import SpectralCallback
    from .conditioning import AttentionSpec, ProjectionReport, condition, fold, format_reports, refresh
    from .config import SpectralConfig
    from .crammed_bert import (
        CrammedBertConfig,
        CrammedBertForMaskedLM,
        CrammedBertForSequenceClassification,
        CrammedBertForTokenClassification,
        CrammedBertModel,
    )
    from .initialization import initialize
    from .preconditioner import PreconditionerConfig
    from .preconditioning import PreconditionReport, format_preconditioning, precondition

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "auto": ["register_architecture"],
        "balance": ["BalanceReport", "BalanceReports", "OutputChangedError", "format_balance"],
        "callback": ["SpectralCallback"],
        "conditioning": ["AttentionSpec", "ProjectionReport", "condition", "fold", "format_reports", "refresh"],
        "config": ["SpectralConfig"],
        "crammed_bert": [
            "CrammedBertConfig",
            "CrammedBertForMaskedLM",
            "CrammedBertForSequenceClassification",
            "CrammedBertForTokenClassification",
            "CrammedBertModel",
        ],
        "initialization": ["initialize"],
        "preconditioner": ["PreconditionerConfig"],
        "preconditioning": ["PreconditionReport", "format_preconditioning", "precondition"],
    },
)

auto.register()
peft.register()
resuming.register()

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
    "PreconditionReport",
    "PreconditionerConfig",
    "ProjectionReport",
    "SpectralCallback",
    "SpectralConfig",
    "__version__",
    "balance",
    "condition",
    "fold",
    "format_balance",
    "format_preconditioning",
    "format_reports",
    "initialize",
    "precondition",
    "refresh",
    "register_architecture",
]
