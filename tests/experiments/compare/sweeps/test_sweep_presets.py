"""The named sweeps: every run's flags are the training script's, and every model has what the sweep changes."""

import pytest
import torch
from scripts_loading import REPOSITORY

from hf_specattn import SpectralConfig, condition
from recipes.compare.sweeps.design import Setting, SweepError
from recipes.compare.sweeps.execution import planned_runs
from recipes.compare.sweeps.regime_sweeps import REGIME_SWEEPS
from recipes.compare.sweeps.sweep_presets import FAMILIES, SCALES, SMALL_RECIPE, SWEEPS
from recipes.images.image_arguments import parse_arguments
from recipes.images.image_models import build_stock_model
from recipes.images.image_plan import planned_amounts
from recipes.run.ablations import remove_layer_norms
from recipes.run.projection_init import initialize_projections

SCRIPTS = REPOSITORY / "scripts"


def first_values(sweep):
    return {tuning.name: tuning.values[0] for tuning in sweep.tunings}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SWEEPS)
def test_the_script_takes_every_run(name, scale, tmp_path):
    sweep = SWEEPS[name](scale, SCRIPTS)
    planned = planned_runs(sweep, first_values(sweep))
    assert len({run for _, run in planned}) >= len(sweep.settings) * len(sweep.variants) * len(sweep.seeds)
    for _, run in {(of.label, *run.flags): (of, run) for of, run in planned}.values():
        arguments, spectral = parse_arguments(run.arguments(tmp_path), "a run")
        assert arguments.seed == run.seed
        assert spectral.spectral_conditioning == ("--spectral_conditioning" in run.flags)


@pytest.mark.parametrize("name", REGIME_SWEEPS)
def test_the_script_takes_every_run_of_a_regime(name, tmp_path):
    sweep = REGIME_SWEEPS[name]("small", SCRIPTS)
    planned = planned_runs(sweep, first_values(sweep))
    for _, run in {run.flags: (of, run) for of, run in planned}.values():
        parse_arguments(run.arguments(tmp_path), "a run")
    with pytest.raises(SweepError, match=f"{name} is of no paper's table"):
        REGIME_SWEEPS[name]("paper", SCRIPTS)


@pytest.mark.parametrize("setting", FAMILIES, ids=lambda setting: setting.label)
def test_every_small_model_can_be_conditioned_scaled_and_stripped_of_norms(setting: Setting):
    arguments, _ = parse_arguments([*SMALL_RECIPE, *setting.flags, "--show_plan"], "a run")
    scaled, _ = parse_arguments([*setting.flags, "--initialization_scale", "3", "--show_plan"], "a run")
    images, classes, size, channels = planned_amounts(arguments)
    assert (images, classes, channels) == (1437, 10, 1)
    build = (arguments, [str(label) for label in range(classes)], size, channels)
    torch.manual_seed(0)
    model = build_stock_model(*build).eval()
    pixels = torch.randn(4, channels, size, size)
    with torch.no_grad():
        stock = model(pixel_values=pixels).logits
        initialize_projections(model, scaled.initialization())
        at_three = model(pixel_values=pixels).logits
        condition(model, SpectralConfig(lambda_=1.0))
        conditioned = model(pixel_values=pixels).logits
        removed = remove_layer_norms(model)
    assert stock.shape == (4, 10)
    # Each changes what the model computes: none of them misses its layers.
    assert (at_three - stock).abs().max() > 1e-4
    assert (conditioned - at_three).abs().max() > 1e-4
    assert removed > 2


def test_the_evidence_has_every_treatment_from_both_starts():
    sweep = SWEEPS["evidence"]("small", SCRIPTS)
    own = {item.label for item in sweep.variants if not item.start}
    tuned = {item.label.removesuffix(", tuned scale") for item in sweep.variants if item.start}
    assert own - tuned == {"stock, norm of identity, lambda 1", "stock, norm of svd", "mimetic"}
    assert tuned <= own
    assert all(item.flags[:2] == ("--initialization_scale", "{scale}") for item in sweep.variants if item.start)


def test_published_tables_are_rectangular():
    for build in SWEEPS.values():
        published = build("small", SCRIPTS).published
        if published is not None:
            assert len({len(row) for row in published[1]}) == 1
