"""What a run does to its model and optimizer that a published recipe does not, in words."""

from .projection_init import describe_initialization
from .run_arguments import RunArguments
from .spectral_arguments import SpectralArguments

# Flag -> what it does.
ABLATIONS = {
    "no_layer_norm": "no layer norms",
    "no_attention_residual": "no residual connection of attention",
}


def model_changes(arguments: RunArguments, spectral: SpectralArguments) -> list[str]:
    """Conditioning, preconditioner, start, ablations and the controls of the optimizer; empty where there is none."""
    conditioning = spectral.describe()
    changes = [
        None if conditioning is None else f"spectral conditioning: {conditioning}",
        arguments.describe_preconditioner(),
        describe_initialization(arguments.initialization()),
        *(words for name, words in ABLATIONS.items() if getattr(arguments, name, False)),
    ]
    controls = arguments.optimization_settings().items()
    changes += [f"{name}: {' '.join(value) if isinstance(value, list) else value}" for name, value in controls]
    return [change for change in changes if change is not None]
