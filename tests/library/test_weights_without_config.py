"""Weights without a config.json, in a folder, on the Hub, in a pickle or in memory: C is neither lost nor invented."""

import shutil

import pytest
import torch
from models import ARCHITECTURES, each_method, outputs_of, relative_difference
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_specattn.conditioning import conditioned_counterpart

pytestmark = pytest.mark.integration

BERT = ARCHITECTURES["bert"]
SETTINGS = {"identity": {"lambda_": 2.0}, "svd": {"spectral_method": "svd"}}
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def checkpoints(stock_checkpoint, tmp_path_factory):
    folders = {"stock": stock_checkpoint(BERT)}
    for method, settings in SETTINGS.items():
        folders[method] = tmp_path_factory.mktemp(method)
        model = AutoModel.from_pretrained(folders["stock"], spectral_conditioning=True, **settings)
        model.save_pretrained(folders[method])
    return folders


@pytest.fixture(params=["folder", "hub", "pickle", "memory"])
def load(request, checkpoints, tmp_path):
    """A function: loads the weights of one checkpoint with the configuration of another, and keyword arguments."""

    def loaded(weights, config, **kwargs):
        file = checkpoints[weights] / "model.safetensors"
        config = AutoConfig.from_pretrained(checkpoints[config])
        if request.param == "memory":
            stock = BERT.stock_class()
            model_class = stock if type(config) is stock.config_class else conditioned_counterpart(stock)
            return model_class.from_pretrained(None, config=config, state_dict=load_file(file), **kwargs)
        path = folder = tmp_path / "weights"
        if request.param == "hub":
            hub = tmp_path / "cache" / "models--owner--model"
            path, folder = "owner/model", hub / "snapshots" / COMMIT
            (hub / "refs").mkdir(parents=True)
            (hub / "refs" / "main").write_text(COMMIT)
            kwargs |= {"cache_dir": tmp_path / "cache", "local_files_only": True}
        folder.mkdir(parents=True)
        if request.param == "pickle":
            torch.save(load_file(file), folder / "pytorch_model.bin")
        else:
            shutil.copy(file, folder)
        return AutoModel.from_pretrained(path, config=config, **kwargs)

    return loaded


def assert_computes(model, folder):
    expected = AutoModel.from_pretrained(folder)
    assert relative_difference(outputs_of(model, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-12


@each_method
def test_a_conditioned_configuration_says_that_the_weights_are_conditioned(method, load, checkpoints, warning_log):
    assert_computes(load(method, method), checkpoints[method])
    assert not any("needs training" in message for message in warning_log.messages)
    # No tensor shows that the weights of identity were trained with it.
    assert any("nothing proves it" in message for message in warning_log.messages) == (method == "identity")


def test_corrections_are_not_invented(load):
    with pytest.raises(
        ValueError, match=r"by the configuration given.*6 correction.*missing.*spectral_init='additive'"
    ):
        load("stock", "svd")


@each_method
@pytest.mark.parametrize("init", ["additive", "preserve"])
def test_spectral_init_says_that_the_weights_are_stock(method, init, load, checkpoints):
    assert_computes(load("stock", method, spectral_init=init), checkpoints[method if init == "additive" else "stock"])


@each_method
@pytest.mark.parametrize("init", [{}, {"spectral_init": "preserve"}], ids=["additive", "preserve"])
def test_a_stock_configuration_beside_the_flag_says_that_the_weights_are_stock(method, init, load, checkpoints):
    model = load("stock", "stock", spectral_conditioning=True, **SETTINGS[method], **init)
    assert_computes(model, checkpoints["stock" if init else method])


@pytest.mark.parametrize(
    "how",
    [
        {"config": "stock"},
        {"config": "stock", "spectral_conditioning": True, "spectral_method": "svd"},
        {"config": "stock", "spectral_conditioning": True, "lambda_": 2.0},
        {"config": "svd", "spectral_init": "additive"},
        {"config": "svd", "spectral_init": "preserve"},
        {"config": "identity", "spectral_init": "additive"},
    ],
    ids=str,
)
def test_corrections_are_not_lost(how, load):
    with pytest.raises(ValueError, match=r"holds 6 correction\(s\) of a conditioned model.*without spectral_init"):
        load("svd", **how)


def test_corrections_beside_another_method_are_refused(load):
    with pytest.raises(ValueError, match=r"holds 6 correction\(s\) that its configuration does not mention"):
        load("svd", "identity")


def test_a_stock_class_loses_no_corrections_of_a_folder_whose_config_json_is_a_stock_one(checkpoints, tmp_path):
    shutil.copy(checkpoints["svd"] / "model.safetensors", tmp_path)
    shutil.copy(checkpoints["stock"] / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"config.json of a stock model, and 6 correction\(s\)"):
        AutoModel.from_pretrained(tmp_path)
    stock = BERT.stock_class()
    model, info = stock.from_pretrained(pretrained_model_name_or_path=checkpoints["stock"], output_loading_info=True)
    assert type(model) is stock
    assert not info["missing_keys"]
