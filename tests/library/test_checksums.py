"""svd corrections: a checksum each, renewed on every save; damage is an error, with a checksum or without."""

import json
import shutil
import warnings

import pytest
import torch
from models import ARCHITECTURES, each_architecture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from hf_specattn import SpectralConfig, condition, fold, refresh
from hf_specattn.checkpoints.conversion import convert, fold_checkpoint
from hf_specattn.checkpoints.inspection import inspect_checkpoint
from hf_specattn.checksums import KEY, checksum
from hf_specattn.layers import spectral_layers

pytestmark = pytest.mark.integration  # transformers saves, loads and dispatches

BERT = ARCHITECTURES["bert"]
QUERY = "encoder.layer.0.attention.self.query.correction"
OTHER = "encoder.layer.1.attention.self.query.correction"


def conditioned(tiny=BERT, dtype=torch.float32, **settings):
    model = tiny.model(dtype=dtype)
    condition(model, SpectralConfig("svd", **settings))
    return model


def content_of(file):
    with safe_open(file, framework="pt") as stream:
        return stream.metadata(), load_file(file)


def assert_all_checked(folder):
    """Each correction in the folder has a checksum of its own bytes."""
    count = 0
    for file in folder.glob("*.safetensors"):
        metadata, tensors = content_of(file)
        names = {name for name in tensors if name.endswith(".correction")}
        assert {key for key in metadata if key.startswith(KEY)} == {KEY + name for name in names}
        assert metadata["format"] == "pt"
        for name in names:
            assert metadata[KEY + name] == checksum(tensors[name])
        count += len(names)
    return count


def rewrite(folder, change, keep_metadata):
    """Change a checkpoint's tensors in place, keeping the metadata or, as most tools do, only the format."""
    (file,) = folder.glob("*.safetensors")
    metadata, tensors = content_of(file)
    tensors = change(tensors)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        file,
        metadata=metadata if keep_metadata else {"format": "pt"},
    )


def test_a_checksum_is_of_dtype_shape_and_bytes():
    tensor = torch.arange(6.0).reshape(2, 3)
    # sha256 of "float32 [2, 3] " and the 24 bytes, by another program.
    import hashlib

    expected = hashlib.sha256(b"float32 [2, 3] " + tensor.numpy().tobytes()).hexdigest()
    assert checksum(tensor) == expected
    others = [tensor.T, tensor.reshape(3, 2), tensor.double(), tensor.view(torch.int32), tensor.bfloat16()]
    assert len({expected, *map(checksum, others)}) == 6


# --- saving ----------------------------------------------------------------------------------------------------------


@each_architecture
def test_every_save_renews_the_checksums(tiny, tmp_path):
    model = conditioned(tiny, refresh_every=1)
    model.save_pretrained(tmp_path / "first")
    count = assert_all_checked(tmp_path / "first")
    assert count == len(list(spectral_layers(model)))
    with torch.no_grad():
        for _, layer in spectral_layers(model):
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    refresh(model)
    model.save_pretrained(tmp_path / "second")
    loaded = AutoModel.from_pretrained(tmp_path / "second")
    loaded.bfloat16().save_pretrained(tmp_path / "third")
    again = AutoModel.from_pretrained(tmp_path / "third", dtype=torch.float32)
    again.save_pretrained(tmp_path / "second")  # over another
    for name in ("first", "second", "third"):
        assert assert_all_checked(tmp_path / name) == count
        AutoModel.from_pretrained(tmp_path / name)


def test_sharded_variants_and_given_state_dicts(tmp_path, warning_log):
    model = conditioned()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert assert_all_checked(tmp_path / "sharded") == 6
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    model.save_pretrained(tmp_path / "both", variant="fp32", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "state", state_dict={k: v.double() for k, v in model.state_dict().items()})
    for name in ("variant", "both", "state"):
        assert assert_all_checked(tmp_path / name) == 6
    for name in ("sharded", "variant", "both", "state"):
        variant = "fp32" if name in ("variant", "both") else None
        loaded = AutoModel.from_pretrained(tmp_path / name, variant=variant)
        assert len(list(spectral_layers(loaded))) == 6
    assert not [message for message in warning_log.messages if "checksum" in message]


def test_identity_and_stock_models_have_no_checksums(tmp_path, warning_log):
    model = BERT.model()
    model.save_pretrained(tmp_path / "stock")
    condition(model, SpectralConfig(lambda_=1.0))
    model.save_pretrained(tmp_path / "identity")
    AutoModel.from_pretrained(tmp_path / "identity")
    fold(model).save_pretrained(tmp_path / "folded")
    for name in ("stock", "identity", "folded"):
        assert content_of(tmp_path / name / "model.safetensors")[0] == {"format": "pt"}
    assert not [message for message in warning_log.messages if "checksum" in message]


def test_loading_for_another_number_of_labels(tmp_path):
    conditioned().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vocab_size += 3
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert len(list(spectral_layers(loaded))) == 6


# --- damage, with checksums ------------------------------------------------------------------------------------------


def flipped(tensors):
    changed = tensors[QUERY].clone()
    changed.view(torch.int32)[3, 5] ^= 1  # the last bit
    return {**tensors, QUERY: changed}


DAMAGES = {
    "a bit": flipped,
    "transposed": lambda tensors: {**tensors, QUERY: tensors[QUERY].T},
    "another layer's": lambda tensors: {**tensors, QUERY: tensors[OTHER], OTHER: tensors[QUERY]},
    "nan": lambda tensors: {**tensors, QUERY: torch.full_like(tensors[QUERY], torch.nan)},
    "one nan": lambda tensors: {**tensors, QUERY: tensors[QUERY].index_fill(0, torch.tensor([1]), torch.nan)},
    "zero": lambda tensors: {**tensors, QUERY: torch.zeros_like(tensors[QUERY])},
    "rounded": lambda tensors: {**tensors, QUERY: tensors[QUERY].bfloat16()},
    "negated": lambda tensors: {**tensors, QUERY: -tensors[QUERY]},
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("refresh_every", [None, 5])
def test_damage_is_an_error_wherever_a_checkpoint_is_read(damage, refresh_every, tmp_path):
    conditioned(refresh_every=refresh_every).save_pretrained(tmp_path / "c")
    rewrite(tmp_path / "c", DAMAGES[damage], keep_metadata=True)
    message = r"model\.safetensors is damaged: encoder\.layer\.\d\.attention\.self\.query\.correction has a different"
    for read in (
        lambda: AutoModel.from_pretrained(tmp_path / "c"),
        lambda: AutoModel.from_pretrained(tmp_path / "c", dtype=torch.bfloat16),
        lambda: AutoModelForMaskedLM.from_pretrained(tmp_path / "c"),
        lambda: fold_checkpoint(str(tmp_path / "c"), tmp_path / "f"),
        lambda: inspect_checkpoint(str(tmp_path / "c")),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert not (tmp_path / "f").exists()


def test_a_flipped_bit_in_a_sharded_file(tmp_path):
    conditioned().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"][QUERY]
    metadata, tensors = content_of(file)
    save_file(flipped(tensors), file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: {QUERY}"):
        AutoModel.from_pretrained(tmp_path)


def test_a_checksum_whose_tensor_is_gone(tmp_path):
    conditioned().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != QUERY}, keep_metadata=True)
    with pytest.raises(ValueError, match="correction"):
        AutoModel.from_pretrained(tmp_path)


def test_converted_checkpoints_have_checksums(tmp_path):
    BERT.model(dtype=torch.float32).save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    convert(str(tmp_path / "stock"), tmp_path / "c", SpectralConfig("svd"))
    assert assert_all_checked(tmp_path / "c") == 6
    assert "each with the checksum" in inspect_checkpoint(str(tmp_path / "c")).facts["corrections"]
    AutoModel.from_pretrained(tmp_path / "c")
    fold_checkpoint(str(tmp_path / "c"), tmp_path / "f")
    assert assert_all_checked(tmp_path / "f") == 0


# --- without checksums -----------------------------------------------------------------------------------------------


def unchanged(tensors):
    return tensors


@each_architecture
@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("targets", [("query", "key", "value"), ("key",)])
def test_older_files_load_with_a_warning(tiny, granularity, targets, tmp_path, warning_log):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        conditioned(tiny, granularity=granularity, targets=targets).to(dtype).save_pretrained(folder)
        rewrite(folder, unchanged, keep_metadata=False)
        warning_log.messages.clear()
        AutoModel.from_pretrained(folder, dtype=torch.float32)
        (message,) = [message for message in warning_log.messages if "checksum" in message]
        assert "without a checksum" in message
        assert "this does not prove that it belongs to its layer, is not transposed and has the right scale" in message


def test_older_files_of_a_dynamic_correction_by_products(tmp_path):
    model = conditioned(refresh_every=1)
    refresh(model, exact=False)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, unchanged, keep_metadata=False)
    AutoModel.from_pretrained(tmp_path)
    assert "all without a checksum" in inspect_checkpoint(str(tmp_path)).facts["corrections"]


def large_bit(tensors):
    changed = tensors[QUERY].clone()
    changed.view(torch.int32)[3, 5] ^= 1 << 28  # of the exponent
    return {**tensors, QUERY: changed}


def other_sign(tensors):
    changed = tensors[QUERY].clone()
    row, column = divmod(int(changed.abs().argmax()), changed.shape[1])
    changed[row, column] *= -1
    return {**tensors, QUERY: changed}


SEEN_WITHOUT = {
    "an exponent's bit": large_bit,
    "a sign": other_sign,
    "nan": DAMAGES["nan"],
    "one nan": DAMAGES["one nan"],
    "zero": DAMAGES["zero"],
    "a row": lambda tensors: {**tensors, QUERY: tensors[QUERY].index_fill(0, torch.tensor([1]), 0.0)},
    "the weight": lambda tensors: {**tensors, QUERY: tensors[QUERY.replace(".correction", ".weight")]},
    "scaled rows": lambda tensors: {**tensors, QUERY: tensors[QUERY] * torch.linspace(1, 2, 32)[:, None]},
}


@pytest.mark.parametrize("damage", SEEN_WITHOUT)
@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damage_that_older_files_show(damage, granularity, dtype, tmp_path):
    conditioned(granularity=granularity).save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {k: v.to(dtype) for k, v in SEEN_WITHOUT[damage](tensors).items()},
        keep_metadata=False,
    )
    with pytest.raises(ValueError, match=r"is damaged: encoder\.layer\.0\.attention\.self\.query\.correction"):
        AutoModel.from_pretrained(tmp_path)


def test_rows_that_are_no_target(tmp_path):
    tiny = ARCHITECTURES["gpt2"]
    conditioned(tiny, targets=("query",)).save_pretrained(tmp_path)

    def change(tensors):
        (name, *_) = [name for name in tensors if name.endswith(".correction")]
        changed = tensors[name].clone()
        changed[0, -1] = 1e-6  # of value
        return {**tensors, name: changed}

    rewrite(tmp_path, change, keep_metadata=False)
    with pytest.raises(ValueError, match=r"damaged: .*\(value\) is not zero"):
        AutoModel.from_pretrained(tmp_path)


def test_pickles_and_state_dicts(tmp_path, warning_log):
    model = conditioned()
    model.save_pretrained(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "p")
    state = load_file(tmp_path / "p" / "model.safetensors")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "p" / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModel.from_pretrained(tmp_path / "p")
    assert any("all without a checksum" in message for message in warning_log.messages)
    state[QUERY] = torch.full_like(state[QUERY], torch.nan)
    with pytest.raises(ValueError, match=r"state dict is damaged.*nan"):
        type(model).from_pretrained(None, config=model.config, state_dict=state)


def test_the_same_model_gives_the_same_file(tmp_path):
    """safetensors keeps the metadata in a hash map, whose order changes from one save to the next."""
    model = conditioned()
    for number in range(3):
        model.save_pretrained(tmp_path / str(number))
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[1] == files[2]
    header = json.loads(files[0][8 : 8 + int.from_bytes(files[0][:8], "little")])
    keys = list(header["__metadata__"])
    assert keys == sorted(keys)
    assert len(keys) == 1 + 3 * BERT.layers
    assert_all_checked(tmp_path / "0")


def test_a_release_that_writes_otherwise(monkeypatch, tmp_path, warning_log):
    from hf_specattn import compat

    compat.logger.warning_once.cache_clear()
    monkeypatch.delattr("transformers.modeling_utils.safe_save_file")
    compat.add_metadata_on_save(lambda tensors, metadata: None, lambda file: None)
    assert any("without checksums" in message for message in warning_log.messages)
