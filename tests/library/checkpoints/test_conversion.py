"""Conversions of tiny checkpoints: shards, dtypes, Llama, heads, what is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    add_correction,
    assert_bit_equal,
    each_method,
    identity_by_numpy,
    outputs_of,
    relative_difference,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertGenerationConfig,
    BertGenerationEncoder,
    LlamaForCausalLM,
)

from hf_specattn import OutputChangedError, SpectralConfig, balance, condition
from hf_specattn.checkpoints import conversion, destinations
from hf_specattn.checkpoints.conversion import Options, balance_checkpoint, convert, fold_checkpoint
from hf_specattn.checkpoints.destinations import DestinationError
from hf_specattn.checkpoints.source_checkpoint import SourceError, find_source

BERT, LLAMA = ARCHITECTURES["bert"], ARCHITECTURES["llama"]
MASKED_LM = "AutoModelForMaskedLM"


@pytest.fixture
def bert(stock_checkpoint):
    return str(stock_checkpoint(BERT))


def weights_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", ARCHITECTURES.values(), ids=str)
@each_method
def test_additive_is_w_plus_c_and_folds_to_it(tiny, method, stock_checkpoint, tmp_path):
    source = stock_checkpoint(tiny)
    convert(str(source), tmp_path / "conditioned", SpectralConfig(method))
    fold_checkpoint(str(tmp_path / "conditioned"), tmp_path / "folded")
    expected = add_correction(tiny, tiny.model(), CORRECTIONS[method])
    batch = tiny.batch()
    for name in ("conditioned", "folded"):
        loaded = AutoModel.from_pretrained(tmp_path / name, dtype="auto")
        assert type(loaded).__name__ == ("Spec" if name == "conditioned" else "") + tiny.classes["AutoModel"]
        assert relative_difference(outputs_of(loaded, batch), outputs_of(expected, batch)) < 1e-9
    # the source's names for the tensors (ViT's are not those of its modules), and none more
    stock = load_file(source / "model.safetensors")
    assert weights_of(tmp_path / "folded").keys() == stock.keys()
    corrections = weights_of(tmp_path / "conditioned").keys() - stock.keys()
    assert len(corrections) == {"identity": 0, "svd": 2 if tiny.fused else 6}[method]
    assert all(name.replace(".correction", ".weight") in stock for name in corrections)


@pytest.mark.parametrize("auto_name", ["AutoModelForMultipleChoice", "AutoModelForCausalLM"])
def test_heads_keep_theirs(auto_name, stock_checkpoint, tmp_path):
    source = stock_checkpoint(BERT, auto_name)
    convert(str(source), tmp_path / "head", SpectralConfig(lambda_=2.0), "preserve")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["architectures"] == [f"Spec{BERT.classes[auto_name]}"]
    assert weights_of(tmp_path / "head").keys() == load_file(source / "model.safetensors").keys()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    BERT.model(MASKED_LM, torch.float32).save_pretrained(folder, max_shard_size="30KB")
    return folder


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_shards_stay_what_they_were(sharded, tmp_path):
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(names) >= 3
    convert(str(sharded), tmp_path / "conditioned", SpectralConfig("svd"))
    fold_checkpoint(str(tmp_path / "conditioned"), tmp_path / "folded")
    balance_checkpoint(str(sharded), tmp_path / "balanced")
    source = index_of(sharded)
    for folder in (tmp_path / "folded", tmp_path / "balanced"):
        assert sorted(path.name for path in folder.glob("*.safetensors")) == names
        assert index_of(folder) == source
    conditioned = index_of(tmp_path / "conditioned")
    assert {name: file for name, file in conditioned.items() if not name.endswith(".correction")} == source
    corrections = [name for name in conditioned if name.endswith(".correction")]
    assert len(corrections) == 6
    for name in corrections:  # beside its weight
        assert conditioned[name] == source[name.replace(".correction", ".weight")]
    for name, file in conditioned.items():
        assert name in load_file(tmp_path / "conditioned" / file)
    expected = add_correction(BERT, BERT.model(MASKED_LM, torch.float32), CORRECTIONS["svd"])
    for folder in (tmp_path / "conditioned", tmp_path / "folded"):
        outputs = outputs_of(AutoModelForMaskedLM.from_pretrained(folder), BERT.batch(MASKED_LM))
        assert relative_difference(outputs, outputs_of(expected, BERT.batch(MASKED_LM))) < 1e-5


def test_llama_is_balanced_in_value_and_output_alone(stock_checkpoint, tmp_path):
    source = stock_checkpoint(LLAMA, "AutoModelForCausalLM")
    result = balance_checkpoint(str(source), tmp_path / "balanced")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "balanced" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "vo"}
    for layer in (0, 1):
        weight = after[f"model.layers.{layer}.self_attn.v_proj.weight"].numpy()
        heads = weight.reshape(LLAMA.key_value_heads, -1, weight.shape[1])
        assert np.linalg.cond(heads) == pytest.approx(np.ones(LLAMA.key_value_heads), rel=1e-9)
    assert "left alone: rotary position embeddings" in result.table
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "balanced", dtype="auto")
    expected = LLAMA.model("AutoModelForCausalLM")
    batch = LLAMA.batch()
    assert relative_difference(outputs_of(loaded, batch), outputs_of(expected, batch)) < 1e-12


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    """In bf16, although config.json, as older ones do, names another type."""
    folder = tmp_path_factory.mktemp("bfloat16")
    BERT.model("AutoModel", torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def test_bfloat16_stays_and_its_cost_is_said(bfloat16, tmp_path):
    result = convert(str(bfloat16), tmp_path / "preserve", SpectralConfig(lambda_=10.0), "preserve")
    stored, source = (weights_of(folder) for folder in (tmp_path / "preserve", bfloat16))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # what survives of the diagonals, by NumPy: each is rounded next to 10
    errors = []
    for name in sorted(source):
        if name.endswith(("query.weight", "key.weight", "value.weight")):
            weight = source[name].float().numpy()
            recovered = stored[name].float().numpy() + 10 * np.eye(*weight.shape)
            errors.append(np.abs(np.diag(recovered - weight)).mean() / np.abs(np.diag(weight)).mean())
            assert_bit_equal(
                {"off": stored[name] - torch.diag(stored[name].diag())},
                {"off": source[name] - torch.diag(source[name].diag())},
            )
    note = next(note for note in result.notes if "mean relative error" in note)
    assert f"mean relative error of {np.mean(errors):.2g}" in note
    assert result.comparison.dtype_error > 1e-4
    assert result.comparison.tolerance == pytest.approx(4 * max(result.comparison.dtype_error, 2.0**-7))
    folded = fold_checkpoint(str(tmp_path / "preserve"), tmp_path / "folded")
    assert any("the folded weights" in note for note in folded.notes)


def test_another_dtype(bfloat16, tmp_path):
    result = convert(str(bfloat16), tmp_path / "wide", SpectralConfig(), "preserve", Options(dtype=torch.float32))
    assert {tensor.dtype for tensor in weights_of(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert not any("mean relative error" in note for note in result.notes)


def test_too_coarse_a_dtype_writes_nothing(bfloat16, tmp_path):
    with pytest.raises(OutputChangedError, match="--dtype float32"):
        convert(str(bfloat16), tmp_path / "new", SpectralConfig(lambda_=1e5), "preserve")
    assert list(tmp_path.iterdir()) == []


def test_mixed_dtypes_are_said(bert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    name = "embeddings.LayerNorm.weight"
    weights = {key: value.float() for key, value in weights.items()} | {name: weights[name].half()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    result = balance_checkpoint(str(source), tmp_path / "new")
    assert any("mixes float16, float32; everything was loaded and written in float32" in note for note in result.notes)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "new").values()} == {torch.float32}


def test_tensors_that_the_source_lacks_are_not_invented(bert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    del weights["pooler.dense.bias"]
    save_file({**weights, "cls.extra": torch.zeros(2)}, source / "model.safetensors", metadata={"format": "pt"})
    result = convert(str(source), tmp_path / "new", SpectralConfig())
    assert weights_of(tmp_path / "new").keys() == weights.keys()
    assert any("pooler.dense.bias" in note for note in result.notes)
    assert any("cls.extra" in note and "left out" in note for note in result.notes)


def test_pickles_are_refused_unless_asked_for(bert, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(f"{bert}/config.json", source)
    torch.save(load_file(f"{bert}/model.safetensors"), source / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin only, a pickle.*--allow-pickle"):
        convert(str(source), tmp_path / "new", SpectralConfig())
    convert(str(source), tmp_path / "new", SpectralConfig(), options=Options(allow_pickle=True))
    assert_bit_equal(weights_of(tmp_path / "new"), load_file(f"{bert}/model.safetensors"))


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_with_code_is_not_run(bert, tmp_path, capsys):
    shutil.copy(f"{bert}/config.json", tmp_path)
    torch.save({"weight": torch.zeros(1), "code": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin cannot be read with weights_only"):
        find_source(str(tmp_path), allow_pickle=True)
    assert "executed" not in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------------------------


def edited_config(**changes):
    def edit(folder):
        file = folder / "config.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return edit


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupted(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 100 + file.read_bytes()[100:])


def not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.attention.self.key.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["pooler.dense.bias"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_projection(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.value.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def stored_as(dtype):
    def store(folder):
        weights = load_file(folder / "model.safetensors")
        name = "encoder.layer.1.attention.self.value.weight"
        weights[name] = weights[name].to(dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return store


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a checkpoint: it has no config.json"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "adapter": (adapter, "is a PEFT adapter"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "truncated": (truncated, r"model.safetensors is truncated or corrupted"),
    "corrupted": (corrupted, r"model.safetensors is truncated or corrupted"),
    "not finite": (not_finite, "nan"),
    "other shape": (other_shape, "pooler.dense.bias"),
    "projection missing": (without_a_projection, "encoder.layer.1.attention.self.value.weight"),
    "quantized": (
        edited_config(quantization_config={"quant_method": "bitsandbytes"}),
        "method 'bitsandbytes'.*not supported",
    ),
    "float8": (stored_as(torch.float8_e4m3fn), "value.weight is stored as F8_E4M3.*not supported"),
    "integers": (stored_as(torch.int64), "damaged: .*value.weight is stored as I64"),
    "complex": (stored_as(torch.complex64), "damaged: .*value.weight is stored as C64"),
    "truth values": (stored_as(torch.bool), "damaged: .*value.weight is stored as BOOL"),
    "deep config": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is damaged"),
    "no architectures": (edited_config(architectures=None), '"architectures".*is None'),
    "unknown class": (edited_config(architectures=["MyModel"]), r"MyModel.*architecture=AttentionSpec"),
    "no model type": (edited_config(model_type=None), "names no model_type"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_source_is_refused(name, bert, tmp_path):
    damage, message = DAMAGE[name]
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    damage(source)
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "new", SpectralConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_weights_beyond_the_dtype_asked_for_are_refused_as_such(bert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.1.attention.self.value.weight"][0, 0] = 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SourceError, match=r"value.weight has nan or inf entries as torch.float16.*too narrow \(--dtype\)"
    ):
        convert(str(source), tmp_path / "new", SpectralConfig(), options=Options(dtype=torch.float16))


def test_a_pickle_of_integers_is_refused(bert, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.1.attention.self.value.weight"] = torch.ones(32, 32, dtype=torch.int64)
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"value.weight is stored as torch.int64"):
        convert(str(source), tmp_path / "new", SpectralConfig(), options=Options(allow_pickle=True))


@pytest.mark.parametrize("damage", ["missing", "truncated", "lost tensor", "tensor of another"])
def test_a_damaged_shard_is_named(damage, sharded, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    shard = sorted(source.glob("*.safetensors"))[2]
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "tensor of another":
        first = load_file(sorted(source.glob("*.safetensors"))[0])
        name = next(iter(first))
        save_file({**load_file(shard), name: first[name] + 1}, shard, metadata={"format": "pt"})
    else:
        weights = load_file(shard)
        weights.popitem()
        save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=shard.name):
        balance_checkpoint(str(source), tmp_path / "new")


def test_an_architecture_that_the_table_does_not_know(tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 48,
    }
    BertGenerationEncoder(BertGenerationConfig(**sizes)).save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=r"BertGenerationEncoder.*no conditioned class.*AttentionSpec"):
        convert(str(tmp_path / "source"), tmp_path / "new", SpectralConfig())
    with pytest.raises(ValueError, match="AttentionSpec"):
        balance_checkpoint(str(tmp_path / "source"), tmp_path / "new")


def test_what_is_conditioned_already_and_what_is_not(bert, tmp_path):
    convert(bert, tmp_path / "conditioned", SpectralConfig())
    with pytest.raises(SourceError, match=r"already conditioned.*fold"):
        convert(str(tmp_path / "conditioned"), tmp_path / "twice", SpectralConfig())
    with pytest.raises(SourceError, match=r"conditioned.*fold"):
        balance_checkpoint(str(tmp_path / "conditioned"), tmp_path / "twice")
    with pytest.raises(SourceError, match=r"not conditioned.*nothing to fold"):
        fold_checkpoint(bert, tmp_path / "twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conditioned"]


@pytest.mark.parametrize("name", ["nobody/nothing", "not//a name", "config.json"])
def test_neither_folder_nor_model(name, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(bert)
    with pytest.raises(SourceError, match=r"could not be fetched|neither a folder|is a file"):
        convert(name, tmp_path / "new", SpectralConfig())


@pytest.mark.parametrize(
    ("settings", "init"), [({"method": "identity", "lambda_": -1.0}, "additive"), ({}, "sideways")]
)
def test_bad_settings(settings, init, bert, tmp_path):
    with pytest.raises(ValueError, match=r"-1\.0|sideways"):
        convert(bert, tmp_path / "new", SpectralConfig(**settings), init)


# --- the destination --------------------------------------------------------------------------------------------------


def test_the_destination_is_guarded(bert, tmp_path):
    source = tmp_path / "outer" / "source"
    shutil.copytree(bert, source)
    before = {path: path.read_bytes() for path in source.iterdir()}
    for destination in (source, tmp_path / "outer", tmp_path / "outer" / "elsewhere" / ".." / "source"):
        with pytest.raises(DestinationError, match="SRC"):
            balance_checkpoint(str(source), destination, Options(overwrite=True))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationError, match="is a file"):
        balance_checkpoint(str(source), tmp_path / "file", Options(overwrite=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationError, match=r"not empty.*--overwrite"):
        balance_checkpoint(str(source), tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    balance_checkpoint(str(source), tmp_path / "full", Options(overwrite=True))
    assert not (tmp_path / "full" / "thesis.txt").exists()  # replaced as a whole
    (tmp_path / "empty").mkdir()
    balance_checkpoint(str(source), tmp_path / "empty")
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "outer"]


def test_an_error_while_writing_leaves_nothing(bert, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_card", full)
    with pytest.raises(DestinationError, match="not enough space"):
        convert(bert, tmp_path / "new", SpectralConfig())
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_found_before_any_work(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(destinations.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DestinationError, match=r"0\.0 MB are free"):
        convert(bert, tmp_path / "new", SpectralConfig())


# --- the settings reach the model -------------------------------------------------------------------------------------


def test_targets_granularity_and_lambda(bert, tmp_path):
    numbers = {"query": 1.0, "value": 3.0}
    config = SpectralConfig(lambda_=numbers, targets=("query", "value"), granularity="head")
    convert(bert, tmp_path / "new", config)
    loaded = AutoModel.from_pretrained(tmp_path / "new", dtype="auto")
    assert loaded.config.spectral_config == config
    expected = add_correction(BERT, BERT.model(), identity_by_numpy(numbers), ("query", "value"), per_head=True)
    assert relative_difference(outputs_of(loaded, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-12


def test_it_is_what_condition_and_balance_do(bert, tmp_path):
    convert(bert, tmp_path / "conditioned", SpectralConfig(), "preserve")
    model = BERT.model()
    condition(model, SpectralConfig(), "preserve")
    assert_bit_equal(weights_of(tmp_path / "conditioned"), dict(model.state_dict()))
    balance_checkpoint(bert, tmp_path / "balanced")
    model = BERT.model()
    balance(model)
    assert_bit_equal(weights_of(tmp_path / "balanced"), dict(model.state_dict()))
    assert type(AutoModel.from_pretrained(tmp_path / "balanced").config) is BertConfig
