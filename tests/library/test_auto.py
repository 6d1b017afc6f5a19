"""The stock Auto classes: what the flag gives against NumPy, and that without it nothing changes."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    PROJECTIONS,
    VOCABULARY,
    add_correction,
    assert_bit_equal,
    each_architecture,
    each_head,
    each_head_once,
    each_method,
    identity_by_numpy,
    outputs_of,
    relative_difference,
    svd_by_numpy,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from hf_specattn import auto, fold

pytestmark = pytest.mark.integration

SETTINGS = {"identity": {"lambda_": 10.0}, "svd": {"spectral_method": "svd"}}


def load(tiny, path, auto_name="AutoModel", **kwargs):
    return getattr(transformers, auto_name).from_pretrained(path, **kwargs)


def assert_equals_numpy(model, tiny, auto_name="AutoModel", correction=None, tolerance=1e-10, **where):
    """`model` computes what the stock model does with NumPy's `W + C` for its weights."""
    dtype = model.dtype
    expected = add_correction(tiny, tiny.model(auto_name, dtype), correction, **where)
    batch = tiny.batch(auto_name, dtype)
    assert relative_difference(outputs_of(model, batch), outputs_of(expected, batch)) < tolerance


@each_head_once
def test_flag_gives_w_plus_c(tiny, auto_name, method, stock_checkpoint):
    path = stock_checkpoint(tiny, auto_name)
    model = load(tiny, path, auto_name, spectral_conditioning=True, **SETTINGS[method])
    assert type(model).__name__ == f"Spec{tiny.stock_class(auto_name).__name__}"
    assert isinstance(model, tiny.stock_class(auto_name))
    assert model.config.model_type == f"specattn_{tiny.model_type}"
    assert not model.training
    assert_equals_numpy(model, tiny, auto_name, CORRECTIONS[method])


@each_architecture
@each_method
def test_per_head_granularity(tiny, method, stock_checkpoint):
    kwargs = {"spectral_conditioning": True, "spectral_granularity": "head", **SETTINGS[method]}
    model = load(tiny, stock_checkpoint(tiny), **kwargs)
    assert_equals_numpy(model, tiny, correction=CORRECTIONS[method], per_head=True)


@each_architecture
@each_method
@pytest.mark.parametrize("targets", [["query"], ["key"], ["value"], ["query", "value"]], ids="+".join)
def test_subset_of_targets(tiny, method, targets, stock_checkpoint):
    kwargs = {"spectral_conditioning": True, "spectral_targets": targets, **SETTINGS[method]}
    model = load(tiny, stock_checkpoint(tiny), **kwargs)
    assert_equals_numpy(model, tiny, correction=CORRECTIONS[method], targets=targets)


@each_architecture
@pytest.mark.parametrize("granularity", ["projection", "head"])
def test_a_lambda_for_each_projection(tiny, granularity, stock_checkpoint):
    # Small numbers too: with 10 the softmax saturates, and its output barely depends on the rest of query and key.
    numbers = {"query": 0.5, "key": 0.25, "value": 2.0}
    kwargs = {"spectral_conditioning": True, "lambda_": numbers, "spectral_granularity": granularity}
    model = load(tiny, stock_checkpoint(tiny), **kwargs)
    assert_equals_numpy(model, tiny, correction=identity_by_numpy(numbers), per_head=granularity == "head")


@each_architecture
@each_method
def test_in_float32(tiny, method, stock_checkpoint):
    kwargs = {"spectral_conditioning": True, "dtype": torch.float32, **SETTINGS[method]}
    model = load(tiny, stock_checkpoint(tiny), **kwargs)
    assert model.dtype == torch.float32
    assert_equals_numpy(model, tiny, correction=CORRECTIONS[method], tolerance=1e-5)


def test_defaults_are_identity_with_lambda_10_on_all_projections(stock_checkpoint):
    tiny = ARCHITECTURES["bert"]
    model = AutoModel.from_pretrained(stock_checkpoint(tiny), spectral_conditioning=True)
    assert model.config.lambda_ == 10.0
    assert_equals_numpy(model, tiny, correction=identity_by_numpy(10.0))


# --- without the flag ------------------------------------------------------------------------------------------------


@each_head
def test_without_the_flag_the_stock_model(tiny, auto_name, stock_checkpoint):
    path = stock_checkpoint(tiny, auto_name)
    model = load(tiny, path, auto_name, **({"spectral_conditioning": False} if auto_name == "AutoModel" else {}))
    expected = tiny.stock_class(auto_name).from_pretrained(path)
    assert type(model) is tiny.stock_class(auto_name)
    assert type(model.config) is tiny.config_class
    assert model.config.to_dict() == expected.config.to_dict()
    assert_bit_equal(model.state_dict(), expected.state_dict())
    assert_bit_equal(model.state_dict(), tiny.model(auto_name).state_dict())
    batch = tiny.batch(auto_name)
    assert_bit_equal(outputs_of(model, batch), outputs_of(expected, batch))


@each_architecture
def test_without_the_flag_the_stock_configuration(tiny, stock_checkpoint):
    path = stock_checkpoint(tiny)
    assert type(AutoConfig.from_pretrained(path)) is tiny.config_class
    assert type(AutoConfig.from_pretrained(path, spectral_conditioning=False)) is tiny.config_class
    config, unused = AutoConfig.from_pretrained(path, return_unused_kwargs=True, some_argument=1)
    assert type(config) is tiny.config_class
    assert unused == {"some_argument": 1}
    made = AutoConfig.for_model(tiny.model_type, **tiny.settings)
    assert type(made) is tiny.config_class
    assert made.to_dict() == tiny.config().to_dict()
    assert type(AutoModel.from_config(made)) is tiny.stock_class()


@each_architecture
def test_flag_on_autoconfig(tiny, stock_checkpoint):
    path = stock_checkpoint(tiny)
    config = AutoConfig.from_pretrained(
        path, spectral_conditioning=True, lambda_=3.0, spectral_targets=("query", "key"), output_hidden_states=True
    )
    assert config.model_type == f"specattn_{tiny.model_type}"
    assert isinstance(config, tiny.config_class)
    assert (config.lambda_, config.spectral_targets) == (3.0, ["query", "key"])
    assert config.output_hidden_states is True
    model = AutoModel.from_pretrained(path, config=config)
    expected = add_correction(tiny, tiny.model(), identity_by_numpy(3.0), targets=("query", "key"))
    outputs, expected_outputs = (m(**tiny.batch()).last_hidden_state.detach() for m in (model, expected))
    assert relative_difference({"output": outputs}, {"output": expected_outputs}) < 1e-10


def test_registering_again_changes_nothing(stock_checkpoint):
    auto.register()
    tiny = ARCHITECTURES["bert"]
    assert type(AutoModel.from_pretrained(stock_checkpoint(tiny))) is tiny.stock_class()
    model = AutoModel.from_pretrained(stock_checkpoint(tiny), spectral_conditioning=True)
    assert_equals_numpy(model, tiny, correction=identity_by_numpy(10.0))


# --- initialization from a configuration -----------------------------------------------------------------------------


@each_head_once
def test_from_config_starts_from_the_same_w(tiny, auto_name, method):
    auto_class = getattr(transformers, auto_name)
    torch.manual_seed(7)
    stock = auto_class.from_config(tiny.config()).eval()
    conditioned_config = AutoConfig.for_model(f"specattn_{tiny.model_type}", **tiny.settings, **SETTINGS[method])
    torch.manual_seed(7)
    model = auto_class.from_config(conditioned_config).eval()
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith(".correction")}
    assert_bit_equal(weights, stock.state_dict())
    batch = tiny.batch(auto_name, torch.float32)
    expected = outputs_of(add_correction(tiny, stock, CORRECTIONS[method]), batch)
    assert relative_difference(outputs_of(model, batch), expected) < 1e-5


@each_architecture
@pytest.mark.parametrize("per_head", [False, True], ids=["projection", "head"])
def test_svd_condition_number_is_at_most_2(tiny, per_head):
    config = AutoConfig.for_model(
        f"specattn_{tiny.model_type}",
        **tiny.settings,
        spectral_method="svd",
        spectral_granularity="head" if per_head else "projection",
    )
    model = AutoModel.from_config(config)
    folded = fold(model.double())
    projections = tiny.projections(folded)
    assert len(projections) == 6
    for _, projection, matrix in projections:
        for block in np.split(matrix, tiny.heads_of(projection)) if per_head else [matrix]:
            singular_values = np.linalg.svd(block, compute_uv=False)
            # float32 corrections: the bound holds to their precision.
            assert singular_values[0] / singular_values[-1] <= 2 * (1 + 1e-5)


# --- how weights enter, and the warning ------------------------------------------------------------------------------


@each_head_once
def test_preserve_keeps_the_function(tiny, auto_name, method, stock_checkpoint):
    path = stock_checkpoint(tiny, auto_name)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        kwargs = {"spectral_conditioning": True, "spectral_init": "preserve", "dtype": dtype, **SETTINGS[method]}
        model = load(tiny, path, auto_name, **kwargs)
        expected = tiny.model(auto_name, dtype)
        batch = tiny.batch(auto_name, dtype)
        assert relative_difference(outputs_of(model, batch), outputs_of(expected, batch)) < tolerance
        # and not because nothing was conditioned: W itself is W - C now
        raw = dict(model.named_parameters())
        for name, projection, matrix in tiny.projections(expected):
            weight = raw[name].detach().numpy()
            part = np.split(weight.T, 3)[PROJECTIONS.index(projection)] if tiny.fused else weight
            np.testing.assert_allclose(part, matrix - CORRECTIONS[method](matrix, projection), atol=1e-5)


@each_architecture
@each_method
def test_additive_loading_warns_once(tiny, method, stock_checkpoint, warning_log):
    path = stock_checkpoint(tiny)
    load(tiny, path, spectral_conditioning=True, **SETTINGS[method])
    assert len(warning_log.messages) == 1
    assert method in warning_log.messages[0]
    assert "changes its function" in warning_log.messages[0]
    assert "spectral_init='preserve'" in warning_log.messages[0]


@each_architecture
@each_method
def test_nothing_else_warns(tiny, method, stock_checkpoint, tmp_path, warning_log):
    path = stock_checkpoint(tiny)
    load(tiny, path)
    model = load(tiny, path, spectral_conditioning=True, spectral_init="preserve", **SETTINGS[method])
    model.save_pretrained(tmp_path)
    load(tiny, tmp_path)
    assert warning_log.messages == []


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stray",
    [
        {"lambda_": 10.0},
        {"spectral_method": "svd"},
        {"spectral_targets": ["query"]},
        {"spectral_granularity": "head"},
        {"spectral_refresh_every": 10},
        {"spectral_init": "preserve"},
    ],
    ids=lambda stray: next(iter(stray)),
)
@pytest.mark.parametrize("flag", [{}, {"spectral_conditioning": False}], ids=["no flag", "False"])
def test_settings_without_the_flag_are_refused(stray, flag, stock_checkpoint):
    tiny = ARCHITECTURES["bert"]
    with pytest.raises(ValueError, match=f"{next(iter(stray))}=.*spectral_conditioning=True"):
        load(tiny, stock_checkpoint(tiny), **stray, **flag)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spectral_conditioning": "yes"}, "spectral_conditioning='yes'"),
        ({"spectral_conditioning": 1}, "spectral_conditioning=1"),
        ({"lambda_": 0}, "lambda_=0"),
        ({"lambda_": -1.0}, r"lambda_=-1\.0"),
        ({"lambda_": float("nan")}, "lambda_=nan"),
        ({"lambda_": True}, "lambda_=True"),
        ({"lambda_": "10"}, "lambda_='10'"),
        ({"lambda_": 1.0, "spectral_method": "svd"}, r"lambda_=1\.0"),
        ({"spectral_method": "qr"}, "method='qr'"),
        ({"spectral_granularity": "layer"}, "granularity='layer'"),
        ({"spectral_targets": ["outputs"]}, r"targets=\('outputs',\)"),
        ({"spectral_refresh_every": 5}, "refresh_every=5"),
        ({"spectral_init": "keep"}, "spectral_init='keep'"),
        (
            {"spectral_init": "preserve", "spectral_method": "svd", "spectral_refresh_every": 5},
            "spectral_refresh_every=5",
        ),
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong, message, stock_checkpoint):
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(stock_checkpoint(ARCHITECTURES["bert"]), **{"spectral_conditioning": True, **wrong})


@pytest.mark.parametrize(
    ("unsupported", "message"),
    [
        ({"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}, "quantization_config"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config"),
        ({"tp_plan": "auto"}, "tp_plan='auto'"),
        ({"tp_size": 2}, "tp_size=2"),
    ],
    ids=["quantization object", "quantization dict", "tp_plan", "tp_size"],
)
@pytest.mark.parametrize("conditioned", [False, True], ids=["stock checkpoint", "conditioned checkpoint"])
def test_quantization_and_tensor_parallelism_are_refused(
    unsupported, message, conditioned, stock_checkpoint, tmp_path
):
    path, flag = stock_checkpoint(ARCHITECTURES["llama"]), {"spectral_conditioning": True}
    if conditioned:
        AutoModel.from_pretrained(path, **flag).save_pretrained(tmp_path)
        path, flag = tmp_path, {}
    with pytest.raises(ValueError, match=f"{message}.*fold"):
        AutoModel.from_pretrained(path, **flag, **unsupported)


def test_a_quantized_stock_checkpoint_is_refused(stock_checkpoint, tmp_path):
    AutoModel.from_pretrained(stock_checkpoint(ARCHITECTURES["bert"])).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="quantization_config"):
        AutoModel.from_pretrained(tmp_path, spectral_conditioning=True)


@pytest.mark.parametrize("conditioned", [False, True], ids=["stock", "conditioned"])
def test_settings_beside_a_configuration_are_not_ignored(conditioned, stock_checkpoint):
    # As with any setting: where a configuration is given, it is what says so.
    path = stock_checkpoint(ARCHITECTURES["bert"])
    config = AutoConfig.from_pretrained(path, spectral_conditioning=conditioned)
    with pytest.raises((TypeError, ValueError), match="lambda_"):
        AutoModel.from_pretrained(path, config=config, lambda_=2.0)


def test_an_architecture_that_is_not_in_the_table_does_not_ignore_the_flag(tmp_path):
    config = transformers.FlaubertConfig(vocab_size=VOCABULARY, emb_dim=32, n_layers=1, n_heads=4)
    transformers.FlaubertModel(config).save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match="spectral_conditioning"):
        AutoModel.from_pretrained(tmp_path, spectral_conditioning=True)


# --- a transformers without the package ------------------------------------------------------------------------------

LOAD_WITHOUT_PACKAGE = textwrap.dedent("""
    import json, sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_specattn":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Absent())
    import torch, transformers

    results = []
    for job in json.load(open(sys.argv[1])):
        try:
            model = getattr(transformers, job["auto_name"]).from_pretrained(job["path"])
            with torch.no_grad():
                outputs = dict(model(**torch.load(job["batch"])))
            outputs = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
            results.append({"class": f"{type(model).__module__}.{type(model).__name__}", "outputs": outputs,
                            "config_class": type(model.config).__name__, "state": model.state_dict()})
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    assert not [name for name in sys.modules if name.startswith("hf_specattn")]
    torch.save(results, sys.argv[2])
""")
# A base model and one with a head, of each architecture.
TWO_HEADS = [
    (tiny, auto_name)
    for tiny in ARCHITECTURES.values()
    for auto_name in ("AutoModel", next(name for name in tiny.classes if "Classification" in name))
]
two_heads = pytest.mark.parametrize(("tiny", "auto_name"), TWO_HEADS, ids=str)
# Crammed BERT is this package's own architecture: no transformers without it knows even the stock type.
two_known_heads = pytest.mark.parametrize(
    ("tiny", "auto_name"), [head for head in TWO_HEADS if head[0].model_type != "crammed_bert"], ids=str
)


@pytest.fixture(scope="module")
def without_package(stock_checkpoint, tmp_path_factory):
    """(architecture, Auto class, kind of checkpoint) -> what one process that cannot import the package made of it."""
    folder = tmp_path_factory.mktemp("without_package")
    jobs = []
    for tiny, auto_name in TWO_HEADS:
        name = f"{tiny.model_type}-{auto_name}"
        paths = {"stock": stock_checkpoint(tiny, auto_name)}
        for kind, method in (("conditioned", "identity"), ("conditioned svd", "svd"), ("folded", "svd")):
            paths[kind] = folder / f"{name}-{kind}"
            model = load(tiny, paths["stock"], auto_name, spectral_conditioning=True, **SETTINGS[method])
            (fold(model) if kind == "folded" else model).save_pretrained(paths[kind])
        torch.save(tiny.batch(auto_name), folder / f"{name}.pt")
        jobs += [
            {"key": f"{name}-{kind}", "path": str(path), "auto_name": auto_name, "batch": str(folder / f"{name}.pt")}
            for kind, path in paths.items()
        ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, folder / "jobs.json", folder / "results.pt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {job["key"]: result for job, result in zip(jobs, torch.load(folder / "results.pt"))}


@two_known_heads
def test_importing_the_package_leaves_stock_models_bit_equal(tiny, auto_name, without_package, stock_checkpoint):
    expected = without_package[f"{tiny}-{auto_name}-stock"]
    model = load(tiny, stock_checkpoint(tiny, auto_name), auto_name)
    assert f"{type(model).__module__}.{type(model).__name__}" == expected["class"]
    assert type(model.config).__name__ == expected["config_class"]
    assert_bit_equal(model.state_dict(), expected["state"])
    assert_bit_equal(outputs_of(model, tiny.batch(auto_name)), expected["outputs"])


@two_heads
@pytest.mark.parametrize("kind", ["conditioned", "conditioned svd"])
def test_auto_classes_without_the_package_refuse(tiny, auto_name, kind, without_package):
    assert f"specattn_{tiny.model_type}" in without_package[f"{tiny}-{auto_name}-{kind}"]["error"]


@two_known_heads
def test_folded_checkpoints_need_no_package(tiny, auto_name, without_package):
    loaded = without_package[f"{tiny}-{auto_name}-folded"]
    stock = tiny.stock_class(auto_name)
    assert loaded["class"] == f"{stock.__module__}.{stock.__name__}"
    assert loaded["config_class"] == tiny.config_class.__name__
    expected = add_correction(tiny, tiny.model(auto_name), svd_by_numpy)
    assert relative_difference(loaded["outputs"], outputs_of(expected, tiny.batch(auto_name))) < 1e-10


# --- tokenizers, image processors, remote code -----------------------------------------------------------------------


def tiny_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "spectral", "attention"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("tiny", [t for t in ARCHITECTURES.values() if t.model_type != "vit"], ids=str)
def test_tokenizer_beside_a_conditioned_checkpoint(tiny, stock_checkpoint, tmp_path):
    conditioned = load(tiny, stock_checkpoint(tiny), spectral_conditioning=True)
    for folder in ("stock", "conditioned"):
        (conditioned if folder == "conditioned" else tiny.model()).save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    expected, tokenizer = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("stock", "conditioned"))
    assert type(tokenizer) is type(expected)
    assert tokenizer("attention attention spectral").input_ids == expected("attention attention spectral").input_ids
    # saved again from there, and loaded
    tokenizer.save_pretrained(tmp_path / "conditioned")
    again = AutoTokenizer.from_pretrained(tmp_path / "conditioned")
    assert type(again) is type(tokenizer)
    assert again("attention").input_ids == tokenizer("attention").input_ids


def test_tokenizer_class_follows_the_stock_type_where_only_a_vocabulary_lies(stock_checkpoint, tmp_path):
    load(ARCHITECTURES["bert"], stock_checkpoint(ARCHITECTURES["bert"]), spectral_conditioning=True).save_pretrained(
        tmp_path
    )
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "atten", "##tion"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, transformers.BertTokenizer)
    assert tokenizer("Attention").input_ids == [2, 5, 6, 3]


def test_image_processor_beside_a_conditioned_checkpoint(stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["vit"]
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    conditioned = load(tiny, stock_checkpoint(tiny), spectral_conditioning=True)
    for folder in ("stock", "conditioned"):
        (conditioned if folder == "conditioned" else tiny.model()).save_pretrained(tmp_path / folder)
        processor.save_pretrained(tmp_path / folder)
        # Older files do not name their class, and the configuration's type decides.
        path = tmp_path / folder / "preprocessor_config.json"
        fields = json.loads(path.read_text())
        fields.pop("image_processor_type")
        path.write_text(json.dumps(fields))
    expected, loaded = (AutoImageProcessor.from_pretrained(tmp_path / name) for name in ("stock", "conditioned"))
    assert type(loaded) is type(expected)
    image = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    pixels, expected_pixels = (p(image, return_tensors="pt").pixel_values for p in (loaded, expected))
    assert pixels.shape == (1, 3, 8, 8)
    assert torch.equal(pixels, expected_pixels)


REMOTE_MODEL = """
import torch
from transformers import BertConfig, BertModel

class OtherConfig(BertConfig):
    pass

class OtherModel(BertModel):
    config_class = OtherConfig

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state + 1
        return outputs
"""


@pytest.fixture
def remote_code_checkpoint(tmp_path, monkeypatch):
    """A repository of third-party code whose model type is "bert"."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "third_party_bert"
    ARCHITECTURES["bert"].model().save_pretrained(folder)
    (folder / "modeling_other.py").write_text(REMOTE_MODEL)
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "modeling_other.OtherConfig", "AutoModel": "modeling_other.OtherModel"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_third_party_code_of_a_stock_type_still_loads(remote_code_checkpoint):
    tiny = ARCHITECTURES["bert"]
    model = AutoModel.from_pretrained(remote_code_checkpoint, trust_remote_code=True)
    assert type(model).__name__ == "OtherModel"
    assert type(model.config).__name__ == "OtherConfig"
    output = outputs_of(model, tiny.batch())["last_hidden_state"]
    expected = outputs_of(tiny.model(), tiny.batch())["last_hidden_state"] + 1
    assert torch.equal(output, expected)
    # and stock code is what is used where third-party code is not trusted
    assert type(AutoModel.from_pretrained(remote_code_checkpoint, trust_remote_code=False)) is tiny.stock_class()


def test_third_party_code_does_not_ignore_the_flag(remote_code_checkpoint):
    with pytest.raises((TypeError, ValueError), match="spectral_conditioning"):
        AutoModel.from_pretrained(remote_code_checkpoint, trust_remote_code=True, spectral_conditioning=True)
