"""Command-line arguments that every training script has."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.tracking import get_available_trackers
from transformers import HfArgumentParser

from hf_specattn.config import INITS, TARGETS, SpectralConfig, check_choice
from hf_specattn.preconditioner import AXES, GRADIENTS, SCALES, PreconditionerConfig

from .command_line import flag

AUTO = "auto"  # of --lambda_


@dataclass
class SpectralArguments:
    """The flags of spectral conditioning; without `--spectral_conditioning` none of the others may be given.

    Raises:
        ValueError: for values that `SpectralConfig` refuses, with what is allowed.
    """

    spectral_conditioning: bool = flag(False, "Add the spectral correction C to the query, key and value weights.")
    lambda_: str | None = flag(
        None,
        "Strength of the identity correction: a number; one per target, such as query=10,key=10; or auto: 10, or the "
        "largest value below it at which no layer's softmax is saturated on the first samples. Default: auto in "
        "training, 10 for GLUE.",
    )
    spectral_method: str | None = flag(None, "identity (default) or svd.", ["identity", "svd"])
    spectral_targets: list[str] | None = flag(None, "The projections to condition (query, key, value).", TARGETS)
    spectral_granularity: str | None = flag(
        None, "One C per projection (default) or per head.", ["projection", "head"]
    )
    spectral_refresh_every: int | None = flag(
        None, "Recompute svd corrections every this many optimizer steps. None: never."
    )
    spectral_exact_refresh: bool | None = flag(
        None, "Refresh by an SVD (True) or by matrix products, checked (False). None: products on a GPU, SVD on a CPU."
    )
    spectral_init: str | None = flag(
        None,
        "additive (default): W stays, so the function changes; preserve: W becomes W - C, so the function stays.",
        INITS,
    )

    # The lambda that auto found in a run.
    found_lambda: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        given = [name for name, value in self._settings().items() if value is not None]
        if given and not self.spectral_conditioning:
            flags = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"{flags} given without --spectral_conditioning; add that flag, or leave {flags} out.")
        config = self.to_config()  # refuses bad values before any work
        check_choice("spectral_init", self.init, INITS)
        if self.is_automatic and config is not None and config.method != "identity":
            raise ValueError(f"--lambda_ {AUTO}: of the identity correction; leave it out for {config.method}.")
        if self.spectral_exact_refresh is not None and (config is None or not config.dynamic):
            raise ValueError(
                f"--spectral_exact_refresh {self.spectral_exact_refresh} says how corrections are recomputed, and without "
                "--spectral_refresh_every they are not; add that flag, or leave this one out."
            )
        if config is not None and config.dynamic and self.init == "preserve":
            raise ValueError(
                "--spectral_init preserve keeps the function for a fixed C only, so it excludes "
                f"--spectral_refresh_every {self.spectral_refresh_every}; leave out one of the two."
            )

    @property
    def init(self) -> str:
        """How weights enter, for `condition`."""
        return "additive" if self.spectral_init is None else self.spectral_init

    @property
    def is_automatic(self) -> bool:
        """Whether lambda is to be found, or was."""
        return self.lambda_ == AUTO

    def find_lambda_by_default(self) -> None:
        """Take auto for the identity correction where the command line names no lambda."""
        identity = self.spectral_conditioning and self.spectral_method in (None, "identity")
        if identity and self.init == "additive" and self.lambda_ is None:
            self.lambda_ = AUTO

    def to_config(self) -> SpectralConfig | None:
        """Return the settings for `condition`, or None without `--spectral_conditioning`; with the lambda that was found."""
        if not self.spectral_conditioning:
            return None
        settings: dict[str, Any] = {
            "method": self.spectral_method,
            "lambda_": self.found_lambda if self.is_automatic else parse_lambda(self.lambda_),
            "targets": self.spectral_targets,
            "granularity": self.spectral_granularity,
            "refresh_every": self.spectral_refresh_every,
        }
        return SpectralConfig(**{name: value for name, value in settings.items() if value is not None})

    def describe(self) -> str | None:
        """The settings in words; None without `--spectral_conditioning`."""
        config = self.to_config()
        if config is None:
            return None
        automatic = self.is_automatic and self.found_lambda is None
        found_later = " or below (auto: found on the first samples)" if automatic else ""
        return f"{config.describe()}{found_later}, init {self.init}"

    def to_loading_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for `from_pretrained`; empty without `--spectral_conditioning`."""
        if not self.spectral_conditioning:
            return {}
        given = {name: value for name, value in self._settings().items() if value is not None}
        given.pop("spectral_exact_refresh", None)  # for `refresh`: the model's function does not depend on it
        given["lambda_"] = self.found_lambda if self.is_automatic else parse_lambda(self.lambda_)
        if given["lambda_"] is None:
            del given["lambda_"]
        return {"spectral_conditioning": True, **given}

    def _settings(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("spectral_conditioning", "found_lambda")
        }


@dataclass
class PreconditionerArguments:
    """The flags of preconditioned attention; without `--attention_preconditioner` none of the others may be given."""

    attention_preconditioner: str | None = flag(
        None,
        "Divide each head's output by its norms before the output projection: row (each position by its norm "
        "over the channels) or column. None: do not.",
        AXES,
    )
    preconditioner_gradient: str | None = flag(
        None, "Take the norms for constants (detached, default) or differentiate them (through).", GRADIENTS
    )
    preconditioner_scale: str | None = flag(
        None,
        "The norm afterwards: unit (1, default), rms (entries of size 1) or match (the mean norm at the start).",
        SCALES,
    )
    preconditioner_eps: float | None = flag(None, "Smaller norms count as this (1e-6).")

    def preconditioner(self) -> PreconditionerConfig | None:
        """The settings for `precondition`; None without `--attention_preconditioner`.

        Raises:
            ValueError: for values that cannot be.
        """
        settings = {name: getattr(self, f"preconditioner_{name}") for name in ("gradient", "scale", "eps")}
        given = {name: value for name, value in settings.items() if value is not None}
        if self.attention_preconditioner is not None:
            return PreconditionerConfig(self.attention_preconditioner, **given)
        if given:
            flags = ", ".join(f"--preconditioner_{name}" for name in given)
            raise ValueError(f"{flags} given without --attention_preconditioner; add that flag, or leave {flags} out.")
        return None

    def describe_preconditioner(self) -> str | None:
        """The same in words."""
        settings = self.preconditioner()
        return None if settings is None else f"preconditioner {settings.describe()}"


def parse_lambda(text: str | None) -> float | dict[str, float] | None:
    """Read `--lambda_`: a number such as `10`, or one per projection such as `query=10,key=2.5`; None for auto.

    Raises:
        ValueError: for other text, and for a projection that is named twice.
    """
    if text is None or text == AUTO:
        return None
    return parse_numbers(text, "lambda_", ("10", "query=10,key=2.5", AUTO))


def parse_numbers(text: str, flag: str, examples: Sequence[str]) -> float | dict[str, float]:
    """Read a number, or one per projection; `examples` shows both forms, and the words that the flag also accepts.

    Raises:
        ValueError: for text of neither form, and for a repeated name.
    """
    pieces = [[piece.strip() for piece in part.partition("=")] for part in text.split(",")]
    try:
        if "=" not in text:
            return float(text)
        values = {name: float(value) for name, equals, value in pieces if name and equals}
    except ValueError:
        values = {}
    if len(values) < len(pieces):
        number, by_name, *words = examples
        raise ValueError(
            f"--{flag} {text!r} is neither a number, such as {number}, nor one number per projection, such as {by_name}"
            f"{''.join(f', nor {word}' for word in words)}."
        )
    return values


def check_bounds(arguments: Any, bounds: Iterable[tuple[str, float, float]]) -> None:
    """Raise ValueError for the first argument `(name, least, greatest)` that is out of range; infinities and nan are."""
    for name, low, high in bounds:
        # nan fails each comparison.
        if not low <= getattr(arguments, name) <= high:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least {low} and at most {high:.10g}.")


def check_heads(arguments: Any) -> None:
    """Raise ValueError for a new model's width that its attention heads do not divide."""
    if arguments.hidden_size % arguments.num_attention_heads:
        raise ValueError(
            f"--hidden_size {arguments.hidden_size} must be a multiple of --num_attention_heads "
            f"{arguments.num_attention_heads}."
        )


def refuse_unknown_trackers(report_to: Iterable[str] | None) -> None:
    """Raise ValueError for trackers of `--report_to` that accelerate does not find here."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := sorted(set(report_to or ()) - {*available, "all"}):
        raise ValueError(
            f"--report_to {' '.join(missing)}: unknown or not installed; available here: "
            f"{', '.join(available) or 'none'}."
        )


def explicitly_given(parser: HfArgumentParser, names: Iterable[str], argv: list[str]) -> set[str]:
    """Return which of the arguments `names` are on the command line, with any value."""
    absent = object()
    namespace, _ = parser.parse_known_args(argv, namespace=Namespace(**dict.fromkeys(names, absent)))
    return {name for name in names if getattr(namespace, name) is not absent}
