"""LRA's models in the Auto classes for the tests that need them: others walk the whole table."""

from collections.abc import Iterator

import pytest

from hf_specattn import modeling
from hf_specattn.architectures import ARCHITECTURES
from hf_specattn.conditioning import CONDITIONED_CLASSES
from hf_specattn.modeling import OUTSIDE
from recipes.lra import nystromformer


@pytest.fixture
def registered() -> Iterator[None]:
    """Register the models for one test, and take them out of the table again."""
    nystromformer.register()
    yield
    config = nystromformer.LraNystromformerConfig
    models = (nystromformer.LraNystromformerModel, nystromformer.LraNystromformerForSequenceClassification)
    for table in (OUTSIDE, ARCHITECTURES):
        del table[config.model_type]
    modeling.CONDITIONED_CONFIGS.pop(config, None)
    modeling.CONDITIONED_MODELS.pop(config.model_type, None)
    for model in models:
        CONDITIONED_CLASSES.pop(model, None)
    for name in [name for name in vars(modeling) if name.startswith("SpecLra")]:
        delattr(modeling, name)
