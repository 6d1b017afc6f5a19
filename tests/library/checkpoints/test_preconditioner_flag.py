"""The flag `attention_preconditioner`: loading, saving, remote code, the Trainer, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    HEADS,
    add_correction,
    assert_bit_equal,
    each_architecture,
    each_head,
    outputs_of,
    relative_difference,
)
from more_models import FLAGGED
from separate_process import SeparateProcess
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, Trainer, TrainingArguments

from hf_specattn import PreconditionerConfig, SpectralConfig, condition, fold, modeling, precondition
from hf_specattn.checkpoints.remote_code import add_remote_code
from hf_specattn.layers import spectral_layers
from hf_specattn.preconditioner import preconditioned_layers
from hf_specattn.preconditioning import find_output_projections

pytestmark = pytest.mark.integration

BERT, GPT2, VIT, LLAMA = (ARCHITECTURES[name] for name in ("bert", "gpt2", "vit", "llama"))
ROW = PreconditionerConfig()
BOTH = {"spectral_conditioning": True, "spectral_method": "svd", "attention_preconditioner": "row"}
ALONE = {"attention_preconditioner": "row"}
SPECTRAL_NAMES = ("lambda_", "spectral_method", "spectral_targets", "spectral_granularity", "spectral_refresh_every")


def load(path, auto_name="AutoModel", **kwargs):
    return getattr(transformers, auto_name).from_pretrained(path, **kwargs)


def independent(tiny, auto_name="AutoModel", method=None, model=None):
    """A stock model that sees normalized heads, without the package, its weights W + C where there is a method."""
    model = model or tiny.model(auto_name)
    if method:
        add_correction(tiny, model, CORRECTIONS[method])
    for item in find_output_projections(model):

        def normalize(module, args):
            parts = [part / part.square().sum(-1, keepdim=True).sqrt() for part in args[0].chunk(HEADS, dim=-1)]
            return (torch.cat(parts, dim=-1),)

        item.module.register_forward_pre_hook(normalize)
    return model


def saved(path):
    return json.loads((path / "config.json").read_text())


# --- loading and saving ----------------------------------------------------------------------------------------------


@each_head
@pytest.mark.parametrize("flags", [ALONE, BOTH], ids=["alone", "with svd"])
def test_the_flag_gives_a_preconditioned_model_that_is_saved_and_loaded(
    tiny, auto_name, flags, stock_checkpoint, tmp_path, warning_log
):
    model = load(stock_checkpoint(tiny, auto_name), auto_name, **flags)
    assert type(model).__name__ == f"Spec{tiny.stock_class(auto_name).__name__}"
    assert len(list(preconditioned_layers(model))) == tiny.layers
    assert bool(list(spectral_layers(model))) == ("spectral_method" in flags)
    about = [message for message in warning_log.messages if "needs training" in message]
    assert len(about) == 1
    assert "preconditioner row(unit, detached)" in about[0]
    batch = tiny.batch(auto_name)
    outputs = outputs_of(model, batch)
    expected = outputs_of(independent(tiny, auto_name, flags.get("spectral_method")), batch)
    assert relative_difference(outputs, expected) < 1e-10

    model.save_pretrained(tmp_path)
    warning_log.messages.clear()
    again, info = load(tmp_path, auto_name, output_loading_info=True)
    assert [message for message in warning_log.messages if "is_decoder" not in message] == []
    assert type(again) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_bit_equal(outputs_of(again, batch), outputs)
    assert_bit_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("tiny", FLAGGED, ids=str)
def test_the_other_types_of_the_flag(tiny, stock_checkpoint, tmp_path):
    model = load(stock_checkpoint(tiny), **ALONE)
    outputs = outputs_of(model, tiny.batch())
    assert relative_difference(outputs, outputs_of(independent(tiny), tiny.batch())) < 1e-10
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(load(tmp_path), tiny.batch()), outputs)


def test_what_config_json_says(stock_checkpoint, tmp_path):
    settings = {"preconditioner_gradient": "through", "preconditioner_scale": "rms", "preconditioner_eps": 1e-4}
    model = load(stock_checkpoint(BERT), **ALONE, **settings)
    model.save_pretrained(tmp_path / "alone")
    content = saved(tmp_path / "alone")
    assert content["model_type"] == "specattn_bert"
    assert {name: content[name] for name in settings} == settings
    assert content["spectral_conditioning"] is False
    assert content["attention_preconditioner"] == "row"
    assert not [name for name in SPECTRAL_NAMES if name in content]
    assert model.config.spectral_config is None
    assert model.config.preconditioner_config == PreconditionerConfig("row", "through", "rms", 1e-4)
    assert model.config.describe_conditioning() == "preconditioner row(rms, through, eps=0.0001)"
    assert load(tmp_path / "alone").config.preconditioner_config == model.config.preconditioner_config
    # and nothing of it beside corrections alone
    load(stock_checkpoint(BERT), spectral_conditioning=True).save_pretrained(tmp_path / "conditioned")
    content = saved(tmp_path / "conditioned")
    assert content["spectral_conditioning"] is True
    assert not [name for name in content if "precondition" in name]


def test_a_checkpoint_from_before_the_preconditioner_loads(stock_checkpoint, tmp_path):
    model = load(stock_checkpoint(BERT), spectral_conditioning=True, lambda_=2.0)
    model.save_pretrained(tmp_path)
    content = saved(tmp_path)
    before = {"spectral_conditioning", *SPECTRAL_NAMES}
    assert before <= content.keys()
    again = load(tmp_path)
    assert again.config.spectral_config == SpectralConfig(lambda_=2.0)
    assert again.config.preconditioner_config is None


@each_architecture
def test_matched_norms_are_measured_once_and_kept(tiny, stock_checkpoint, tmp_path):
    model = load(stock_checkpoint(tiny), **ALONE, preconditioner_scale="match")
    reference = tiny.model()
    reports = precondition(reference, PreconditionerConfig(scale="match"))
    norms = [report.norm_after for report in reports]
    assert model.config.preconditioner_norms == pytest.approx(norms)
    assert [layer.stock_norm for _, layer in preconditioned_layers(model)] == model.config.preconditioner_norms
    outputs = outputs_of(model, tiny.batch())
    assert relative_difference(outputs, outputs_of(reference, tiny.batch())) < 1e-12
    for each, name in ((model, "loaded"), (reference, "in memory")):
        each.save_pretrained(tmp_path / name)
        again = load(tmp_path / name)
        assert again.config.preconditioner_norms == each.config.preconditioner_norms
        assert_bit_equal(outputs_of(again, tiny.batch()), outputs_of(each, tiny.batch()))


def test_matched_norms_in_bf16_are_the_same_numbers(stock_checkpoint, tmp_path):
    model = load(stock_checkpoint(BERT), **ALONE, preconditioner_scale="match", dtype=torch.bfloat16)
    norms = list(model.config.preconditioner_norms)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert [layer.stock_norm for _, layer in preconditioned_layers(again)] == norms


def test_matched_norms_need_weights_and_layers(stock_checkpoint, tmp_path):
    config = BERT.config(**ALONE, preconditioner_scale="match")
    with pytest.raises(
        ValueError, match=r"scale='match' needs the mean norm.*0 norms for 2 attentions.*precondition\(model"
    ):
        AutoModel.from_config(config)
    load(stock_checkpoint(BERT), **ALONE, preconditioner_scale="match").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 norms for 1 attentions"):
        load(tmp_path, num_hidden_layers=1)


@each_architecture
@pytest.mark.parametrize("spectral", [None, SpectralConfig("svd")], ids=["alone", "with svd"])
def test_in_memory_is_as_loaded(tiny, spectral, stock_checkpoint, tmp_path):
    model = tiny.model()
    if spectral:
        condition(model, spectral)
    precondition(model, ROW)
    loaded = load(stock_checkpoint(tiny), **(BOTH if spectral else ALONE))
    assert type(model) is type(loaded)
    assert model.config.spectral_config == loaded.config.spectral_config == spectral
    assert model.config.preconditioner_config == loaded.config.preconditioner_config == ROW
    assert_bit_equal(outputs_of(model, tiny.batch()), outputs_of(loaded, tiny.batch()))
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(load(tmp_path), tiny.batch()), outputs_of(model, tiny.batch()))


def test_preconditioned_first_then_conditioned(tmp_path):
    model = BERT.model()
    precondition(model, PreconditionerConfig(scale="match"))
    norms = model.config.preconditioner_norms
    condition(model, SpectralConfig(lambda_=1.0))
    assert type(model) is modeling.SpecBertModel
    assert (model.config.spectral_config, model.config.preconditioner_norms) == (SpectralConfig(lambda_=1.0), norms)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_bit_equal(outputs_of(again, BERT.batch()), outputs_of(model, BERT.batch()))


@each_architecture
def test_folding_takes_the_corrections_and_leaves_the_preconditioner(tiny, stock_checkpoint, tmp_path, warning_log):
    model = load(stock_checkpoint(tiny), **BOTH)
    outputs = outputs_of(model, tiny.batch())
    warning_log.messages.clear()
    fold(model)
    assert any("the preconditioner of attention stays" in message for message in warning_log.messages)
    assert type(model).__name__ == f"Spec{tiny.stock_class().__name__}"
    assert model.config.spectral_config is None
    assert model.config.preconditioner_config == ROW
    assert list(spectral_layers(model)) == []
    assert_bit_equal(outputs_of(model, tiny.batch()), outputs)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_bit_equal(outputs_of(again, tiny.batch()), outputs)
    with pytest.raises(
        ValueError, match=r"no conditioned projection in this model \(no weight can hold its preconditioner"
    ):
        fold(again)


def test_preserve_keeps_the_function_but_for_the_preconditioner(stock_checkpoint, warning_log):
    model = load(stock_checkpoint(BERT), **BOTH, spectral_init="preserve")
    assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(independent(BERT), BERT.batch())) < 1e-10
    assert sum("needs training" in message for message in warning_log.messages) == 1


def test_remote_code(stock_checkpoint, tmp_path):
    process = SeparateProcess(tmp_path / "process", package=False)
    expected = {}
    for name, tiny, flags in (
        ("bert", BERT, BOTH),
        ("gpt2", GPT2, {**ALONE, "preconditioner_scale": "match"}),
        ("vit", VIT, {"attention_preconditioner": "column"}),
        ("llama", LLAMA, ALONE),
    ):
        model = load(stock_checkpoint(tiny), **flags)
        model.save_pretrained(tmp_path / name)
        files = add_remote_code(tmp_path / name)
        assert {"preconditioner.py", "preconditioning.py"} <= set(files)
        assert "balance.py" not in files
        batch = tiny.batch()
        expected[name] = outputs_of(model, batch)
        process.add(name, tmp_path / name, batch, trust=True)
    for name, loaded in process.run().items():
        assert loaded.model_class.startswith("Spec")
        assert_bit_equal(loaded.outputs, expected[name])


# --- the other ways in -----------------------------------------------------------------------------------------------


@each_architecture
def test_the_flag_by_configuration(tiny, stock_checkpoint):
    path = stock_checkpoint(tiny)
    spec = f"Spec{tiny.config_class.__name__}"
    given = tiny.config(**ALONE, preconditioner_gradient="through")
    assert type(given).__name__ == spec
    config = AutoConfig.from_pretrained(path, **ALONE)
    assert type(config).__name__ == spec
    stock_config = AutoConfig.from_pretrained(path)
    assert type(stock_config) is tiny.config_class
    models = [
        AutoModel.from_config(given),
        AutoModel.from_config(stock_config, **ALONE),
        load(path, config=config),
        load(path, config=stock_config, **ALONE),
        tiny.stock_class().from_pretrained(path, **ALONE),
        tiny.stock_class()(stock_config, **ALONE),
        AutoModel.from_config(AutoConfig.for_model(tiny.model_type, **tiny.settings, **ALONE)),
    ]
    for model in models:
        assert type(model).__name__ == f"Spec{tiny.stock_class().__name__}"
        assert len(list(preconditioned_layers(model))) == tiny.layers
        assert list(spectral_layers(model)) == []
        assert model.config.spectral_config is None
    assert type(AutoModel.from_config(stock_config)) is tiny.stock_class()  # nobody's configuration was changed
    both = tiny.config(**BOTH)
    assert (both.spectral_config, both.preconditioner_config) == (SpectralConfig("svd"), ROW)
    assert list(spectral_layers(AutoModel.from_config(both)))


@pytest.mark.parametrize("off", [None, False])
def test_a_flag_that_says_no_is_none(off, stock_checkpoint):
    path = stock_checkpoint(BERT)
    assert type(load(path, attention_preconditioner=off)) is BertModel
    assert type(AutoConfig.from_pretrained(path, attention_preconditioner=off)) is BertConfig
    model = load(path, attention_preconditioner=off, spectral_conditioning=True)
    assert list(preconditioned_layers(model)) == []
    assert model.config.preconditioner_config is None


def test_a_column_for_images_by_the_flag(stock_checkpoint, tmp_path):
    model = load(stock_checkpoint(VIT), attention_preconditioner="column", preconditioner_scale="rms")
    expected = VIT.model()
    precondition(expected, PreconditionerConfig("column", scale="rms"))
    assert_bit_equal(outputs_of(model, VIT.batch()), outputs_of(expected, VIT.batch()))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="axis='column' scales each channel"):
        load(tmp_path)(**VIT.batch(), attention_mask=torch.tensor([[True] * 4 + [False]] * 2))


def test_the_trainer_trains_saves_and_loads(stock_checkpoint, tmp_path):
    torch.manual_seed(0)
    model = load(stock_checkpoint(BERT, "AutoModelForMaskedLM"), "AutoModelForMaskedLM", **ALONE, dtype=torch.float32)
    tokens = torch.randint(5, 40, (32, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3, report_to="none", use_cpu=True,
        save_steps=20, logging_steps=5, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    again = load(tmp_path / "checkpoint-20", "AutoModelForMaskedLM")
    batch = BERT.batch()
    assert_bit_equal(outputs_of(again.eval(), batch), outputs_of(model.eval(), batch))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"attention_preconditioner": "rows"}, r"axis='rows' is unknown; choose one of 'row', 'column'"),
        ({"attention_preconditioner": True}, r"axis=True is unknown"),
        ({**ALONE, "preconditioner_scale": "norm"}, r"scale='norm' is unknown"),
        ({**ALONE, "preconditioner_eps": -1}, r"eps=-1 is not allowed"),
        ({"preconditioner_scale": "rms"}, r"preconditioner_scale='rms' does nothing without attention_preconditioner"),
        ({**ALONE, "lambda_": 2.0}, r"lambda_=2.0 does nothing without spectral_conditioning=True"),
        (
            {**ALONE, "spectral_init": "preserve"},
            r"spectral_init='preserve' does nothing without spectral_conditioning",
        ),
        (
            {"spectral_conditioning": True, "preconditioner_eps": 1.0},
            r"preconditioner_eps=1.0 does nothing without att",
        ),
        ({"attention_preconditioner": "column"}, r"axis='column' .*it reads texts, whose batches are padded"),
    ],
)
def test_bad_flags(flags, message, stock_checkpoint):
    with pytest.raises(ValueError, match=message):
        load(stock_checkpoint(BERT), **flags)
    if "spectral_init" not in flags:
        with pytest.raises(ValueError, match=message):
            AutoModel.from_config(BERT.config(**flags))


@pytest.mark.parametrize(
    ("trained", "flags", "message"),
    [
        (ALONE, {"attention_preconditioner": "column"}, r"='column', but this checkpoint was trained with .*='row'"),
        (
            ALONE,
            {"attention_preconditioner": False},
            r"=False, but this checkpoint was trained with .* start from the stock",
        ),
        (ALONE, {**ALONE, "preconditioner_scale": "rms"}, r"scale='rms', but .*preconditioner_scale='unit'"),
        (
            ALONE,
            {"spectral_conditioning": True},
            r"trained with a preconditioner and no spectral conditioning.*condition\(",
        ),
        (BOTH, {"spectral_conditioning": False}, r"was trained with spectral conditioning"),
        (
            {"spectral_conditioning": True},
            ALONE,
            r"was trained with no preconditioner.*hf_specattn.precondition\(model",
        ),
    ],
)
def test_a_checkpoint_loads_as_it_was_trained(trained, flags, message, stock_checkpoint, tmp_path):
    load(stock_checkpoint(BERT), **trained).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **flags)
    load(tmp_path, **trained)  # the same flags once more are no contradiction


def test_a_stock_class_from_a_preconditioned_configuration(stock_checkpoint):
    config = BertConfig(**BERT.settings)
    config.attention_preconditioner = "row"
    with pytest.raises(
        ValueError, match=r"says attention_preconditioner='row', but a stock class was made from it, without"
    ):
        BertModel(config)
    with pytest.raises(ValueError, match=r"attention_preconditioner='row': T5Config .* has no conditioned class"):
        transformers.T5Config(**ALONE)


def test_fields_in_a_stock_configuration(stock_checkpoint, tmp_path):
    model = BERT.model()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(saved(tmp_path) | ALONE))
    with pytest.raises(
        ValueError, match=r"model_type='bert', which is not conditioned, and attention_preconditioner='row'"
    ):
        load(tmp_path)


def test_what_has_no_class_refuses_to_be_saved(tmp_path):
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": HEADS, "vocab_size": 48}
    model = transformers.T5EncoderModel(transformers.T5Config(**settings))
    precondition(model, ROW)
    message = "T5EncoderModel has no preconditioned class to be saved as"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    condition(model, SpectralConfig(lambda_=1.0))
    fold(model)  # takes the corrections, and leaves what cannot be saved
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


def test_the_same_attention_by_hand_can_be_saved_and_another_cannot(tmp_path):
    spec = modeling.ARCHITECTURES["bert"][0]
    model = BERT.model()
    precondition(model, ROW, architecture=spec)
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(load(tmp_path), BERT.batch()), outputs_of(model, BERT.batch()))
    other = BERT.model()
    two_heads = copy.copy(spec)
    object.__setattr__(two_heads, "query_heads", 2)
    precondition(other, ROW, architecture=two_heads)
    with pytest.raises(ValueError, match="BertModel has no preconditioned class to be saved as"):
        other.save_pretrained(tmp_path / "other")
