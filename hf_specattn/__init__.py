"""Spectral conditioning of attention for Hugging Face Transformers.

Every query, key and value projection uses the effective weight `W + C`. Importing the package teaches transformers
`from_pretrained(..., spectral_conditioning=True)`. Names are imported when they are first used, so that the import is light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto, peft
from .balance import balance  # at once: on its first import, the module of this name would take its place
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

# Public name -> the module that has it.
_HOMES = {
    "AttentionSpec": "conditioning",
    "BalanceReport": "balance",
    "BalanceReports": "balance",
    "CrammedBertConfig": "crammed_bert",
    "CrammedBertForMaskedLM": "crammed_bert",
    "CrammedBertForSequenceClassification": "crammed_bert",
    "CrammedBertForTokenClassification": "crammed_bert",
    "CrammedBertModel": "crammed_bert",
    "OutputChangedError": "balance",
    "ProjectionReport": "conditioning",
    "PreconditionReport": "preconditioning",
    "PreconditionerConfig": "preconditioner",
    "SpectralCallback": "callback",
    "SpectralConfig": "config",
    "condition": "conditioning",
    "fold": "conditioning",
    "format_balance": "balance",
    "format_preconditioning": "preconditioning",
    "format_reports": "conditioning",
    "initialize": "initialization",
    "precondition": "preconditioning",
    "refresh": "conditioning",
    "register_architecture": "auto",
}

auto.register()
peft.register()

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
