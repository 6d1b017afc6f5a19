"""How query, key, value and output are initialized in a run: the flags of `hf_specattn.initialize`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_specattn.config import PROJECTIONS, TARGETS, SpectralConfig
from hf_specattn.initialization import INITIALIZATIONS, Initialization, initialize
from hf_specattn.layers import correction_matrix
from hf_specattn.projections import find_projections

from .command_line import flag
from .spectral_arguments import SpectralArguments, parse_numbers

STOCK = "stock"  # of --match_norm_of
# Names of the flags.
INITIALIZATION_SETTINGS = ("projection_init", "projection_init_targets", "initialization_scale", "match_norm_of")


@dataclass
class InitializationArguments:
    """Flags that initialize the projections: for experiments, before the conditioning."""

    initialization_scale: str = flag(
        "1",
        "Multiply the query, key and value weights by this before training (only query and key with "
        "--projection_init conditioned); or one number per projection, such as query=2,key=2,value=3,output=3.",
    )
    projection_init: str = flag(
        "default",
        "The query, key and value weights at the start: default (the model's own), orthogonal (of the same "
        "norm), mimetic (with the output projection), conditioned (value an identity, query and key of each head "
        "semi-orthogonal).",
        INITIALIZATIONS,
    )
    projection_init_targets: list[str] | None = flag(
        None, "What --projection_init orthogonal sets (query, key, value).", TARGETS
    )
    match_norm_of: str | None = flag(
        None,
        "Control: scale the query, key and value weights to the Frobenius norm that W + C would have; svd, or "
        "identity=LAMBDA. With svd conditioning: stock, which scales W so that W + C has the norm that W had.",
    )

    def initialization(self) -> Initialization:
        """How the projections are initialized.

        Raises:
            ValueError: for invalid values.
        """
        reference = parse_norm_reference(self.match_norm_of)
        scale = parse_numbers(self.initialization_scale, "initialization_scale", ("2", "query=2,output=3"))
        if reference is not None and scale != 1:  # of stock, W is scaled before
            raise ValueError(
                f"--initialization_scale {self.initialization_scale} would change the norm that --match_norm_of sets; pass "
                "only one of the two."
            )
        try:
            targets = self.projection_init_targets or PROJECTIONS
            return Initialization(self.projection_init, scale, reference, tuple(targets))
        except ValueError as error:
            raise ValueError(
                f"--projection_init, --projection_init_targets, --initialization_scale: {error}"
            ) from error


def check_initialization(arguments: InitializationArguments, spectral: SpectralArguments) -> None:
    """Refuse flags of the start that contradict those of the conditioning.

    Raises:
        ValueError: naming them.
    """
    if arguments.match_norm_of == STOCK:
        if not (spectral.spectral_method == "svd" and spectral.init == "additive"):
            raise ValueError(
                f"--match_norm_of {STOCK} gives W + C the norm that W had, which is possible only with "
                "--spectral_method svd (additive): the identity does not shrink with W."
            )
    elif arguments.match_norm_of is not None and spectral.spectral_conditioning:
        raise ValueError(
            "--match_norm_of makes the control that has the norm of W + C without C; leave out --spectral_conditioning."
        )


def parse_norm_reference(text: str | None) -> SpectralConfig | None:
    """Read `--match_norm_of`: `svd`, or `identity=` and lambda; None for `stock`, which is of conditioned models.

    Raises:
        ValueError: for anything else.
    """
    if text is None or text == STOCK:
        return None
    method, equals, number = text.partition("=")
    try:
        if method == "svd" and not equals:
            return SpectralConfig("svd")
        if method == "identity":
            return SpectralConfig("identity", float(number))
    except ValueError:
        pass
    raise ValueError(f"--match_norm_of {text!r}: give svd, or identity with its lambda as identity=1.0.")


@torch.no_grad()
def keep_norms(model: nn.Module, config: SpectralConfig) -> None:
    """Scale each target of a stock model so that its `W + C` under an svd config will have the Frobenius norm that W has.

    Such a C is proportional to W, so one factor does it.
    """
    for item in find_projections(model, output="output" in config.targets):
        matrix = item.orient(item.module.weight)
        corrections = item.layout.split(correction_matrix(matrix, item.layout, config))
        parts = item.layout.split(matrix.clone())
        for name in set(parts) & set(config.targets):
            parts[name] = parts[name] * (parts[name].norm() / (parts[name] + corrections[name]).norm())
        matrix.copy_(item.layout.join(parts))


def initialize_projections(model: nn.Module, initialization: Initialization) -> None:
    """`hf_specattn.initialize` with the settings of a run."""
    initialize(model, **vars(initialization))


def describe_initialization(initialization: Initialization) -> str | None:
    """What a run does to the query, key and value weights before training, in words; None if nothing."""
    if initialization.is_default:
        return None
    parts = [] if initialization.kind == "default" else [initialization.kind]
    scale = initialization.scale
    if initialization.norm_reference is not None:
        parts.append(f"of the norm of W + C under {initialization.norm_reference.describe()}")
    if isinstance(scale, Mapping):
        parts.append("times " + ", ".join(f"{number:g} ({name})" for name, number in scale.items()))
    elif scale != 1:
        parts.append(f"times {scale:g}")
    targets = "query, key and value" if initialization.targets == PROJECTIONS else ", ".join(initialization.targets)
    return f"{targets} weights {' '.join(parts)}"
