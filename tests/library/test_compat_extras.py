"""Private names of other libraries: all in one place, and what happens where a release lacks one."""

import ast
import dataclasses
import importlib.machinery
import importlib.metadata
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from models import ARCHITECTURES
from scripts_loading import REPOSITORY

from hf_specattn import SpectralConfig, compat_extras, condition
from hf_specattn import peft as adapters
from hf_specattn.compat_extras import NAMES, MissingNameError, PrivateName
from hf_specattn.layers import spectral_layers
from recipes.run.sharding import configure_sharding, layer_classes
from recipes.survey.tiny_models import tiny_config, tiny_model

BERT = ARCHITECTURES["bert"]
CASES: dict[PrivateName, Callable[..., None]] = {}


def case(*names: PrivateName) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What shows that the package does without a name."""

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        CASES.update(dict.fromkeys(names, function))
        return function

    return enter


# --- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_the_message_names_the_release_the_loss_and_the_way_out(name):
    pytest.importorskip(name.library)
    message = name.missing()
    assert message.startswith(f"{name.library} {importlib.metadata.version(name.library)} has no {name}, which ")
    assert all(text in message for text in (name.purpose, name.loss, name.way_out))
    assert name.loss.endswith(".")
    assert name.way_out.endswith(".")


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_missing_name_falls_back_or_says_what_to_do(name, monkeypatch, request, warning_log):
    pytest.importorskip(name.library)
    logging.Logger.warning_once.cache_clear()
    CASES[name](name, monkeypatch, request, warning_log)


def test_a_missing_module_is_a_missing_name():
    name = PrivateName("json", "nowhere.thing", "is not there", "Nothing.", "None.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda library: "1")
        with pytest.raises(
            MissingNameError, match=r"^json 1 has no json\.nowhere\.thing, which is not there\. Nothing"
        ):
            name.find()


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepare_peft(monkeypatch):
    """A function: prepare PEFT as its first import does, and undo it afterwards."""
    peft = pytest.importorskip("peft")
    from peft.tuners.adaption_prompt import config as adaption_prompt
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import constants

    monkeypatch.setattr(BaseTuner, "inject_adapter", BaseTuner.inject_adapter.__wrapped__)
    allowlist = peft.auto.get_default_import_allowlist.__wrapped__
    monkeypatch.setattr(peft.auto, "get_default_import_allowlist", allowlist)
    for table in (
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        adaption_prompt.TRANSFORMERS_MODEL_CONFIG,
    ):
        for model_type in [model_type for model_type in table if model_type.startswith("specattn_")]:
            monkeypatch.delitem(table, model_type)

    def prepare() -> None:
        adapters._prepare_peft.cache_clear()
        adapters.register()

    return prepare


def conditioned() -> Any:
    model = BERT.model()
    condition(model, SpectralConfig("svd"))
    return model


def dora(**settings: Any) -> Any:
    import peft

    return peft.LoraConfig(use_dora=True, **{"target_modules": ["query"], **settings})


def remove(name: PrivateName, monkeypatch) -> None:
    monkeypatch.delattr(name.owner(), name.path.rpartition(".")[2])


def only_warning(name: PrivateName, warning_log) -> bool:
    return warning_log.messages == [name.missing()]


@case(compat_extras.INJECT_ADAPTER, compat_extras.IMPORT_ALLOWLIST, compat_extras.ADAPTER_STATE)
def what_could_be_prepared_is(name, monkeypatch, request, warning_log):
    import peft

    prepare = request.getfixturevalue("prepare_peft")
    remove(name, monkeypatch)
    prepare()
    assert only_warning(name, warning_log)
    if name is not compat_extras.INJECT_ADAPTER:
        with pytest.raises(ValueError, match="use_dora=True"):
            peft.get_peft_model(conditioned(), dora())
    else:
        assert "hf_specattn" in peft.auto.get_default_import_allowlist()


@case(compat_extras.TARGET_MODULES)
def target_modules_must_be_given(name, monkeypatch, request, warning_log):
    import peft

    prepare = request.getfixturevalue("prepare_peft")
    with monkeypatch.context() as patch:
        remove(name, patch)
        prepare()
    assert only_warning(name, warning_log)
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(conditioned(), peft.LoraConfig())
    given = peft.get_peft_model(conditioned(), peft.LoraConfig(target_modules=["query"]))
    assert len(given.targeted_module_names) == 2


@case(compat_extras.ADAPTION_PROMPT)
def adaption_prompts_refuse_a_conditioned_llama(name, monkeypatch, request, warning_log):
    import peft

    prepare = request.getfixturevalue("prepare_peft")
    with monkeypatch.context() as patch:
        remove(name, patch)
        prepare()
    assert only_warning(name, warning_log)
    llama = ARCHITECTURES["llama"].model("AutoModelForCausalLM")
    condition(llama, SpectralConfig("svd"))
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'specattn_llama'"):
        peft.get_peft_model(llama, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))


class Tuner:
    """What `target_matcher` asks of a tuner, and nothing else."""

    def get_model_config(self, model):
        return {"model_type": model.config.model_type}

    def _prepare_adapter_config(self, config, model_config):
        return config

    def _check_target_module_exists(self, config, name):
        return name.endswith(tuple(config.target_modules))


@case(compat_extras.PREPARE_CONFIG, compat_extras.MATCHES_TARGET)
def every_conditioned_projection_counts(name, monkeypatch, request, warning_log):
    model, config = conditioned(), dora(target_modules=["intermediate.dense"])
    names = [name for name, _ in spectral_layers(model)]
    assert not list(adapters._targeted(Tuner(), model, config, None, names))
    assert warning_log.messages == []
    monkeypatch.delattr(Tuner, name.path.rpartition(".")[2])
    assert len(list(adapters._targeted(Tuner(), model, config, None, names))) == 6
    assert only_warning(name, warning_log)
    with pytest.raises(ValueError, match=r"use_dora=True.*hf_specattn\.fold\(model\)"):
        adapters._refuse_weight_readers(Tuner(), model, config, None)


@case(compat_extras.IS_LORA_VARIANT)
def dora_is_refused_all_the_same(name, monkeypatch, request, warning_log):
    import peft

    for field in dataclasses.fields(peft.LoraConfig):
        plain = {key: value for key, value in field.metadata.items() if key != "is_lora_variant"}
        monkeypatch.setattr(field, "metadata", types.MappingProxyType(plain))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"use_dora=True.*Set use_dora=False"):
            peft.get_peft_model(conditioned(), dora())
    assert warning_log.messages.count(name.missing()) == 1
    assert adapters._weight_reader(peft.LoraConfig()) is None


def test_a_library_that_is_blocked_is_not_acted_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocked_library", None)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    compat_extras.when_imported("blocked_library", lambda: pytest.fail("acted"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("blocked_library")


class SlottedLoader:
    __slots__ = ()

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.loaded = True


class SlottedFinder:
    @staticmethod
    def find_spec(fullname, path, target=None):
        if fullname == "slotted_library":
            return importlib.machinery.ModuleSpec(fullname, SlottedLoader())
        return None


def test_a_loader_that_cannot_be_followed_loads_all_the_same(monkeypatch, warning_log):
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(sys, "meta_path", [SlottedFinder])
    compat_extras.when_imported("slotted_library", lambda: pytest.fail("acted"))
    try:
        assert importlib.import_module("slotted_library").loaded
    finally:
        sys.modules.pop("slotted_library", None)
    (message,) = warning_log.messages
    assert "SlottedLoader" in message
    assert "hf_specattn.peft.register()" in message


# --- accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@case(compat_extras.FSDP_PLUGIN)
def nothing_is_sharded(name, monkeypatch, request, warning_log):
    accelerator = request.getfixturevalue("accelerator")
    accelerator.state.distributed_type = DistributedType.FSDP  # and its settings are not where they were
    with pytest.raises(MissingNameError) as raised:
        configure_sharding(accelerator, BERT.model())
    assert str(raised.value) == name.missing()

    # On CPU processes its settings are put there, and it does not look at them.
    accelerator.state.distributed_type = DistributedType.MULTI_CPU
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(AcceleratorState, "is_fsdp2", property(lambda state: state.another_plugin is not None))
    with pytest.raises(MissingNameError) as raised:
        configure_sharding(accelerator, BERT.model())
    assert str(raised.value) == name.missing()


# --- datasets --------------------------------------------------------------------------------------------------------


@case(compat_extras.FINGERPRINT)
def images_of_the_hub_are_refused(name, monkeypatch, request, warning_log):
    import datasets

    rows = datasets.Dataset.from_dict({"a": [0, 1]})
    assert compat_extras.fingerprint(rows) == compat_extras.fingerprint(datasets.Dataset.from_dict({"a": [0, 1]}))
    assert compat_extras.fingerprint(rows) != compat_extras.fingerprint(datasets.Dataset.from_dict({"a": [0, 2]}))
    monkeypatch.delattr(rows, "_fingerprint")
    with pytest.raises(MissingNameError) as raised:
        compat_extras.fingerprint(rows)
    assert str(raised.value) == name.missing()


# --- transformers ----------------------------------------------------------------------------------------------------


@case(compat_extras.NO_SPLIT_MODULES)
def there_are_no_units_of_sharding(name, monkeypatch, request, warning_log):
    model = BERT.model()
    assert layer_classes(model) == ["BertLayer"]
    for owner in (model, *type(model).__mro__):
        if "_no_split_modules" in vars(owner):
            monkeypatch.delattr(owner, "_no_split_modules")
    assert layer_classes(model) == []
    assert only_warning(name, warning_log)


@case(compat_extras.FROM_CONFIG)
def the_survey_makes_no_models(name, monkeypatch, request, warning_log):
    from transformers import BertConfig, BertModel

    assert tiny_model(BertModel, tiny_config(BertConfig)).config.hidden_size == 32
    remove(name, monkeypatch)
    with pytest.raises(MissingNameError) as raised:
        tiny_model(BertModel, tiny_config(BertConfig))
    assert str(raised.value) == name.missing()


# --- nowhere else ----------------------------------------------------------------------------------------------------

FILES = [file for folder in ("hf_specattn", "scripts") for file in sorted((REPOSITORY / folder).rglob("*.py"))]
ELSEWHERE = {
    # Written as transformers' own models are, and travels with its checkpoints alone.
    ("crammed_bert.py", "_attn_implementation"),
    ("nystromformer.py", "_attn_implementation"),
    # argparse has no public list of a parser's flags.
    ("command_line.py", "_option_string_actions"),
}
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


def named(tree: ast.AST) -> Iterator[str]:
    """What a file takes from elsewhere by name: attributes, and the parts of imported names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif (
            isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and isinstance(node.args[1], ast.Constant)
        ):
            yield node.args[1].value


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file defines: functions, classes, variables, and attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name | ast.Attribute):
                    yield target.id if isinstance(target, ast.Name) else target.attr


def foreign_private(files: list[Path]) -> list[tuple[str, str]]:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    own = {name for tree in trees.values() for name in defined(tree)}
    return [
        (file.name, name)
        for file, tree in trees.items()
        for name in named(tree)
        if name.startswith("_") and not name.startswith("__") and name not in own
    ]


def test_private_names_of_others_stand_in_the_two_files_alone():
    elsewhere = {found for found in foreign_private(FILES) if found[0] not in ("compat.py", "compat_extras.py")}
    assert elsewhere == ELSEWHERE


def test_the_walk_finds_every_kind(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import torch._dynamo\nfrom torch.utils._pytree import tree_map\nfrom os import _exit\n"
        "def _own(x):\n    x._mine = 1\n    return x._theirs, x._mine, x.__dict__, getattr(x, '_named', None), _own\n"
    )
    names = [name for _, name in foreign_private([file])]
    assert sorted(names) == ["_dynamo", "_exit", "_named", "_pytree", "_theirs"]
