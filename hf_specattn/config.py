"""The one settings object of spectral conditioning."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

PROJECTIONS = ("query", "key", "value")
TARGETS = (*PROJECTIONS, "output")
METHODS = ("identity", "svd")
GRANULARITIES = ("projection", "head")
INITS = ("additive", "preserve")

# The paper's setting ("Implementation" in section 3.3 and the ablation in table 5). Small models often need less: with
# layer-normed inputs, 10 on query and key saturates the softmax.
DEFAULT_LAMBDA = 10.0


@dataclass(frozen=True)
class SpectralConfig:
    """What correction `C` is added to which projection weights: the effective weight is `W + C`.

    Args:
        method: `"identity"` is `C = lambda_ * I_k`, ones on the main diagonal (Theorem 3.8 of arXiv 2603.07162, the
            paper's default); `"svd"` is `C = sigma_max(W) * U V^T`, which makes the condition number of `W + C` at most
            2 when it is computed (Theorem 3.5).
        lambda_: for identity a number > 0, or a mapping from each of `targets` to such a number; None resolves to 10,
            the paper's (small models needed 0.3 to 1: docs/evidence.md). For svd it must be None, because the method has
            no such parameter.
        targets: the projections to condition, a non-empty subset of `("query", "key", "value", "output")`; the paper's are
            the first three. W_O takes the same corrections: what counts for the signal is `W_O W_V` of each head.
        granularity: `"projection"` uses one `C` for the whole `(heads * head_dim, in_features)` weight, `"head"` one
            for each head's `(head_dim, in_features)` block, or `(out_features, head_dim)` columns of W_O.
        refresh_every: None keeps `C` fixed. With n >= 1 (svd only) it has to be recomputed every n optimizer steps:
        add [`SpectralCallback`] to the Trainer, or call [`refresh`] in your own loop. If neither happens, the
        optimizer step raises an error after 2 n steps.

    Raises:
        ValueError: for a value outside these sets; the message says what is allowed.
    """

    method: str = "identity"
    lambda_: float | Mapping[str, float] | None = field(default=None, hash=False)
    targets: tuple[str, ...] = PROJECTIONS
    granularity: str = "projection"
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        object.__setattr__(self, "targets", checked_targets(self.targets))
        object.__setattr__(self, "lambda_", self._checked_lambda())
        self._check_refresh_every()

    def _checked_lambda(self) -> float | dict[str, float] | None:
        if self.method == "svd":
            if self.lambda_ is not None:
                raise ValueError(
                    f"lambda_={self.lambda_!r} means nothing to method='svd', whose correction scales with W; leave "
                    "lambda_ out (None), or use method='identity'."
                )
            return None
        if self.lambda_ is None:
            return DEFAULT_LAMBDA
        if not isinstance(self.lambda_, Mapping):
            return _positive_number("lambda_", self.lambda_)
        if set(self.lambda_) != set(self.targets):
            raise ValueError(
                f"lambda_ has the keys {sorted(map(str, self.lambda_))}, but they must equal the targets "
                f"{sorted(self.targets)}; give one number for each target, or change the targets."
            )
        return {name: _positive_number(f"lambda_[{name!r}]", self.lambda_[name]) for name in self.targets}

    def _check_refresh_every(self) -> None:
        value = self.refresh_every
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"refresh_every={value!r} is not allowed; give an integer >= 1, or None to keep C fixed.")
        if self.method != "svd":
            raise ValueError(
                f"refresh_every={value} means nothing to method={self.method!r}, whose correction does not depend on "
                "W; leave it out (None), or use method='svd'."
            )

    @property
    def dynamic(self) -> bool:
        """Whether `C` follows `W` during training."""
        return self.refresh_every is not None

    def lambda_for(self, projection: str) -> float | None:
        """lambda of one projection; None if it is not a target, or the method has no lambda."""
        if projection not in self.targets or self.lambda_ is None:
            return None
        return self.lambda_[projection] if isinstance(self.lambda_, Mapping) else self.lambda_

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `SpectralConfig(**config.to_dict())` gives an equal config."""
        return asdict(self) | {"targets": list(self.targets)}

    def describe(self) -> str:
        """One short line for `extra_repr`, logs and reports, such as `identity(lambda_=10.0)`."""
        parts = [] if self.lambda_ is None else [f"lambda_={self.lambda_}"]
        if self.granularity != "projection":
            parts.append(f"granularity={self.granularity}")
        if self.dynamic:
            parts.append(f"refresh_every={self.refresh_every}")
        return f"{self.method}({', '.join(parts)})"


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that names `value` and what is allowed, unless it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}.")


def checked_targets(targets: Any) -> tuple[str, ...]:
    """`targets` in the usual order.

    Raises:
        ValueError: for anything but a non-empty collection of different projections.
    """
    if isinstance(targets, (str, Mapping)) or not hasattr(targets, "__iter__"):
        raise ValueError(f"targets={targets!r} must be a sequence of names, such as ('query', 'key').")
    names = list(targets)
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise ValueError(f"targets={tuple(names)!r} must be a non-empty subset of {TARGETS}.")
    if len(set(names)) != len(names):
        raise ValueError(f"targets={tuple(names)!r} names a projection twice.")
    return tuple(name for name in TARGETS if name in names)


def is_positive_number(value: Any) -> bool:
    """Whether a value is a finite number > 0."""
    # bool is a Real, and True would silently mean 1.
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # an integer beyond floats
        return False


def _positive_number(name: str, value: Any) -> float:
    if not is_positive_number(value):
        raise ValueError(
            f"{name}={value!r} is not allowed; give a finite number > 0 (the paper's is 10; small models often need "
            "about 1), or a mapping from each target to such a number."
        )
    return float(value)
