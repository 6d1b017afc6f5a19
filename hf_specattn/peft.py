"""PEFT adapters on conditioned models. Importing this module does not import PEFT.

An adapter leaves the base model frozen and adds an update `D` to a projection, which then computes with `W + C + D`.
Five things make PEFT work on a conditioned model as on a stock one:

- **Default target modules**: PEFT looks them up by model type, so the conditioned types and Crammed BERT are registered.
- **Methods.** PEFT knows the base layer's `weight`, which is `W`. That is enough for methods whose update does not
  depend on the weight ([`ADDITIVE_METHODS`]): LoRA with any initialization, and many more. Those that scale, rotate or
  normalize the weight (DoRA, IA3, OFT, ...) would compute with `W + C` and merge into `W`. They are refused when the
  adapter is added, and only if they would touch a conditioned projection. The solution is [`fold`]: under an adapter
  `W` and `C` are both frozen, so a folded model computes the same, trains the same, and has a single weight.
- **The base model's name.** `AutoPeftModel` loads the base model that the adapter's configuration names, and PEFT
  takes that name from `model.name_or_path`. For a model conditioned in memory (`condition`, or `from_pretrained` of a
  stock checkpoint with the flag), that would silently rebuild the plain model found at the stock path. Hence
  `name_or_path` is empty until the model is loaded from a conditioned checkpoint: the adapter names no base model,
  `AutoPeftModel` fails instead of computing something else, and a warning says so when the adapter is added. Nothing
  is lost: `PeftModel.from_pretrained(base, adapter)` still loads it. Recording the flags instead would recompute the
  corrections from weights that may have changed since, and would rebuild the plain model wherever this package is not
  imported.
- **Preconditioned output projections** take no adapter: PEFT would give it the input of the layer, not preconditioned.
- **Refreshing.** Dynamic corrections of adapted projections do not change, because their `W` is frozen. Recomputed from a
  weight that holds a merged update, or the remainder of PiSSA, they would change the function.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from . import compat_extras
from .architectures import ARCHITECTURES
from .config import PROJECTIONS
from .layers import hold_projections, spectral_layers
from .preconditioner import is_preconditioned, preconditioned_layers

logger = logging.get_logger(__name__)

# PEFT's methods whose update does not depend on the weight below it, by PeftType: the tests compare each with itself
# folded and merged, and show that the others are wrong. A method that PEFT adds later is refused until it is listed
# here.
ADDITIVE_METHODS = (
    "ADALORA",
    "ADAMSS",
    "BEFT",
    "C3A",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "LILY",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OSF",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
# The same for the variants of LoRA that a field of its configuration enables. DoRA is not one of them.
ADDITIVE_LORA_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
)
PEFT_ALL_LINEAR = "all-linear"
CRAMMED_BERT = "crammed_bert"  # the model type; its module is a heavy import


# --- registration ----------------------------------------------------------------------------------------------------


def register() -> None:
    """Prepare PEFT for conditioned models: at once if it is imported, otherwise as soon as somebody imports it.

    Idempotent. `import hf_specattn` calls it; it never imports PEFT, which is slow and may not be installed.
    """
    compat_extras.when_imported("peft", _prepare_peft)


@functools.cache
def _prepare_peft() -> None:
    # Every way to add an adapter ends here: get_peft_model, PeftModel.from_pretrained, add_adapter of PEFT and of
    # transformers.
    compat_extras.wrap(compat_extras.INJECT_ADAPTER, _checked)
    _enter_target_modules()
    # An adapter without a task type is rebuilt on the class that it was trained on, such as SpecBertModel.
    compat_extras.wrap(compat_extras.IMPORT_ALLOWLIST, _with_this_package)
    # What PeftModel saves, and what transformers' and accelerate's savers ask for.
    peft: Any = importlib.import_module("peft")
    compat_extras.wrap(compat_extras.ADAPTER_STATE, _with_resized_embeddings)
    peft.get_peft_model_state_dict = _with_resized_embeddings(peft.get_peft_model_state_dict)


def _with_this_package(allowlist: Callable[[], list[str]]) -> Callable[[], list[str]]:
    @functools.wraps(allowlist)
    def get_default_import_allowlist() -> list[str]:
        return [*allowlist(), __name__.rpartition(".")[0]]

    return get_default_import_allowlist


# --- resized embeddings -----------------------------------------------------------------------------------------------


def _with_resized_embeddings(collect: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """PEFT saves embeddings whose size is not that in the checkpoint of the base model that an adapter names.

    A model that was conditioned or folded in memory names none, so the checkpoint that it was made from is used.
    """

    @functools.wraps(collect)
    def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        asked = inspect.signature(collect).bind(model, *args, **kwargs).arguments
        if asked.get("save_embedding_layers", "auto") == "auto" and _is_resized(model):
            logger.warning("The embeddings were resized, and are saved with the adapter.")
            return collect(**{**asked, "save_embedding_layers": True})
        return collect(model, *args, **kwargs)

    return get_peft_model_state_dict


def _is_resized(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    origin = getattr(base, "made_from", "")
    if not isinstance(base, PreTrainedModel) or base.name_or_path or not origin:
        return False  # as for any other model
    try:
        fields = PretrainedConfig.get_config_dict(origin)[0]
    except OSError:
        fields = {}
    if not fields:
        logger.warning(
            f"The configuration of {origin}, which the model was made from, cannot be read; its embeddings are taken to be "
            "as they were. If they were resized, pass save_embedding_layers=True."
        )
        return False
    before = type(base.config).from_dict(fields)  # an older file leaves defaults out
    return getattr(before, "vocab_size", None) != getattr(base.config, "vocab_size", None)


# --- default target modules ------------------------------------------------------------------------------------------


def _enter_target_modules() -> None:
    for table in compat_extras.target_module_tables():
        table.update(_missing_targets(table))
    # GPT-2's adaption prompt asks for the model type by name in its code as well, so an entry here would not be enough.
    settings = compat_extras.adaption_prompt_settings()
    if "llama" in settings:
        settings.setdefault(_conditioned_type("llama"), settings["llama"])


def _missing_targets(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The entries of our model types: those of the stock type, or else BERT's told by the architecture table."""
    entries = []
    for stock_type in ARCHITECTURES:
        targets = mapping.get(stock_type)
        if targets is None:
            targets = _translated(mapping.get("bert"), stock_type)
        own_types = [_conditioned_type(stock_type)]
        if stock_type == CRAMMED_BERT:  # a type of this package, which PEFT does not know either
            own_types.append(stock_type)
        entries += [(own, targets) for own in own_types if targets is not None and own not in mapping]
    return entries


def _translated(bert_targets: Any, model_type: str) -> list[str] | None:
    """BERT's target modules by the names that `model_type` gives them; None if they are more than projections."""
    if not bert_targets or not set(bert_targets) <= set(PROJECTIONS):  # BERT's names are those of the projections
        return None
    children = [item for spec in ARCHITECTURES[model_type] for item in spec.projections_of.items()]
    return list(dict.fromkeys(child for child, held in children if set(held) & set(bert_targets)))


def _conditioned_type(stock_type: str) -> str:
    return f"specattn_{stock_type}"


# --- when an adapter is added
# -----------------------------------------------------------------------------------------


def _checked(inject: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject)
    def inject_adapter(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = tuner.peft_config[adapter_name]
        _save_whole_head(config, model)
        _refuse_preconditioned(tuner, model, config, kwargs.get("state_dict"))
        if next(spectral_layers(model), None) is not None:
            _refuse_weight_readers(tuner, model, config, kwargs.get("state_dict"))
        if next(spectral_layers(model), None) is not None or is_preconditioned(model):
            _warn_without_base(model, config)
        inject(tuner, model, adapter_name, *args, **kwargs)
        hold_projections(model)  # below the adapters, too

    return inject_adapter


def _save_whole_head(config: Any, model: nn.Module) -> None:
    # PEFT trains and saves heads called `classifier` or `score`; the one of Crammed BERT has a layer before it, which would
    # stay random and be drawn again when the adapter is loaded.
    if config.task_type != "SEQ_CLS":
        return
    from .crammed_bert import CrammedBertForSequenceClassification

    if isinstance(model, CrammedBertForSequenceClassification):
        saved = config.modules_to_save or []
        if "dense" not in saved:
            config.modules_to_save = [*saved, "dense"]


def _refuse_weight_readers(tuner: Any, model: nn.Module, config: Any, state_dict: Mapping[str, Any] | None) -> None:
    problem = _weight_reader(config)
    if problem is None:
        return
    touched = next(_targeted(tuner, model, config, state_dict, [name for name, _ in spectral_layers(model)]), None)
    if touched is None:
        return
    setting, way_out = problem
    raise ValueError(
        f"{setting} is not possible on the conditioned projection {touched}: it works on the weight, which PEFT takes "
        f"to be W, but the projection computes with W + C, so that training and merging would disagree. {way_out}, "
        "leave conditioned projections out of target_modules, or call hf_specattn.fold(model) before you add the "
        "adapter: the folded model computes the same, and since an adapter leaves W and C frozen it trains the same "
        "too."
    )


def _weight_reader(config: Any) -> tuple[str, str] | None:
    """What makes an adapter depend on the base weight, and what to set instead; None if its update is additive."""
    method = getattr(config.peft_type, "value", config.peft_type)
    if method not in ADDITIVE_METHODS:
        return f"PEFT's {method}", f"Use a method with an additive update ({', '.join(ADDITIVE_METHODS)})"
    if method == "MISS" and config.init_weights == "bat":
        return "init_weights='bat'", "Set init_weights=True"
    for field in compat_extras.lora_variants(config):
        value = getattr(config, field.name)
        if value and field.name not in ADDITIVE_LORA_VARIANTS:
            return f"{field.name}={value!r}", f"Set {field.name}={field.default!r}"
    return None


def _refuse_preconditioned(tuner: Any, model: nn.Module, config: Any, state_dict: Mapping[str, Any] | None) -> None:
    names = [name for name, _ in preconditioned_layers(model)]
    touched = next(_targeted(tuner, model, config, state_dict, names), None) if names else None
    if touched is not None:
        raise ValueError(
            f"No adapter can be added to the output projection {touched}, whose input is preconditioned: PEFT would "
            "give the adapter the input as it is, but a merged adapter would see it preconditioned. Leave output "
            f"projections out of target_modules (such as {touched.rpartition('.')[2]!r}), which may name all others."
        )


def _targeted(
    tuner: Any, model: nn.Module, config: Any, state_dict: Mapping[str, Any] | None, names: Sequence[str]
) -> Iterator[str]:
    """Of modules with these names, those that `inject_adapter` would put the adapter on."""
    is_target = compat_extras.target_matcher(tuner, config, model)
    for name in names:
        name = name.removesuffix(".base_layer")  # below an adapter that is on already
        if state_dict is not None:
            targeted = any(key.startswith(f"{name}.") for key in state_dict)
        elif config.target_modules == PEFT_ALL_LINEAR:
            targeted = True
        else:
            targeted = is_target(name)
        if targeted:
            yield name


def _warn_without_base(model: nn.Module, config: Any) -> None:
    loading = config.inference_mode or config.base_model_name_or_path
    if isinstance(model, PreTrainedModel) and not model.__dict__.get("name_or_path") and not loading:
        logger.warning(
            f"This {type(model).__name__} was not loaded from a conditioned checkpoint, so the adapter's "
            "configuration can name no base model, and AutoPeftModel cannot rebuild it. To make it name one, save "
            "the model and load it before you add the adapter: model.save_pretrained(folder), then "
            "from_pretrained(folder)."
        )
