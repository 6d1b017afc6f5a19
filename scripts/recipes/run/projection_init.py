"""How query, key and value begin in a run: the flags of `hf_specattn.initialize`, and the ablation of layer norm."""

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from hf_specattn.conditioning import refuse_to_save
from hf_specattn.config import SpectralConfig
from hf_specattn.initialization import INITIALIZATIONS, Initialization, initialize

from .spectral_arguments import SpectralArguments

# Names of the flags.
INITIALIZATION_SETTINGS = ("projection_init", "initialization_scale", "match_norm_of")


@dataclass
class InitializationArguments:
    """Flags that set how the projections begin: for experiments, before the conditioning."""

    initialization_scale: float = field(
        default=1.0,
        metadata={
            "help": "Multiply the query, key and value weights by this before training (with --projection_init conditioned "
            "query and key alone)."
        },
    )
    projection_init: str = field(
        default="default",
        metadata={
            "help": "The query, key and value weights at the start: default (the model's own), orthogonal (of the same "
            "norm), mimetic (with the output projection), conditioned (value an identity, query and key of each head "
            "semi-orthogonal).",
            "choices": list(INITIALIZATIONS),
        },
    )
    match_norm_of: str | None = field(
        default=None,
        metadata={
            "help": "Control: scale the query, key and value weights to the Frobenius norm that W + C would have; svd, or "
            "identity=LAMBDA. Not with --spectral_conditioning."
        },
    )

    def initialization(self) -> Initialization:
        """How the projections begin.

        Raises:
            ValueError: for values that cannot be.
        """
        reference = parse_norm_reference(self.match_norm_of)
        if not 0 < self.initialization_scale < float("inf"):
            raise ValueError(f"--initialization_scale {self.initialization_scale} must be a finite number above 0.")
        if reference is not None and self.initialization_scale != 1:
            raise ValueError(
                f"--initialization_scale {self.initialization_scale} would change the norm that --match_norm_of sets; give "
                "one of the two."
            )
        return Initialization(self.projection_init, self.initialization_scale, reference)


def check_initialization(arguments: InitializationArguments, spectral: SpectralArguments) -> None:
    """Refuse flags of the start that contradict those of the conditioning.

    Raises:
        ValueError: naming them.
    """
    if arguments.match_norm_of is not None and spectral.spectral_conditioning:
        raise ValueError(
            "--match_norm_of makes the control that has the norm of W + C without C; leave out --spectral_conditioning."
        )


def parse_norm_reference(text: str | None) -> SpectralConfig | None:
    """Read `--match_norm_of`: `svd`, or `identity=` and lambda.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
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


def initialize_projections(model: nn.Module, initialization: Initialization) -> None:
    """`hf_specattn.initialize` with the settings of a run."""
    initialize(model, initialization.kind, initialization.scale, initialization.norm_reference)


def describe_initialization(initialization: Initialization) -> str | None:
    """What a run does to the query, key and value weights before training, in words; None where nothing."""
    if initialization.is_default:
        return None
    parts = [] if initialization.kind == "default" else [initialization.kind]
    if initialization.norm_reference is not None:
        parts.append(f"of the norm of W + C under {initialization.norm_reference.describe()}")
    if initialization.scale != 1:
        parts.append(f"times {initialization.scale:g}")
    return f"query, key and value weights {' '.join(parts)}"


# --- ablation --------------------------------------------------------------------------------------------------------


def remove_layer_norms(model: PreTrainedModel) -> int:
    """Replace every `nn.LayerNorm` of the model by the identity, in place; returns how many there were.

    No stock class is such a model, so it refuses `save_pretrained` from then on.

    Raises:
        ValueError: if there is none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not names:
        raise ValueError(
            f"--no_layer_norm: {type(model).__name__} has no torch.nn.LayerNorm; leave the flag out, or take another model."
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    refuse_to_save(
        model,
        "has no layer norm any more, and a checkpoint of it would load with new ones; save its state_dict() instead.",
    )
    return len(names)
