"""The conditioned configuration and model classes of transformers' architectures.

For each model type of the table, `Spec<StockConfig>` (model type `specattn_<stock type>`) and `Spec<StockModel>` for every
head that an Auto class offers: `SpecBertConfig`, `SpecBertForMaskedLM`, ... They are stock models whose projections are
conditioned; parameter names are the stock ones.

Configuration classes are cheap. The model classes of a type import its modeling file, so they are made with its first
configuration, or when one of them is asked for by name: they are attributes of this module.
"""

import contextlib
import copy
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .architectures import ARCHITECTURES
from .checksums import CORRECTION, order_metadata, with_checksums
from .compat import (
    IS_REMOTE_CODE,
    add_metadata_on_save,
    decide_by_source_as,
    enter_names,
    expect_missing,
    record_outputs_as,
    share_key_conversions,
    was_loaded,
)
from .conditioning import (
    CONDITIONED_CLASSES,
    attach,
    check_lambda,
    check_range,
    check_values,
    define_with,
    set_origin,
)
from .config import PROJECTIONS, SpectralConfig
from .config_fields import (
    FIELDS,
    FLAG,
    MODEL_TYPE_PREFIX,
    PRECONDITIONER_FIELDS,
    SPECTRAL_FIELDS,
    checked_norms,
    preconditioner_settings,
    refuse_lost_fields,
    refuse_misspelt,
    refuse_other_settings,
    refuse_stored_fields,
    spectral_settings,
)
from .existing_adapters import adapted_layers
from .layers import refuse_replaced, spectral_layers
from .loading import (
    check_corrections_loaded,
    check_init,
    enter_preconditioner,
    enter_stock_weights,
    is_conditioned_checkpoint,
    loaded_corrections,
    refuse_stray_corrections,
    refuse_unsupported_loading,
    stored_config,
    verify_corrections,
)
from .preconditioner import PreconditionerConfig, preconditioned_layers
from .preconditioning import attach_preconditioner, find_output_projections
from .projections import projection_names
from .refreshing import recompute, steps_since_refresh

logger = logging.get_logger(__name__)

# Auto classes that load every supported architecture they have a head for -> transformers' mapping from a configuration
# class to that head.
AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForMaskedImageModeling": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING",
}
CRAMMED_BERT = "crammed_bert"

# Model types that `register_architecture` added -> their configuration class, and Auto class -> model class.
OUTSIDE: dict[str, tuple[type[PretrainedConfig], dict[str, type[PreTrainedModel]]]] = {}

# What was made so far: stock configuration class -> its conditioned class, and model type -> what `conditioned_models` says.
CONDITIONED_CONFIGS: dict[type[PretrainedConfig], Any] = {}
CONDITIONED_MODELS: dict[str, dict[str, Any]] = {}


class SpectralConfigMixin:
    """The fields that a conditioned configuration adds to its stock one.

    Args:
        lambda_: as in [`SpectralConfig`], and so the others with `spectral_` before the name.
        spectral_conditioning: false only with a preconditioner; a model with neither has a stock configuration. None: true
            unless there is a preconditioner.
        attention_preconditioner: the axis of a [`PreconditionerConfig`]; None for no preconditioner.
        preconditioner_gradient: as there, and so the others with `preconditioner_` before the name.
        preconditioner_norms: of each attention, the norm that `preconditioner_scale="match"` sets: what [`precondition`]
            measured.
    """

    stock_config_class: ClassVar[type[PretrainedConfig]]
    model_type: ClassVar[str]
    # What is absent is not in config.json either: a checkpoint does not mention what it does not do.
    lambda_ = None
    spectral_method = None
    spectral_targets = None
    spectral_granularity = None
    spectral_refresh_every = None
    attention_preconditioner = None
    preconditioner_norms = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        conditioned_models(cls.stock_config_class.model_type)  # before an Auto class looks for them
        return super().__new__(cls)

    def __post_init__(
        self,
        spectral_conditioning: bool | None = None,
        lambda_: Any = None,
        spectral_method: str = "identity",
        spectral_targets: Any = PROJECTIONS,
        spectral_granularity: str = "projection",
        spectral_refresh_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_misspelt(kwargs, self.stock_config_class)
        given = {name: kwargs.pop(name) for name in PRECONDITIONER_FIELDS if name in kwargs}
        preconditioner = preconditioner_settings(given)
        if spectral_conditioning is None:
            spectral_conditioning = preconditioner is None
        if spectral_conditioning is not True and (spectral_conditioning is not False or preconditioner is None):
            raise ValueError(
                f"spectral_conditioning={spectral_conditioning!r} contradicts {type(self).__name__}; use "
                f"{self.stock_config_class.__name__} for a model without conditioning."
            )
        fields = (spectral_method, lambda_, spectral_targets, spectral_granularity, spectral_refresh_every)
        if not spectral_conditioning and fields != ("identity", None, PROJECTIONS, "projection", None):
            raise ValueError(
                f"{', '.join(SPECTRAL_FIELDS[1:])}: at least one of these was given, which does nothing without "
                "spectral_conditioning=True; add that, or leave the field out."
            )
        spectral = SpectralConfig(*fields) if spectral_conditioning else None
        if spectral is not None and "output" in spectral.targets and preconditioner is not None:
            raise ValueError(
                f"spectral_targets={list(spectral.targets)} and attention_preconditioner={preconditioner.axis!r}: an output "
                "projection has either a correction or a preconditioner; leave 'output' out, or the preconditioner."
            )
        self._set_spectral(spectral)
        self._set_preconditioner(preconditioner, given.get("preconditioner_norms"))
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def _set_preconditioner(self, preconditioner: PreconditionerConfig | None, norms: Sequence[float] | None) -> None:
        if preconditioner is None:
            return
        self.attention_preconditioner = preconditioner.axis
        self.preconditioner_gradient = preconditioner.gradient
        self.preconditioner_scale = preconditioner.scale
        self.preconditioner_eps = preconditioner.eps
        if norms is not None:
            self.preconditioner_norms = checked_norms(norms, preconditioner)

    def _set_spectral(self, spectral: SpectralConfig | None) -> None:
        self.spectral_conditioning = spectral is not None
        if spectral is None:
            for name in SPECTRAL_FIELDS[1:]:
                self.__dict__.pop(name, None)
            return
        self.spectral_method = spectral.method
        self.lambda_ = spectral.lambda_
        self.spectral_targets = list(spectral.targets)
        self.spectral_granularity = spectral.granularity
        self.spectral_refresh_every = spectral.refresh_every

    @property
    def spectral_config(self) -> SpectralConfig | None:
        """The fields as a validated [`SpectralConfig`]; None if there are no corrections."""
        return spectral_settings(vars(self)) if self.spectral_conditioning else None

    @property
    def preconditioner_config(self) -> PreconditionerConfig | None:
        """The fields as a validated [`PreconditionerConfig`]; None if there is no preconditioner."""
        return preconditioner_settings(vars(self))

    def describe_conditioning(self) -> str:
        """One short line for logs and reports, such as `identity(lambda_=1.0), preconditioner row(unit, detached)`."""
        spectral, preconditioner = self.spectral_config, self.preconditioner_config
        parts = [] if spectral is None else [spectral.describe()]
        return ", ".join(parts if preconditioner is None else [*parts, f"preconditioner {preconditioner.describe()}"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As the stock method, which would warn that a stock checkpoint has another model type."""
        config_dict, others = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[attr-defined]
        if config_dict.get("model_type") in (cls.model_type, cls.stock_config_class.model_type):
            return cls.from_dict(config_dict, **others)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the stock method; `config_dict` may be stock, and then takes the settings in `kwargs`.

        Raises:
            ValueError: if `config_dict` is conditioned and `kwargs` ask for something else.
        """
        given = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        refuse_misspelt(kwargs, cls.stock_config_class, with_init=bool(kwargs.get("return_unused_kwargs")))
        if not IS_REMOTE_CODE:
            # It names files beside the checkpoint, and a checkpoint saved from here has none of them.
            config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        if config_dict.get("model_type") == cls.model_type:
            refuse_lost_fields(config_dict)
            refuse_other_settings(config_dict, given)
        else:
            if config_dict.get("model_type") == cls.stock_config_class.model_type:
                refuse_stored_fields(config_dict)
            if names := config_dict.get(
                "architectures"
            ):  # an Auto class with several classes for one type chooses by them
                config_dict = {**config_dict, "architectures": [f"Spec{name}" for name in names]}
        return super().from_dict({**config_dict, **given, "model_type": cls.model_type}, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_stock(
        cls,
        config: PretrainedConfig,
        spectral: SpectralConfig | None,
        preconditioner: PreconditionerConfig | None = None,
        norms: Sequence[float] | None = None,
    ) -> Any:
        """A conditioned copy of a stock configuration, private state included."""
        copied = _recast_config(config, cls)
        copied._set_spectral(spectral)
        copied._set_preconditioner(preconditioner, norms)
        return copied

    def to_stock(self) -> PretrainedConfig:
        """A stock copy of this configuration."""
        return _recast_config(self, self.stock_config_class)


def _recast_config(config: Any, target: type) -> Any:
    # Not through to_dict: that drops the attention implementation and whatever else is set at run time.
    copied = copy.deepcopy(config)
    for name in (*FIELDS, "model_type"):
        copied.__dict__.pop(name, None)
    if issubclass(target, SpectralConfigMixin):
        conditioned_models(target.stock_config_class.model_type)
    copied.__class__ = target
    return copied


# Whether the weights being loaded are stock ones, for which a missing `correction` is no loss.
_loading_stock_weights: ContextVar[bool] = ContextVar("_loading_stock_weights", default=False)
# Whether a conditioned model is being constructed: its parts are stock models until it is complete.
is_constructing: ContextVar[bool] = ContextVar("is_constructing", default=False)


@contextlib.contextmanager
def _within(variable: ContextVar[bool], value: bool = True) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class SpectralModelMixin:
    """What a conditioned model class adds to its stock one."""

    stock_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[Any]
    config: Any
    _computed_corrections: Sequence[str] = ()  # names of those that no checkpoint filled

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock class; a stock configuration takes the settings in `kwargs`."""
        config, kwargs = self._settle(config, kwargs)
        with _within(is_constructing):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def post_init(self) -> None:
        """Condition the projections before the weights are initialized or loaded, on the meta device too."""
        if not isinstance(self.config, SpectralConfigMixin):
            raise ValueError(
                f"{type(self).__name__} was given a {type(self.config).__name__}, which has no conditioning; use "
                f"{self.config_class.__name__}.from_stock(config, SpectralConfig(...))."
            )
        self._attach()
        super().post_init()  # type: ignore[misc]
        set_origin(self, "")  # type: ignore[arg-type]  # the configuration may name the stock checkpoint
        if _loading_stock_weights.get() and self.config.spectral_method == "svd":
            expect_missing(self, r"\.correction$")

    def _attach(self) -> None:
        # Some heads build their base by AutoModel, and find their projections changed.
        spectral, preconditioner = self.config.spectral_config, self.config.preconditioner_config
        if spectral is not None and next(spectral_layers(self), None) is None:  # type: ignore[arg-type]
            attach(self, spectral)  # type: ignore[arg-type]
        if preconditioner is None or next(preconditioned_layers(self), None) is not None:  # type: ignore[arg-type]
            return
        if preconditioner.scale == "match" and _loading_stock_weights.get():
            return  # the norms are measured when the weights are there
        outputs = find_output_projections(self)  # type: ignore[arg-type]
        attach_preconditioner(self, outputs, preconditioner, self.config.preconditioner_norms)  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """Initialize what is not, as the stock method; then compute the svd corrections that no checkpoint filled."""
        super().initialize_weights()  # type: ignore[misc]
        for name, layer in spectral_layers(self):  # type: ignore[arg-type]
            if layer.weight.is_meta:
                continue
            if layer.spectral.method != "svd":
                if not was_loaded(layer.weight):
                    check_lambda(name, layer.weight, layer.spectral)
                continue
            if not was_loaded(layer.correction):
                check_values(name, layer.orient(layer.weight), layer.layout, layer.spectral)
                recompute(layer)
                check_range(name, layer)
                self._computed_corrections = [*self._computed_corrections, f"{name}{CORRECTION}"]

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
            ValueError: for settings that contradict a conditioned checkpoint, a lost, misshapen or damaged `correction`,
                quantization or tensor parallelism.
        """
        stored = stored_config(pretrained_model_name_or_path, kwargs)
        conditioned = is_conditioned_checkpoint(stored, config, spectral_init)
        config, kwargs = cls._settle(config, kwargs)
        refuse_unsupported_loading(config, kwargs)
        check_init(spectral_init, conditioned, config, kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        with _within(_loading_stock_weights, not conditioned):
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        if conditioned and stored is not None:  # the configuration may have come from elsewhere
            refuse_other_settings(stored, {name: getattr(model.config, name, None) for name in FIELDS})
        if conditioned:
            check_corrections_loaded(pretrained_model_name_or_path, model, info, stored)
            verify_corrections(pretrained_model_name_or_path, model, stored, kwargs)
            set_origin(model, model.config.name_or_path)
        else:
            stray = [*info["unexpected_keys"], *loaded_corrections(model)]
            refuse_stray_corrections(pretrained_model_name_or_path, stray, stored)
            enter_stock_weights(model, spectral_init or "additive")
            enter_preconditioner(model)
        return (model, info) if with_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method. What config.json says of conditioning is what the layers compute.

        Raises:
            ValueError: if a conditioned projection was replaced, or layers differ: the checkpoint would be of another
                function. Also for a `state_dict` with weights and not their corrections: it could not be loaded.
        """
        refuse_replaced(self)  # type: ignore[arg-type]
        state = kwargs.get("state_dict", args[2] if len(args) > 2 else None) or {}
        for name, layer in spectral_layers(self):  # type: ignore[arg-type]
            if layer.spectral.method == "svd" and f"{name}.weight" in state and f"{name}{CORRECTION}" not in state:
                raise ValueError(
                    f"The state_dict to be saved has the weight of {name} and not its correction, which is part of the "
                    "trained function. Pass all of model.state_dict(), or no state_dict."
                )
        if not adapted_layers(self):  # type: ignore[arg-type]  # then transformers saves the adapters alone
            self._configure_by_layers()
        add_metadata_on_save(with_checksums, order_metadata)
        every, steps = self.config.spectral_refresh_every, steps_since_refresh(self)  # type: ignore[arg-type]
        if every is not None and steps > every:
            logger.warning(
                f"Saving with corrections that are {steps} optimizer steps old although spectral_refresh_every={every}: call "
                "hf_specattn.refresh(model) in the training loop, or add SpectralCallback() to the Trainer."
            )
        if kwargs.get("push_to_hub") and not IS_REMOTE_CODE:
            logger.warning(
                "save_pretrained(push_to_hub=True) publishes no code: everybody who loads this model needs "
                "hf_specattn. model.push_to_hub(...) and `specattn push` add the code."
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _configure_by_layers(self) -> None:
        """Let the configuration say what the layers compute: it may have been edited since, and layers moved or taken out.

        Raises:
            ValueError: where no configuration says it.
        """
        model: Any = self
        layers, outputs = dict(spectral_layers(model)), dict(preconditioned_layers(model))
        spectral = next((layer.spectral for layer in layers.values()), None)
        preconditioner = next((layer.preconditioner for layer in outputs.values()), None)
        others = [name for name, layer in layers.items() if layer.spectral != spectral]
        others += [name for name, layer in outputs.items() if layer.preconditioner != preconditioner]
        others += sorted(layers.keys() ^ projection_names(model, spectral.targets if spectral else ()))
        others += sorted(outputs.keys() ^ projection_names(model, ("output",) if preconditioner else ()))
        if others or (spectral is None and preconditioner is None):
            which = (
                f"{others[0]} is not conditioned as the other projections are"
                if others
                else "no projection is conditioned"
            )
            raise ValueError(
                f"{type(self).__name__} cannot be saved: {which} (was a layer replaced, or taken from another model?), and "
                "its checkpoint would load with all of them alike. Put back what was there; or call hf_specattn.fold(model), "
                "which keeps the function of corrections, and save that."
            )
        matched = preconditioner is not None and preconditioner.scale == "match"
        norms = [layer.stock_norm for layer in outputs.values()] if matched else None
        config = self.config_class.from_stock(self.config, spectral, preconditioner, norms)
        said, true = ({name: vars(each).get(name) for name in FIELDS} for each in (self.config, config))
        wrong = next((name for name in FIELDS[:-1] if said[name] != true[name]), None)
        if wrong is not None:
            logger.warning(
                f"The configuration of {type(self).__name__} says {wrong}={said[wrong]!r}, and its layers compute with "
                f"{true[wrong]!r}, which is saved. An attribute set on the configuration changes no model that is there "
                "already: call fold(model), then condition it again."
            )
        if said != true:
            _replace_config(model, config)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As the stock method, in one commit with the code for every head and a generated model card."""
        if IS_REMOTE_CODE:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        # By its name: an import statement here would make transformers look for that file beside a checkpoint.
        publishing = importlib.import_module(".checkpoints.publishing", __package__)
        return publishing.push_model(self, repo_id, **kwargs)

    @classmethod
    def _settle(cls, config: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The configuration with the settings among `kwargs` entered, and the other keyword arguments.

        Raises:
            ValueError: if they contradict a conditioned configuration.
        """
        given = {name: value for name, value in kwargs.items() if name in FIELDS}
        if not given or not isinstance(config, PretrainedConfig):
            return config, kwargs  # without a configuration `from_pretrained` gives them to the one that it reads
        if isinstance(config, SpectralConfigMixin):
            refuse_other_settings(vars(config), given)
        else:
            preconditioner = preconditioner_settings(given)
            spectral = spectral_settings(given) if given.get(FLAG, preconditioner is None) else None
            if spectral is None and preconditioner is None:
                raise ValueError(
                    f"spectral_conditioning={given[FLAG]!r} contradicts {cls.__name__}; use the stock class."
                )
            config = cls.config_class.from_stock(config, spectral, preconditioner, given.get("preconditioner_norms"))
        return config, {name: value for name, value in kwargs.items() if name not in given}

    @classmethod
    def adopt(
        cls,
        model: PreTrainedModel,
        spectral: SpectralConfig | None = None,
        preconditioner: PreconditionerConfig | None = None,
        norms: Sequence[float] | None = None,
    ) -> None:
        """Give a model whose projections were conditioned, or preconditioned, this class and its configuration.

        What is None stays what it was.
        """
        old: Any = model.config
        if isinstance(old, SpectralConfigMixin):
            spectral = spectral or old.spectral_config
            if preconditioner is None:
                preconditioner, norms = old.preconditioner_config, old.preconditioner_norms
        _replace_config(model, cls.config_class.from_stock(old, spectral, preconditioner, norms))
        model.__class__ = cls  # type: ignore[assignment]

    def release(self) -> None:
        """Give the folded model its stock class and configuration back; with a preconditioner, one without corrections."""
        preconditioner = self.config.preconditioner_config
        if preconditioner is not None:
            norms = self.config.preconditioner_norms
            _replace_config(self, self.config_class.from_stock(self.config, None, preconditioner, norms))  # type: ignore[arg-type]
            return
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


# --- the classes, one set per model type -----------------------------------------------------------------------------


def stock_config_class(model_type: str) -> type[PretrainedConfig]:
    """The stock configuration class of a model type of the table."""
    if model_type == CRAMMED_BERT:
        return crammed_bert_classes()[0]
    return OUTSIDE[model_type][0] if model_type in OUTSIDE else transformers.CONFIG_MAPPING[model_type]


def crammed_bert_classes() -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """Our own architecture: its configuration class, and Auto class -> model class."""
    from .crammed_bert import (
        CrammedBertConfig,
        CrammedBertForMaskedLM,
        CrammedBertForSequenceClassification,
        CrammedBertForTokenClassification,
        CrammedBertModel,
    )

    return CrammedBertConfig, {
        "AutoModel": CrammedBertModel,
        "AutoModelForPreTraining": CrammedBertForMaskedLM,
        "AutoModelForMaskedLM": CrammedBertForMaskedLM,
        "AutoModelForSequenceClassification": CrammedBertForSequenceClassification,
        "AutoModelForTokenClassification": CrammedBertForTokenClassification,
    }


def _stock_heads(model_type: str) -> dict[str, Any]:
    """For each Auto class that has one the stock model class, or a tuple of several between which the `architectures` of a
    checkpoint decide (DeiT with and without a teacher)."""
    if model_type == CRAMMED_BERT:
        return crammed_bert_classes()[1]
    if model_type in OUTSIDE:
        return OUTSIDE[model_type][1]
    config_class = stock_config_class(model_type)
    mappings = {name: getattr(transformers, mapping) for name, mapping in AUTO_CLASSES.items()}
    return {name: mapping[config_class] for name, mapping in mappings.items() if config_class in mapping}


def conditioned_config_class(model_type: str) -> Any:
    """`Spec<StockConfig>` of a model type of the table."""
    stock = stock_config_class(model_type)
    if stock in CONDITIONED_CONFIGS:
        return CONDITIONED_CONFIGS[stock]
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` of a spectrally conditioned model; adds the fields of [`SpectralConfigMixin`].",
        "model_type": MODEL_TYPE_PREFIX + stock.model_type,
        "stock_config_class": stock,
    }
    config_class = type(f"Spec{stock.__name__}", (SpectralConfigMixin, stock), namespace)
    globals()[config_class.__name__] = CONDITIONED_CONFIGS[stock] = config_class
    return config_class


def _conditioned_model_class(stock: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> Any:
    # Others read from the signature which arguments a class takes.
    @functools.wraps(stock.__init__)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        SpectralModelMixin.__init__(self, *args, **kwargs)

    namespace = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with spectrally conditioned attention.",
        "__init__": construct,
        "config_class": config_class,
        "stock_class": stock,
    }
    conditioned = type(f"Spec{stock.__name__}", (SpectralModelMixin, stock), namespace)
    record_outputs_as(conditioned, stock)
    decide_by_source_as(conditioned, stock)
    share_key_conversions(stock.__name__, conditioned.__name__)
    return conditioned


def conditioned_models(model_type: str) -> dict[str, Any]:
    """Auto class -> conditioned model class of a model type of the table, or a tuple of them.

    The first call makes the classes as this module's attributes, and registers them with the Auto classes.
    """
    if model_type in CONDITIONED_MODELS:
        return CONDITIONED_MODELS[model_type]
    config_class = conditioned_config_class(model_type)
    share_key_conversions(config_class.stock_config_class.model_type, config_class.model_type)
    by_auto_class: dict[str, Any] = {}
    for auto_name, stock in _stock_heads(model_type).items():
        several = isinstance(stock, tuple)
        classes = tuple(_define_model_class(each, config_class) for each in (stock if several else (stock,)))
        by_auto_class[auto_name] = classes if several else classes[0]
        names = tuple(each.__name__ for each in classes)
        if auto_name in AUTO_CLASSES:  # a class from outside may have another head
            enter_names(AUTO_CLASSES[auto_name], config_class.model_type, names if several else names[0])
    if IS_REMOTE_CODE:
        # Some heads (Llama's) build their base by AutoModel.from_config, which would ask again whether to trust this code.
        base = conditioned_class(by_auto_class["AutoModel"])
        transformers.AutoModel.register(config_class, base, exist_ok=True)
        base.register_for_auto_class("AutoModel")  # saved again, it brings its code along
    else:
        for auto_name, classes in by_auto_class.items():
            getattr(transformers, auto_name).register(config_class, classes, exist_ok=True)
        _share_preprocessors(config_class.stock_config_class, config_class)
    CONDITIONED_MODELS[model_type] = by_auto_class
    return by_auto_class


def _define_model_class(stock: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> Any:
    if stock not in CONDITIONED_CLASSES:
        CONDITIONED_CLASSES[stock] = _conditioned_model_class(stock, config_class)
        name = CONDITIONED_CLASSES[stock].__name__
        globals()[name] = CONDITIONED_CLASSES[stock]
        if not IS_REMOTE_CODE:
            # Others (TRL) look there for what `architectures` in a configuration names.
            setattr(importlib.import_module("transformers"), name, CONDITIONED_CLASSES[stock])
    return CONDITIONED_CLASSES[stock]


def _share_preprocessors(stock: type[PretrainedConfig], conditioned: type[PretrainedConfig]) -> None:
    # At the top level of transformers this one is a placeholder where no image library is installed.
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    tokenizers = transformers.TOKENIZER_MAPPING
    if stock in tokenizers:
        transformers.AutoTokenizer.register(conditioned, tokenizer_class=tokenizers[stock], exist_ok=True)
    if stock in IMAGE_PROCESSOR_MAPPING:
        IMAGE_PROCESSOR_MAPPING.register(conditioned, IMAGE_PROCESSOR_MAPPING[stock], exist_ok=True)


def conditioned_class(classes: Any, architectures: Sequence[str] = ()) -> Any:
    """Of several classes for one Auto class, that which a checkpoint's `architectures` name; the first if they name none."""
    if not isinstance(classes, tuple):
        return classes
    return next((each for each in classes if each.__name__ in architectures), classes[0])


def _define_counterpart(stock: type[PreTrainedModel]) -> None:
    """Make the conditioned classes of the type that a stock model class belongs to, if the table has it."""
    model_type = getattr(getattr(stock, "config_class", None), "model_type", None)
    if model_type in ARCHITECTURES:
        conditioned_models(model_type)


define_with(_define_counterpart)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Conditioned classes by name, where pickle and transformers' loading of remote code look for them."""
        if name.startswith("Spec"):
            stock_name = name.removeprefix("Spec")
            own = [crammed_bert_classes(), *OUTSIDE.values()]
            named = {each.__name__: each for config, heads in own for each in (config, *heads.values())}
            stock = named.get(stock_name) or getattr(transformers, stock_name, None)
            model_type = getattr(getattr(stock, "config_class", None) or stock, "model_type", None)
            if model_type in ARCHITECTURES:
                conditioned_models(model_type)
                if name in globals():
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
