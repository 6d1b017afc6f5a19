"""The conditioned configuration and model classes of transformers' architectures.

For each model type of the table, `Spec<StockConfig>` (model type `specattn_<stock type>`) and `Spec<StockModel>` for every
head that an Auto class offers: `SpecBertConfig`, `SpecBertForMaskedLM`, ... They are stock models whose projections are
conditioned; parameter names are the stock ones.
"""

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .architectures import ARCHITECTURES
from .conditioning import CONDITIONED_CLASSES, attach, half_precision_cost, set_origin, subtract_correction
from .config import INITS, PROJECTIONS, SpectralConfig, check_choice
from .crammed_bert import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    CrammedBertModel,
)
from .layers import spectral_layers
from .refreshing import recompute, steps_since_refresh

logger = logging.get_logger(__name__)

MODEL_TYPE_PREFIX = "specattn_"
SPECTRAL_FIELDS = (
    "spectral_conditioning",
    "lambda_",
    "spectral_method",
    "spectral_targets",
    "spectral_granularity",
    "spectral_refresh_every",
)
# Whether this file was loaded from a checkpoint, without the package (see `checkpoints/remote_code.py`).
IS_REMOTE_CODE = __name__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME

# Fields that say how training goes on, not what the loaded function is, and may differ from the checkpoint's.
TRAINING_FIELDS = ("spectral_refresh_every",)

# Auto classes that load every supported architecture they have a head for.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
)

# The heads of our own architecture; transformers' mappings know those of the others.
CRAMMED_BERT_CLASSES: dict[str, type[PreTrainedModel]] = {
    "AutoModel": CrammedBertModel,
    "AutoModelForPreTraining": CrammedBertForMaskedLM,
    "AutoModelForMaskedLM": CrammedBertForMaskedLM,
    "AutoModelForSequenceClassification": CrammedBertForSequenceClassification,
    "AutoModelForTokenClassification": CrammedBertForTokenClassification,
}


class SpectralConfigMixin:
    """The fields that a conditioned configuration adds to its stock one.

    Args:
        lambda_: as in [`SpectralConfig`], and so the others with `spectral_` before the name.
        spectral_conditioning: always true: a stock configuration is what says no.
    """

    stock_config_class: ClassVar[type[PretrainedConfig]]
    model_type: ClassVar[str]

    def __post_init__(
        self,
        spectral_conditioning: bool = True,
        lambda_: Any = None,
        spectral_method: str = "identity",
        spectral_targets: Any = PROJECTIONS,
        spectral_granularity: str = "projection",
        spectral_refresh_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        if spectral_conditioning is not True:
            raise ValueError(
                f"spectral_conditioning={spectral_conditioning!r} contradicts {type(self).__name__}; use "
                f"{self.stock_config_class.__name__} for a model without conditioning."
            )
        spectral = SpectralConfig(
            spectral_method, lambda_, spectral_targets, spectral_granularity, spectral_refresh_every
        )
        self._set_spectral(spectral)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def _set_spectral(self, spectral: SpectralConfig) -> None:
        self.spectral_conditioning = True
        self.spectral_method = spectral.method
        self.lambda_ = spectral.lambda_
        self.spectral_targets = list(spectral.targets)
        self.spectral_granularity = spectral.granularity
        self.spectral_refresh_every = spectral.refresh_every

    @property
    def spectral_config(self) -> SpectralConfig:
        """The fields as a validated [`SpectralConfig`]."""
        return SpectralConfig(
            self.spectral_method,
            self.lambda_,
            tuple(self.spectral_targets),
            self.spectral_granularity,
            self.spectral_refresh_every,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the stock method; `config_dict` may be stock, and then takes the spectral settings in `kwargs`.

        Raises:
            ValueError: if `config_dict` is conditioned and `kwargs` ask for something else.
        """
        given = {name: kwargs.pop(name) for name in SPECTRAL_FIELDS if name in kwargs}
        if not IS_REMOTE_CODE:
            # It names files beside the checkpoint, and a checkpoint saved from here has none of them.
            config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        if config_dict.get("model_type") == cls.model_type:
            _refuse_other_settings(config_dict, given)
        elif config_dict.get("architectures"):  # an Auto class with several classes for one type chooses by them
            config_dict = {**config_dict, "architectures": [f"Spec{name}" for name in config_dict["architectures"]]}
        return super().from_dict({**config_dict, **given, "model_type": cls.model_type}, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_stock(cls, config: PretrainedConfig, spectral: SpectralConfig) -> Any:
        """A conditioned copy of a stock configuration, private state included."""
        return _recast_config(config, cls, set_spectral=spectral)

    def to_stock(self) -> PretrainedConfig:
        """A stock copy of this configuration."""
        return _recast_config(self, self.stock_config_class)


def _recast_config(config: Any, target: type, set_spectral: SpectralConfig | None = None) -> Any:
    # Not through to_dict: that drops the attention implementation and whatever else is set at run time.
    copied = copy.deepcopy(config)
    for name in (*SPECTRAL_FIELDS, "model_type"):
        copied.__dict__.pop(name, None)
    copied.__class__ = target
    if set_spectral is not None:
        copied._set_spectral(set_spectral)
    return copied


def _refuse_other_settings(config_dict: dict[str, Any], given: dict[str, Any]) -> None:
    """A conditioned checkpoint loads as it was trained: another correction would be another function."""
    if given.get("spectral_conditioning", True) is not True:
        raise ValueError(
            f"spectral_conditioning={given['spectral_conditioning']!r}: this checkpoint was trained with spectral "
            "conditioning, and its weights without the corrections compute something else. Load it as it is, call "
            "hf_specattn.fold(model) and save it: that is the same model as a stock checkpoint."
        )
    stored = _comparable({name: config_dict[name] for name in SPECTRAL_FIELDS if name in config_dict})
    for name, wanted in given.items():
        if name in TRAINING_FIELDS or name == "spectral_conditioning":
            continue
        asked = _comparable({**{key: config_dict[key] for key in SPECTRAL_FIELDS if key in config_dict}, name: wanted})
        if asked != stored:
            raise ValueError(
                f"{name}={wanted!r}, but this checkpoint was trained with {name}={config_dict.get(name)!r} and loads as it "
                "was trained. To change it: load it as it is, hf_specattn.fold(model), then hf_specattn.condition(model, "
                "SpectralConfig(...)) anew."
            )


def _comparable(fields: dict[str, Any]) -> tuple[Any, ...] | None:
    try:
        spectral = SpectralConfig(
            fields.get("spectral_method", "identity"),
            fields.get("lambda_"),
            fields.get("spectral_targets", PROJECTIONS),
            fields.get("spectral_granularity", "projection"),
        )
    except ValueError:  # such as the checkpoint's lambda_ with another method: settings that no checkpoint has
        return None
    return (spectral.method, spectral.targets, spectral.granularity, [spectral.lambda_for(p) for p in PROJECTIONS])


# Whether the weights being loaded are stock ones, for which a missing `correction` is no loss.
_loading_stock_weights: ContextVar[bool] = ContextVar("_loading_stock_weights", default=False)


@contextlib.contextmanager
def _loading(stock: bool) -> Iterator[None]:
    token = _loading_stock_weights.set(stock)
    try:
        yield
    finally:
        _loading_stock_weights.reset(token)


class SpectralModelMixin:
    """What a conditioned model class adds to its stock one."""

    stock_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[Any]
    config: Any
    _keys_to_ignore_on_load_missing: Any
    # What `push_to_hub` calls; the package's `checkpoints.publishing` sets it, which remote code does not have.
    publisher: ClassVar[Any] = None

    def post_init(self) -> None:
        """Condition the projections before the weights are initialized or loaded, on the meta device too."""
        if not isinstance(self.config, SpectralConfigMixin):
            raise ValueError(
                f"{type(self).__name__} was given a {type(self.config).__name__}, which says nothing about conditioning; "
                f"make it {self.config_class.__name__}.from_stock(config, SpectralConfig(...))."
            )
        if next(spectral_layers(self), None) is None:  # type: ignore[arg-type]  # some heads build their base by AutoModel
            attach(self, self.config.spectral_config)  # type: ignore[arg-type]
        super().post_init()  # type: ignore[misc]
        set_origin(self, "")  # type: ignore[arg-type]  # the configuration may name the stock checkpoint
        if _loading_stock_weights.get() and self.config.spectral_method == "svd":
            self._keys_to_ignore_on_load_missing.add(r"\.correction$")

    def initialize_weights(self) -> None:
        """Initialize what is not, as the stock method; then compute the svd corrections that no checkpoint filled."""
        super().initialize_weights()  # type: ignore[misc]
        for _, layer in spectral_layers(self):  # type: ignore[arg-type]
            if layer.spectral.method != "svd" or layer.weight.is_meta:
                continue
            if not getattr(layer.correction, "_is_hf_initialized", False):
                recompute(layer)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the stock class: transformers initializes other people's classes in a way that skips modules of its own."""
        return cls.stock_class.is_custom_code()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        spectral_init: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock method, from a conditioned checkpoint or a stock one.

        Args:
            spectral_init: stock checkpoints only: how weights enter. `"additive"` (the default) keeps W, so the function
                changes; `"preserve"` keeps the function. Never written to config.json.

        Raises:
            ValueError: for settings that contradict a conditioned checkpoint, a lost or misshapen `correction`,
                quantization or tensor parallelism.
        """
        _refuse_unsupported_loading(config, kwargs)
        stored = _stored_config(pretrained_model_name_or_path, kwargs)
        conditioned = _is_conditioned_checkpoint(stored, spectral_init)
        _check_init(spectral_init, conditioned, config, kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        with _loading(stock=not conditioned):
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        if conditioned and stored is not None:  # the configuration may have come from elsewhere
            _refuse_other_settings(stored, {name: getattr(model.config, name) for name in SPECTRAL_FIELDS})
        if conditioned:
            _check_corrections_loaded(pretrained_model_name_or_path, info)
            set_origin(model, model.config.name_or_path)
        else:
            _enter_stock_weights(model, spectral_init or "additive")
        return (model, info) if with_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method."""
        every, steps = self.config.spectral_refresh_every, steps_since_refresh(self)  # type: ignore[arg-type]
        if every is not None and steps > every:
            logger.warning(
                f"Saving with corrections that are {steps} optimizer steps old although spectral_refresh_every={every}: call "
                "hf_specattn.refresh(model) in the training loop, or add SpectralCallback() to the Trainer."
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As the stock method, in one commit with the code for every head and a generated model card."""
        if self.publisher is None:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        return self.publisher(self, repo_id, **kwargs)

    @classmethod
    def adopt(cls, model: PreTrainedModel, spectral: SpectralConfig) -> None:
        """Give a stock model whose projections were conditioned this class and its configuration."""
        _replace_config(model, cls.config_class.from_stock(model.config, spectral))
        model.__class__ = cls  # type: ignore[assignment]

    def release(self) -> None:
        """Give the folded model its stock class and configuration back."""
        _replace_config(self, self.config.to_stock())  # type: ignore[arg-type]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, SpectralModelMixin):
                module.__class__ = module.stock_class  # type: ignore[assignment]


def _replace_config(model: nn.Module, config: Any) -> None:
    # A copy replaces it everywhere below, and not in place: another model may have been built from the same object.
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


def _refuse_unsupported_loading(config: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config is set, but a quantizer would replace the conditioned projections and drop their "
            "corrections in silence. Load without it, call hf_specattn.fold(model), save, and quantize the folded checkpoint."
        )
    for name in ("tp_plan", "tp_size", "distributed_config"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}={kwargs[name]!r}: tensor parallelism would shard W but not C. Use DDP or FSDP, or fold the "
                "model first."
            )


def _stored_config(path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of the checkpoint's config.json; None where there is none."""
    if path is None:
        return None
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
    try:
        return PretrainedConfig.get_config_dict(path, **{name: kwargs[name] for name in names if name in kwargs})[0]
    except OSError:
        return None


def _is_conditioned_checkpoint(stored: dict[str, Any] | None, spectral_init: str | None) -> bool:
    if (
        stored is None
    ):  # weights alone, or a state dict: they are what they are, unless the caller says how to treat them
        return spectral_init is None
    return str(stored.get("model_type", "")).startswith(MODEL_TYPE_PREFIX)


def _check_init(spectral_init: str | None, conditioned: bool, config: Any, kwargs: dict[str, Any]) -> None:
    if spectral_init is None:
        return
    check_choice("spectral_init", spectral_init, INITS)
    if conditioned:
        raise ValueError(
            f"spectral_init={spectral_init!r}: this checkpoint is conditioned already, and its weights need no entering; "
            "leave spectral_init out."
        )
    every = getattr(config, "spectral_refresh_every", kwargs.get("spectral_refresh_every"))
    if spectral_init == "preserve" and every is not None:
        raise ValueError(
            f"spectral_init='preserve' with spectral_refresh_every={every} is not possible: a correction recomputed from "
            "W - C is another one. Use spectral_init='additive', or no spectral_refresh_every."
        )


def _check_corrections_loaded(path: Any, info: dict[str, Any]) -> None:
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    lost = sorted(key for key in (*info["missing_keys"], *mismatched) if key.endswith(".correction"))
    if lost:
        raise ValueError(
            f"{path} is a conditioned checkpoint, but {len(lost)} correction(s) are missing from it or have the wrong shape, "
            f"such as {lost[0]}. They are part of the trained function and cannot be recomputed; restore the file from its "
            "source."
        )


def _enter_stock_weights(model: Any, spectral_init: str) -> None:
    layers = [layer for _, layer in spectral_layers(model)]
    if any(layer.weight.is_meta for layer in layers):
        raise ValueError(
            "Projections were offloaded before their corrections could be computed; load with device_map='cpu' (or on one "
            "device), save_pretrained, and offload the conditioned checkpoint."
        )
    if spectral_init == "preserve":
        if cost := half_precision_cost(layers, shift=-1):
            logger.warning(f"{cost}, so spectral_init='preserve' does not keep the function; load with dtype=float32.")
        for layer in layers:
            subtract_correction(layer)
        return
    logger.warning(
        f"{type(model).__name__} was loaded from a checkpoint that was not trained conditioned, and adding "
        f"{model.config.spectral_config.describe()} changes its function: it needs training before use. To keep the function "
        "pass spectral_init='preserve'; to start from scratch use from_config."
    )


# --- the classes, one set per model type -----------------------------------------------------------------------------


def _stock_classes(model_type: str) -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """The stock configuration class, and for each Auto class that has one the stock model class, or a tuple of several
    between which the `architectures` of a checkpoint decide (DeiT with and without a teacher)."""
    if model_type == CrammedBertConfig.model_type:
        return CrammedBertConfig, CRAMMED_BERT_CLASSES
    config_class = transformers.AutoConfig.for_model(model_type).__class__
    heads = {}
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if config_class in mapping:
            heads[name] = mapping[config_class]
    return config_class, heads


def _conditioned_config_class(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` of a spectrally conditioned model; adds the fields of [`SpectralConfigMixin`].",
        "model_type": MODEL_TYPE_PREFIX + stock.model_type,
        "stock_config_class": stock,
    }
    return type(f"Spec{stock.__name__}", (SpectralConfigMixin, stock), namespace)


def _conditioned_model_class(stock: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> Any:
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with spectrally conditioned attention.",
        "config_class": config_class,
        "stock_class": stock,
    }
    conditioned = type(f"Spec{stock.__name__}", (SpectralModelMixin, stock), namespace)
    # What `output_attentions` may record is looked up by class, and entered when a model is constructed: a model that
    # takes this class later (`condition`) would find nothing.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(conditioned), getattr(stock, "_can_record_outputs", None))
    return conditioned


def _share_key_conversions(stock_name: str, conditioned_name: str) -> None:
    # transformers renames checkpoint keys by class name or model type; ours are the stock ones under another name.
    conversions = get_checkpoint_conversion_mapping(stock_name)
    if conversions is not None:
        register_checkpoint_conversion_mapping(conditioned_name, conversions, overwrite=True)


def _define_classes(model_type: str) -> dict[str, Any]:
    """Create the conditioned classes of one model type as this module's globals; Auto class name -> model class."""
    stock_config, heads = _stock_classes(model_type)
    config_class = _conditioned_config_class(stock_config)
    globals()[config_class.__name__] = config_class
    _share_key_conversions(stock_config.model_type, config_class.model_type)
    by_auto_class = {}
    for auto_name, stock in heads.items():
        several = isinstance(stock, tuple)
        classes = tuple(_define_model_class(each, config_class) for each in (stock if several else (stock,)))
        by_auto_class[auto_name] = classes if several else classes[0]
    if IS_REMOTE_CODE:
        # Some heads (Llama's) build their base by AutoModel.from_config, which would ask anew whether to trust this code.
        base = conditioned_class(by_auto_class["AutoModel"])
        transformers.AutoModel.register(config_class, base, exist_ok=True)
        base.register_for_auto_class("AutoModel")  # saved again, it brings its code along
    return by_auto_class


def _define_model_class(stock: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> Any:
    if stock not in CONDITIONED_CLASSES:
        CONDITIONED_CLASSES[stock] = _conditioned_model_class(stock, config_class)
        globals()[CONDITIONED_CLASSES[stock].__name__] = CONDITIONED_CLASSES[stock]
        _share_key_conversions(stock.__name__, CONDITIONED_CLASSES[stock].__name__)
    return CONDITIONED_CLASSES[stock]


def conditioned_class(classes: Any, architectures: Sequence[str] = ()) -> Any:
    """Of several classes for one Auto class, that which a checkpoint's `architectures` name; the first if they name none."""
    if not isinstance(classes, tuple):
        return classes
    return next((each for each in classes if each.__name__ in architectures), classes[0])


# Model type -> Auto class name -> conditioned model class, or a tuple of them.
CONDITIONED_MODELS: dict[str, dict[str, Any]] = {
    model_type: _define_classes(model_type) for model_type in ARCHITECTURES
}
