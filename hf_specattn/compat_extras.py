"""Private names of PEFT, accelerate and datasets that the library and the recipes use, each with its reason.

(transformers' are in `compat`, but for two that the recipes alone need: `compat` travels with checkpoints.)

A library may rename what it does not document. So nothing is imported with this module: each name is looked up by the
function that needs it, when it needs it, and where a release lacks it, that function falls back with a warning or raises
an error. Either one names the library, its version, what is lost and what to do ([`PrivateName`]).
"""

import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


class MissingNameError(RuntimeError):
    """The installed release of a library lacks a private name; the message says which, what does not work, and what to do."""


@dataclasses.dataclass(frozen=True)
class PrivateName:
    """A name that a library may change without notice.

    Attributes:
        library: The library, as it is imported and installed.
        path: Where the name is below it: modules, then attributes.
        purpose: What it is for.
        loss: What is lost without it.
        way_out: What a user can do then.
    """

    library: str
    path: str
    purpose: str
    loss: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.library}.{self.path}"

    def missing(self) -> str:
        """Return the message for a release without the name."""
        installed = importlib.metadata.version(self.library)
        return f"{self.library} {installed} has no {self}, which {self.purpose}. {self.loss} {self.way_out}"

    def owner(self) -> Any:
        """Return the module or class that has the name.

        Raises:
            MissingNameError: if there is none.
        """
        found: Any = importlib.import_module(self.library)
        for part in self.path.split(".")[:-1]:
            if not hasattr(found, part):
                try:
                    importlib.import_module(f"{found.__name__}.{part}")
                except ImportError as error:
                    raise MissingNameError(self.missing()) from error
            found = getattr(found, part)
        self.of(found)
        return found

    def of(self, owner: Any) -> Any:
        """Return the value of the name: an attribute of `owner`, which may also be an instance of the class.

        Raises:
            MissingNameError: if it has no such attribute.
        """
        try:
            return getattr(owner, self.path.rpartition(".")[2])
        except AttributeError as error:
            raise MissingNameError(self.missing()) from error

    def find(self) -> Any:
        """Return the value of the name in its module or class.

        Raises:
            MissingNameError: if there is none.
        """
        return self.of(self.owner())


# --- PEFT ------------------------------------------------------------------------------------------------------------

_FOLD = "Call hf_specattn.fold(model) before you add an adapter, or install peft 0.21."

INJECT_ADAPTER = PrivateName(
    "peft",
    "tuners.tuners_utils.BaseTuner.inject_adapter",
    "every way to add an adapter goes through",
    "Adapters that work on the weight, such as DoRA, are no longer refused on conditioned projections and compute wrongly.",
    _FOLD,
)
IMPORT_ALLOWLIST = PrivateName(
    "peft",
    "auto.get_default_import_allowlist",
    "names the packages from which AutoPeftModel takes a base model's class",
    "AutoPeftModel does not rebuild a conditioned model for an adapter without a task type.",
    'Pass import_allowlist=["transformers", "hf_specattn"] to AutoPeftModel.from_pretrained, or install peft 0.21.',
)
TARGET_MODULES = PrivateName(
    "peft",
    "utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "is one of the tables of default target modules by model type",
    "Conditioned models have no default target modules.",
    "Give target_modules in the adapter's configuration, or install peft 0.21.",
)
ADAPTION_PROMPT = PrivateName(
    "peft",
    "tuners.adaption_prompt.config.TRANSFORMERS_MODEL_CONFIG",
    "says by model type how adaption prompts compute",
    "Adaption prompts refuse a conditioned Llama.",
    _FOLD,
)
PREPARE_CONFIG = PrivateName(
    "peft",
    "tuners.tuners_utils.BaseTuner._prepare_adapter_config",
    "fills in the default target modules",
    "An adapter that works on the weight is refused on a conditioned model, wherever it would be added.",
    _FOLD,
)
MATCHES_TARGET = PrivateName(
    "peft",
    "tuners.tuners_utils.BaseTuner._check_target_module_exists",
    "says whether an adapter is added to a module",
    "An adapter that works on the weight is refused on a conditioned model, wherever it would be added.",
    _FOLD,
)
ADAPTER_STATE = PrivateName(
    "peft",
    "peft_model.get_peft_model_state_dict",
    "collects what PeftModel.save_pretrained writes",
    "The embeddings of a model that was conditioned in memory and then resized are not saved with its adapter.",
    "Call save_pretrained(..., save_embedding_layers=True), or install peft 0.21.",
)
IS_LORA_VARIANT = PrivateName(
    "peft",
    "LoraConfig.is_lora_variant",  # not an attribute: it is in the metadata of the class's fields
    "marks the settings that make LoRA compute differently",
    "Of the variants that work on the weight only use_dora is still refused on conditioned projections.",
    _FOLD,
)


def when_imported(library: str, action: Callable[[], None]) -> None:
    """Call `action` at once if a library is imported, otherwise when it is imported. A second call changes nothing.

    No library offers this, and importing one for this purpose would be slow, so this uses a finder on Python's
    `sys.meta_path`.
    """
    if sys.modules.get(library) is not None:  # None: its import is blocked
        action()
    elif not any(isinstance(finder, _Finder) and finder.library == library for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(library, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a library as the other finders do, and acts once it has run."""

    def __init__(self, library: str, action: Callable[[], None]) -> None:
        self.library, self.action = library, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.library:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:  # asking whether it is installed ends here, too
            try:
                vars(spec.loader)["exec_module"] = self._then_act(spec.loader.exec_module)
            except TypeError:  # a loader without a dictionary
                logger.warning_once(
                    f"{type(spec.loader).__name__} loads {self.library} and cannot be followed: call "
                    "hf_specattn.peft.register() after the import, or adapters on conditioned projections may be wrong."
                )
        return spec

    def _then_act(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action()

        return exec_module


def wrap(name: PrivateName, wrapper: Callable[[Any], Any]) -> None:
    """Replace a value by `wrapper(value)`; if there is none, warn."""
    try:
        owner = name.owner()
    except MissingNameError as error:
        logger.warning(str(error))
    else:
        setattr(owner, name.path.rpartition(".")[2], wrapper(name.of(owner)))


def target_module_tables() -> list[dict[str, Any]]:
    """Return PEFT's tables of default target modules, one for each method, by model type; none, with a warning."""
    prefix = TARGET_MODULES.path.rpartition(".")[2].partition("LORA")[0]
    try:
        constants = vars(TARGET_MODULES.owner())
    except MissingNameError as error:
        logger.warning(str(error))
        return []
    return [table for name, table in constants.items() if name.startswith(prefix) and isinstance(table, dict)]


def adaption_prompt_settings() -> dict[str, Any]:
    """Return PEFT's settings of adaption prompts by model type; none, with a warning."""
    try:
        return ADAPTION_PROMPT.find()
    except MissingNameError as error:
        logger.warning(str(error))
        return {}


def target_matcher(tuner: Any, config: Any, model: Any) -> Callable[[str], bool]:
    """Return the function that says of a module's name whether a tuner puts its adapter on it.

    The default target modules are filled into `config`, as PEFT itself does next. If PEFT cannot be asked, there is a warning
    and every module counts: better refused than wrong.
    """
    try:
        prepare, matches = PREPARE_CONFIG.of(tuner), MATCHES_TARGET.of(tuner)
    except MissingNameError as error:
        logger.warning(str(error))
        return lambda name: True
    prepared = prepare(config, tuner.get_model_config(model))
    return lambda name: bool(matches(prepared, name))


def lora_variants(config: Any) -> list[dataclasses.Field]:
    """Return the fields of an adapter's configuration that switch on a variant of LoRA."""
    from peft import LoraConfig

    key = IS_LORA_VARIANT.path.rpartition(".")[2]
    fields = dataclasses.fields(config)
    if isinstance(config, LoraConfig) and not any(key in field.metadata for field in fields):
        logger.warning_once(IS_LORA_VARIANT.missing())
        return [field for field in fields if field.name == "use_dora"]
    return [field for field in fields if field.metadata.get(key)]


# --- accelerate ------------------------------------------------------------------------------------------------------

FSDP_PLUGIN = PrivateName(
    "accelerate",
    "state.AcceleratorState.fsdp_plugin",
    "holds the settings of FSDP",
    "Models cannot be sharded: the wrong modules would be, and FSDP1 would not be noticed.",
    "Train without FSDP (scripts/accelerate_configs/several_gpus.yaml), or install accelerate 1.15.",
)


def fsdp_plugin(accelerator: Any) -> Any:
    """Return accelerate's `FullyShardedDataParallelPlugin` of a run under FSDP.

    Raises:
        MissingNameError: if accelerate keeps it elsewhere.
    """
    return FSDP_PLUGIN.of(accelerator.state)


def shard_on_cpu(accelerator: Any) -> None:
    """Enable FSDP in a run on CPU processes, as the environment says; accelerate does not.

    Raises:
        MissingNameError: if accelerate does not take FSDP from its state.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = DistributedType.FSDP
    is_fsdp2 = getattr(accelerator, "is_fsdp2", None)
    if accelerator.distributed_type != DistributedType.FSDP or is_fsdp2 != (plugin.fsdp_version == 2):
        raise MissingNameError(FSDP_PLUGIN.missing())


# --- datasets --------------------------------------------------------------------------------------------------------

FINGERPRINT = PrivateName(
    "datasets",
    "Dataset._fingerprint",
    "distinguishes the rows of a dataset from others",
    "A run could continue with other images than it started with.",
    "Pass the images as folders (--train_dir, --validation_dir), or install datasets 5.2.",
)


def fingerprint(rows: Any) -> str:
    """Return what distinguishes a `datasets.Dataset` from others.

    Raises:
        MissingNameError: if `datasets` does not say.
    """
    return FINGERPRINT.of(rows)


# --- transformers, for the recipes -----------------------------------------------------------------------------------

NO_SPLIT_MODULES = PrivateName(
    "transformers",
    "PreTrainedModel._no_split_modules",
    "names the classes of a model's layers",
    "FSDP2 has no units and gathers the whole model at once, which takes more memory.",
    "Name the layers' class with fsdp_transformer_layer_cls_to_wrap in accelerate's configuration.",
)
FROM_CONFIG = PrivateName(
    "transformers",
    "PreTrainedModel._from_config",
    "makes a model of a given class in a given dtype",
    "The survey cannot make its tiny models.",
    "Install transformers 5.23.",
)


def layer_class_names(model: Any) -> set[str]:
    """Return the names of a model's classes that transformers does not split; if there are none, warn."""
    try:
        return set(NO_SPLIT_MODULES.of(model) or ())
    except MissingNameError as error:
        logger.warning(str(error))
        return set()


def model_from_config(model_class: Any, config: Any, **kwargs: Any) -> Any:
    """Return a new model, with the keyword arguments that `AutoModel.from_config` takes.

    Raises:
        MissingNameError: if transformers has no such constructor.
    """
    return FROM_CONFIG.of(model_class)(config, **kwargs)


NAMES = tuple(value for value in list(vars().values()) if isinstance(value, PrivateName))
