"""A model class from outside takes part in the flag: `register_architecture`."""

import json

import pytest
import torch
import transformers
from models import outputs_of
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from hf_specattn import AttentionSpec, SpectralConfig, condition, fold, modeling, register_architecture
from hf_specattn.architectures import ARCHITECTURES
from hf_specattn.checkpoints.conversion import convert
from hf_specattn.checkpoints.publishing import plan
from hf_specattn.checkpoints.remote_code import remote_code
from hf_specattn.conditioning import CONDITIONED_CLASSES
from hf_specattn.layers import spectral_layers
from hf_specattn.modeling import OUTSIDE, conditioned_models

pytestmark = pytest.mark.integration

WIDTH, HEADS = 12, 3


class OutsideConfig(PreTrainedConfig):
    model_type = "outside"
    width: int = WIDTH
    heads: int = HEADS
    num_labels: int = 2


class OutsideAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.width, config.width) for _ in range(3))
        self.to_out = nn.Linear(config.width, config.width)

    def forward(self, x):
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (part(x).view(split).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(mixed.transpose(1, 2).reshape(x.shape))


class OutsideModel(PreTrainedModel):
    config_class = OutsideConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.attention = OutsideAttention(config)
        self.post_init()

    def forward(self, inputs_embeds):
        return transformers.modeling_outputs.BaseModelOutput(self.attention(inputs_embeds))


class OutsideForSequenceClassification(PreTrainedModel):
    config_class = OutsideConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = OutsideModel(config)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, inputs_embeds):
        hidden = self.model(inputs_embeds).last_hidden_state
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


MODELS = {AutoModel: OutsideModel, "AutoModelForSequenceClassification": OutsideForSequenceClassification}
SPEC = AttentionSpec(
    "OutsideAttention", {"to_q": "query", "to_k": "key", "to_v": "value"}, query_heads="heads", defined_in=(__name__,)
)


@pytest.fixture(autouse=True)
def registered():
    """Registered for one test: others walk the whole table."""
    register_architecture(OutsideConfig, MODELS, SPEC)
    yield
    del OUTSIDE["outside"], ARCHITECTURES["outside"]
    modeling.CONDITIONED_CONFIGS.pop(OutsideConfig)
    modeling.CONDITIONED_MODELS.pop("outside", None)
    for stock in (OutsideModel, OutsideForSequenceClassification):
        CONDITIONED_CLASSES.pop(stock, None)
    for name in [name for name in vars(modeling) if name.startswith("SpecOutside")]:
        delattr(modeling, name)


def batch():
    return {"inputs_embeds": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))}


def stock_model(model_class=OutsideModel):
    torch.manual_seed(0)
    return model_class(OutsideConfig()).eval()


def with_identity(model, lambda_):
    """W + lambda * I by hand."""
    for name, parameter in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            parameter.data += lambda_ * torch.eye(WIDTH)
    return model


@pytest.mark.parametrize("model_class", [OutsideModel, OutsideForSequenceClassification])
def test_the_flag_conditions_a_stock_checkpoint_and_it_loads_again(model_class, tmp_path):
    auto = AutoModel if model_class is OutsideModel else AutoModelForSequenceClassification
    stock_model(model_class).save_pretrained(tmp_path / "stock")
    model = auto.from_pretrained(tmp_path / "stock", spectral_conditioning=True, lambda_=0.5).eval()
    assert type(model).__name__ == f"Spec{model_class.__name__}"
    assert isinstance(model, model_class)
    expected = outputs_of(with_identity(stock_model(model_class), 0.5), batch())
    model.save_pretrained(tmp_path / "conditioned")
    stored = json.loads((tmp_path / "conditioned" / "config.json").read_text())
    assert stored["model_type"] == "specattn_outside"
    assert "auto_map" not in stored
    for each in (model, auto.from_pretrained(tmp_path / "conditioned").eval()):
        for name, value in expected.items():
            torch.testing.assert_close(outputs_of(each, batch())[name], value, rtol=0, atol=1e-6)


def test_svd_is_stored_and_folds_back_to_the_stock_class(tmp_path):
    model = AutoModel.from_config(OutsideConfig(spectral_conditioning=True, spectral_method="svd"))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    assert len(list(spectral_layers(again))) == 3
    before = outputs_of(again.eval(), batch())["last_hidden_state"]
    assert type(fold(again)) is OutsideModel
    assert type(again.config) is OutsideConfig
    assert torch.equal(outputs_of(again, batch())["last_hidden_state"], before)


def test_condition_knows_it_and_gives_it_the_conditioned_class():
    model = stock_model()
    reports = condition(model, SpectralConfig(lambda_=2.0))
    assert [report.projection for report in reports] == ["query", "key", "value"]
    assert type(model).__name__ == "SpecOutsideModel"
    condition(AutoModel.from_config(OutsideConfig()), SpectralConfig(method="svd"))


def test_the_same_call_again_changes_nothing_and_the_stock_classes_load_as_before(tmp_path):
    before = conditioned_models("outside")
    register_architecture(OutsideConfig, MODELS, SPEC)
    assert conditioned_models("outside") is before
    stock_model().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is OutsideModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is OutsideConfig


def test_its_code_cannot_travel_and_that_is_said(tmp_path):
    reason = r"register_architecture.*not part of this package and cannot be saved.*save_pretrained.*fold it"
    stock_model().save_pretrained(tmp_path / "stock")
    model = AutoModel.from_pretrained(tmp_path / "stock", spectral_conditioning=True, lambda_=0.5)
    model.save_pretrained(tmp_path / "conditioned")
    for call in (
        lambda: remote_code({"model_type": "specattn_outside"}),
        lambda: convert(tmp_path / "stock", tmp_path / "new", SpectralConfig(lambda_=0.5)),
        lambda: plan(tmp_path / "conditioned", "me/model"),
        lambda: model.push_to_hub("me/model"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    assert not (tmp_path / "new").exists()


class OtherConfig(PreTrainedConfig):
    model_type = "other"


class BertAgain(PreTrainedConfig):
    model_type = "bert"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (transformers.BertConfig, {"AutoModel": transformers.BertModel}, SPEC),
            "'bert' of BertConfig is already used",
        ),
        ((BertAgain, {"AutoModel": OutsideModel}, SPEC), "'bert' of BertAgain is already used"),
        (
            (OutsideConfig, {"AutoModel": OutsideForSequenceClassification}, SPEC),
            "'outside' of OutsideConfig is already used",
        ),
        ((nn.Linear, MODELS, SPEC), "is not a configuration class"),
        ((PreTrainedConfig, MODELS, SPEC), "with a model_type"),
        ((OtherConfig, {}, SPEC), "models is empty"),
        ((OtherConfig, {"AutoModelForNothing": OutsideModel}, SPEC), "'AutoModelForNothing' is not an Auto class"),
        ((OtherConfig, {"AutoModel": nn.Linear}, SPEC), "is not a PreTrainedModel class"),
        ((OtherConfig, {"AutoModel": OutsideModel}, SPEC), "OutsideModel.config_class is .* set it to OtherConfig"),
        ((OutsideConfig, MODELS, ()), "must be an AttentionSpec"),
        ((OutsideConfig, MODELS, "to_q"), "must be an AttentionSpec"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_architecture(*arguments)
    assert ARCHITECTURES["outside"] == (SPEC,)
    assert "other" not in ARCHITECTURES
