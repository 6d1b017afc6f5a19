"""Seeded random damage to checkpoints: none is taken in silence, and every command ends in one message with advice.

What no file, field or checksum can show is left out: another valid lambda of an identity model, a flipped bit of a weight.
"""

import contextlib
import json
import random
import shutil

import pytest
import torch
from models import ARCHITECTURES, outputs_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, logging

import specattn as cli
from hf_specattn import PreconditionerConfig, SpectralConfig, condition, precondition
from hf_specattn.config_fields import FIELDS, PRECONDITIONER_FIELDS, SPECTRAL_FIELDS

BERT = ARCHITECTURES["bert"]
KINDS = ("stock", "identity", "svd", "preconditioned", "both")
# Random configurations and damaged checkpoints: some always, 200 and 40 with the slow tests.
COUNTS = [pytest.param(0, 60), pytest.param(60, 200, marks=pytest.mark.slow)]
CHECKPOINT_COUNTS = [pytest.param(0, 20), pytest.param(20, 40, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Kind -> folder and outputs of a small checkpoint."""
    found = {}
    for kind in KINDS:
        model = BERT.model(dtype=torch.float32)
        if kind in ("identity", "svd", "both"):
            condition(model, SpectralConfig(lambda_=1.5) if kind == "identity" else SpectralConfig("svd"))
        if kind in ("preconditioned", "both"):
            precondition(model, PreconditionerConfig(scale="match" if kind == "both" else "unit"))
        folder = tmp_path_factory.mktemp("damage") / kind
        model.save_pretrained(folder)
        found[kind] = folder, outputs(model)
    return found


def outputs(model):
    return next(iter(outputs_of(model, BERT.batch(dtype=torch.float32)).values()))


@pytest.fixture
def specattn(capsys, monkeypatch):
    verbosity = logging.get_verbosity()

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["specattn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.err or captured.out

    yield run
    logging.set_verbosity(verbosity)


def check(folder, expected, specattn, what):
    """The commands end in one message, or what they read computes what was saved."""
    for command in (("inspect", folder), ("fold", folder, folder.parent / "folded")):
        code, said = specattn(*command)
        if code:
            check_message(said, what)
        elif command[0] == "inspect" or (folder.parent / "folded").exists():
            loaded = AutoModel.from_pretrained(folder if command[0] == "inspect" else folder.parent / "folded")
            gap = (outputs(loaded) - expected).abs().max().item()
            assert gap < 1e-5, (what, gap)
    loaded = None
    with contextlib.suppress(Exception):  # transformers' own, of its own fields
        loaded = AutoModel.from_pretrained(folder)
    assert loaded is None or torch.equal(outputs(loaded), expected), what


def check_message(said, what):
    assert said.startswith("error: "), (what, said)
    assert said.count("\n") == 1, (what, said)
    assert len(said) > 60, (what, said)  # what is wrong, and what to do


# --- configurations ---------------------------------------------------------------------------------------------------

WRONG = (
    None,
    True,
    -1,
    0,
    3.7,
    1e39,
    "x",
    "10",
    [],
    {},
    ["query", "bogus"],
    ["query", "query"],
    {"query": 1},
    float("nan"),
)
# A valid other lambda, or a null that is the default, is no damage that shows.
VALID = {
    "lambda_": (3.7, 1e39),
    "preconditioner_eps": (3.7, 1e39),
    "spectral_refresh_every": (),
    "attention_preconditioner": (),
}


def change_field(config, rng):
    name = rng.choice([name for name in FIELDS if name in config] or list(FIELDS))
    value = rng.choice([value for value in WRONG if value not in VALID.get(name, ())])
    config[name] = value


def add_field(config, rng):
    name = rng.choice([name for name in FIELDS if name not in config] or list(FIELDS))
    value = rng.choice([value for value in WRONG if value is not None and value not in VALID.get(name, ())])
    config[name] = value


def delete_field(config, rng):
    mine = [name for name in (*SPECTRAL_FIELDS, *PRECONDITIONER_FIELDS) if name in config]
    config.pop(rng.choice(mine or ["architectures"]))


def misspell_field(config, rng):
    name = rng.choice(FIELDS)
    place = rng.randrange(1, len(name) - 1)
    changed = rng.choice([name[:place] + name[place + 1 :], name[:place] + name[place] + name[place:]])
    config[changed] = config.pop(name, 0.3) if rng.random() < 0.5 else config.get(name, 0.3)


def add_stray(config, rng):
    config[rng.choice(["spectral_init", "spectral_lambda", "lambda", "spectral_target", "preconditioner_axis"])] = 0.3


def change_type(config, rng):
    config["model_type"] = rng.choice(
        ["bert", "specattn_", "specattn_nothing", "specattn_gpt2", 5, None, ["bert"], "x"]
    )


def break_stock_field(config, rng):
    name, values = rng.choice(
        [
            ("hidden_size", ["32", -1, None, [32], 7]),
            ("num_attention_heads", ["4", 0, 5, None, {}]),
            ("architectures", [None, [], "BertModel", ["Nothing"], ["BertModel", "GPT2Model"], 3]),
            ("auto_map", [5, "x", ["modeling.SpecBertModel"]]),
            ("num_hidden_layers", ["2", -1, {}]),
            ("quantization_config", [5, "int8", {"quant_method": "x"}]),
            ("dtype", ["float7", 5]),
        ]
    )
    config[name] = rng.choice(values)


CONFIG_CHANGES = (
    change_field, change_field, add_field, delete_field, misspell_field, add_stray, change_type, break_stock_field,
)  # fmt: skip


def broken_text(text, rng):
    return rng.choice(
        [text[: rng.randrange(len(text))], "", "[]", "5", "null", "{" * 3000, text[:-2] + ", NaN}", "\ufeff" + text]
    )


@pytest.mark.parametrize(("first", "last"), COUNTS)
def test_configurations(first, last, originals, specattn, tmp_path):
    for number in range(first, last):
        rng = random.Random(number)
        kind = KINDS[number % len(KINDS)]
        original, expected = originals[kind]
        folder = tmp_path / str(number) / "checkpoint"
        shutil.copytree(original, folder)
        file = folder / "config.json"
        if rng.random() < 0.15:
            file.write_text(broken_text(file.read_text(), rng))
            what = (number, kind, file.read_text()[:80])
        else:
            config, change = json.loads(file.read_text()), rng.choice(CONFIG_CHANGES)
            before = dict(config)
            change(config, rng)
            file.write_text(json.dumps(config))
            what = (number, kind, change.__name__, set(map(str, config.items())) ^ set(map(str, before.items())))
        check(folder, expected, specattn, what)
        shutil.rmtree(folder.parent)


# --- weights and the files beside them --------------------------------------------------------------------------------


def rewrite(folder, change, keep_metadata=True):
    """Change the tensors of the file, with the checksums of those that were there."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata if keep_metadata else {"format": "pt"})


def corrections(tensors):
    return sorted(name for name in tensors if name.endswith(".correction"))


def flip_a_bit_of_a_correction(folder, rng):
    def flip(tensors):
        values = tensors[rng.choice(corrections(tensors))].view(torch.int32).flatten()
        values[rng.randrange(len(values))] ^= 1 << rng.randrange(31)

    rewrite(folder, flip)


def drop_a_correction(folder, rng):
    rewrite(folder, lambda tensors: tensors.pop(rng.choice(corrections(tensors))), rng.random() < 0.5)


def transpose_a_correction(folder, rng):
    def transpose(tensors):
        name = rng.choice(corrections(tensors))
        tensors[name] = tensors[name].mT.contiguous()

    rewrite(folder, transpose)


def exchange_two_corrections(folder, rng):
    def exchange(tensors):
        one, other = rng.sample(corrections(tensors), 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]

    rewrite(folder, exchange)


def scale_an_entry_without_checksums(folder, rng):
    def scale(tensors):
        tensors[rng.choice(corrections(tensors))][0] *= 1.5

    rewrite(folder, scale, keep_metadata=False)


def add_a_correction(folder, rng):
    def add(tensors):
        weights = [name for name in tensors if name.endswith("attention.output.dense.weight")]
        tensors[rng.choice(weights).replace(".weight", ".correction")] = torch.eye(32)

    rewrite(folder, add, rng.random() < 0.5)


def nan_in_a_projection(folder, rng):
    def spoil(tensors):
        names = [name for name in tensors if name.endswith(("query.weight", "key.weight", "value.weight"))]
        tensors[rng.choice(names)][0, 0] = rng.choice([float("nan"), float("inf")])

    rewrite(folder, spoil)


def cut_off(folder, rng):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def break_the_header(folder, rng):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[rng.randrange(200)] ^= 0x55
    file.write_bytes(bytes(content))


def pickle_as_safetensors(folder, rng):
    torch.save({"weight": torch.zeros(3)}, folder / "model.safetensors")


def weights_gone(folder, rng):
    (folder / "model.safetensors").unlink()


def adapter_beside(folder, rng):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def broken_index(folder, rng):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    whole = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    lost = dict.fromkeys(names, "model-00002-of-00002.safetensors")
    contents = [[], 5, {"weight_map": whole["weight_map"]}, whole | {"weight_map": []}, whole | {"weight_map": lost}]
    (folder / "model.safetensors.index.json").write_text(json.dumps(rng.choice(contents)))


ON_CORRECTIONS = (
    flip_a_bit_of_a_correction,
    drop_a_correction,
    transpose_a_correction,
    exchange_two_corrections,
    scale_an_entry_without_checksums,
)
ON_ANY = (
    add_a_correction, nan_in_a_projection, cut_off, break_the_header, pickle_as_safetensors, weights_gone, adapter_beside,
    broken_index,
)  # fmt: skip


@pytest.mark.parametrize(("first", "last"), CHECKPOINT_COUNTS)
def test_checkpoints(first, last, originals, specattn, tmp_path):
    for number in range(first, last):
        rng = random.Random(number)
        kind = KINDS[number % len(KINDS)]
        changes = (*ON_ANY, *ON_CORRECTIONS, *ON_CORRECTIONS) if kind in ("svd", "both") else ON_ANY
        change = changes[number % len(changes)]
        original, expected = originals[kind]
        folder = tmp_path / str(number) / "checkpoint"
        shutil.copytree(original, folder)
        change(folder, rng)
        code, said = specattn("inspect", folder)
        if code:
            check_message(said, (number, kind, change.__name__))
        else:  # a name in the header is another one
            assert change is break_the_header, (number, kind, change.__name__)
            whole = torch.equal(outputs(AutoModel.from_pretrained(folder)), expected)
            assert whole or "not in the checkpoint" in said, (number, kind, said)
        if change in ON_CORRECTIONS or (change is add_a_correction and kind != "stock"):
            with pytest.raises(ValueError, match=r"damaged|missing|does not mention"):
                AutoModel.from_pretrained(folder)
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("change", [*ON_ANY, *ON_CORRECTIONS], ids=lambda change: change.__name__)
def test_each_damage_of_an_svd_checkpoint_ends_in_one_message(change, originals, specattn, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(originals["svd"][0], folder)
    change(folder, random.Random(2))
    code, said = specattn("fold", folder, tmp_path / "folded")
    assert code == 1
    check_message(said, change.__name__)
    assert not (tmp_path / "folded").exists()
