"""The flag in transformers' own calls, and registration with the Auto classes.

`register` adds the conditioned types to the Auto classes, and wraps six methods of transformers' base classes, each of
which does without the flag what it did. So `CONFIG_MAPPING["bert"]` stays `BertConfig`, which pickles, passes `isinstance`
and is what third-party code of the same model type expects.

- `PreTrainedConfig.from_dict` and construction: `AutoConfig.from_pretrained(..., spectral_conditioning=True)`,
  `BertConfig(spectral_conditioning=True)` and `AutoConfig.for_model("bert", spectral_conditioning=True)` give the
  conditioned configuration, for which the Auto classes have the conditioned model class.
- `PreTrainedModel.from_pretrained` and construction: the flag beside `config=`, in `from_config`, or on a stock class.
- `PreTrainedModel.post_init`: a model that is complete, and whose configuration says that it is conditioned, must be.
- `PreTrainedModel.save_pretrained`: a model with a conditioned part, of which its configuration knows nothing, is not saved.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .architectures import ARCHITECTURES, AttentionSpec
from .checksums import CORRECTION
from .conditioning import conditioned_counterpart
from .config_fields import (
    FIELDS,
    FLAG,
    MODEL_TYPE_PREFIX,
    PRECONDITIONER_FLAG,
    SPECTRAL_FIELDS,
    preconditioner_settings,
    refuse_misspelt,
    refuse_stored_fields,
)
from .layers import spectral_layers
from .loading import refuse_stray_corrections, stored_config
from .modeling import (
    CONDITIONED_CONFIGS,
    CRAMMED_BERT,
    OUTSIDE,
    SpectralConfigMixin,
    SpectralModelMixin,
    conditioned_config_class,
    crammed_bert_classes,
    is_constructing,
)
from .preconditioner import is_preconditioned, preconditioned_layers

logger = logging.get_logger(__name__)

FLAGS = (FLAG, PRECONDITIONER_FLAG)


def register() -> None:
    """Teach transformers the conditioned types, the flag, and Crammed BERT. Importing the package does. Idempotent."""
    _register_crammed_bert()
    for model_type in ARCHITECTURES:
        # A release of transformers without a type has nothing that the flag could reach.
        if model_type in transformers.CONFIG_MAPPING:
            _register_type(model_type)
    _wrap(PretrainedConfig, "from_dict", _config_from_dict)
    _wrap(PretrainedConfig, "__new__", _new_config)
    _wrap(PreTrainedModel, "from_pretrained", _model_from_pretrained)
    _wrap(PreTrainedModel, "__new__", _new_model)
    _wrap(PreTrainedModel, "post_init", _post_init)
    _wrap(PreTrainedModel, "save_pretrained", _save_pretrained)


def register_architecture(
    config_class: type[PretrainedConfig],
    models: Mapping[str | type, type[PreTrainedModel]],
    spec: AttentionSpec | tuple[AttentionSpec, ...],
) -> None:
    """Make the flag work for a model class from outside transformers and this package.

    The classes are registered with the Auto classes where they are not yet. Afterwards
    `AutoModel.from_pretrained(path, spectral_conditioning=True)`, `condition`, `save_pretrained` and `fold` work for them as
    they do for BERT. The same call is needed before a conditioned checkpoint is loaded: the code of such a model is not part
    of this package and cannot be saved with the checkpoint.

    Args:
        config_class: the stock configuration, with its own `model_type`.
        models: Auto class, or its name, -> the stock model class, such as `{AutoModel: MyModel}`.
        spec: where the attention classes of these models keep their projections.

    Raises:
        ValueError: for a model type that other classes already use, and for anything that is not a configuration,
        model or spec.
    """
    heads = {name if isinstance(name, str) else name.__name__: model for name, model in models.items()}
    specs = spec if isinstance(spec, tuple) else (spec,)
    _check_architecture(config_class, heads, specs)
    model_type = config_class.model_type
    if OUTSIDE.get(model_type) == (config_class, heads) and ARCHITECTURES[model_type] == specs:
        return
    AutoConfig.register(model_type, config_class, exist_ok=True)
    for auto_name, model_class in heads.items():
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
    OUTSIDE[model_type], ARCHITECTURES[model_type] = (config_class, heads), specs
    _register_type(model_type)


def _check_architecture(config_class: Any, heads: dict[str, Any], specs: tuple[Any, ...]) -> None:
    if (
        not (isinstance(config_class, type) and issubclass(config_class, PretrainedConfig))
        or not config_class.model_type
    ):
        raise ValueError(f"{config_class!r} is not a configuration class of transformers with a model_type; pass one.")
    model_type = config_class.model_type
    if model_type in ARCHITECTURES and (model_type not in OUTSIDE or OUTSIDE[model_type] != (config_class, heads)):
        raise ValueError(
            f"model_type={model_type!r} of {config_class.__name__} is already used: give your configuration another "
            "one."
        )
    if not heads:
        raise ValueError("models is empty; pass at least one, such as {AutoModel: MyModel}.")
    for auto_name, model_class in heads.items():
        if not hasattr(getattr(transformers, auto_name, None), "register"):
            raise ValueError(f"{auto_name!r} is not an Auto class of transformers; use one such as 'AutoModel'.")
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            raise ValueError(
                f"{model_class!r} for {auto_name} is not a PreTrainedModel class; pass the stock model class."
            )
        if model_class.config_class is not config_class:
            raise ValueError(
                f"{model_class.__name__}.config_class is {model_class.config_class!r}; set it to {config_class.__name__}."
            )
    if not specs or not all(isinstance(each, AttentionSpec) for each in specs):
        raise ValueError(f"spec={specs!r} must be an AttentionSpec, or a tuple of them.")


def _register_crammed_bert() -> None:
    try:
        config_class, heads = crammed_bert_classes()
    except ImportError as error:
        # It is built from the parts that transformers' own models are built from; a release may move them.
        logger.warning(
            f"Crammed BERT is left out: transformers {transformers.__version__} lacks a part of it ({error})."
        )
        return
    AutoConfig.register(CRAMMED_BERT, config_class, exist_ok=True)
    for auto_name, model_class in heads.items():
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)


def _register_type(model_type: str) -> None:
    conditioned = conditioned_config_class(model_type)
    AutoConfig.register(conditioned.model_type, conditioned, exist_ok=True)


# --- the wrapped methods ---------------------------------------------------------------------------------------------


def _wrap(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a method by `replacement(original, self or cls, ...)`, once."""
    found = owner.__dict__.get(name, getattr(owner, name))
    original = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    if getattr(original, "spectral", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.spectral = True  # type: ignore[attr-defined]
    if isinstance(found, classmethod):
        setattr(owner, name, classmethod(wrapped))
    else:
        setattr(owner, name, staticmethod(wrapped) if name == "__new__" else wrapped)


def _config_from_dict(original: Any, cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    if _is_conditioned(cls):
        return original(cls, config_dict, **kwargs)
    counterpart = CONDITIONED_CONFIGS.get(cls)
    if counterpart is not None and config_dict.get("model_type") == counterpart.model_type:
        return counterpart.from_dict(config_dict, **kwargs)  # a conditioned checkpoint, by the stock class's name
    if cls is not PretrainedConfig:
        refuse_stored_fields(config_dict, FIELDS if counterpart else FLAGS)
        if counterpart:
            refuse_misspelt(config_dict, cls)
    if _flag(cls, kwargs, with_init=bool(kwargs.get("return_unused_kwargs"))):
        return CONDITIONED_CONFIGS[cls].from_dict(config_dict, **kwargs)
    return original(cls, config_dict, **_without_flags(kwargs))


def _new_config(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    # The fields need no handling here: construction goes on with __init__ of the class that comes out, with the same ones.
    # The base class holds any config.json, to look into it; the Trainer does so on resuming.
    if cls is not PretrainedConfig and not _is_conditioned(cls) and _flag(cls, kwargs):
        return CONDITIONED_CONFIGS[cls].__new__(CONDITIONED_CONFIGS[cls])
    return original(cls)


def _model_from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    if not issubclass(cls, SpectralModelMixin):
        if isinstance(kwargs.get("config"), SpectralConfigMixin) or _flag(cls, kwargs, with_init=True):
            counterpart = _counterpart(cls, kwargs)
            return counterpart.from_pretrained(*args, **kwargs)
        _refuse_conditioned_weights(cls, *args, **kwargs)
        kwargs = _without_flags(kwargs)
        if _knows_settings(cls):
            return _stock_from_pretrained(original, cls, *args, **kwargs)
    return original(cls, *args, **kwargs)


def _stock_from_pretrained(
    original: Any,
    cls: Any,
    pretrained_model_name_or_path: Any,
    *args: Any,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    path = pretrained_model_name_or_path  # which others name
    model, info = original(cls, path, *args, output_loading_info=True, **kwargs)
    if any(name.endswith(CORRECTION) for name in info["unexpected_keys"]):
        refuse_stray_corrections(path, info["unexpected_keys"], stored_config(path, kwargs))
    return (model, info) if output_loading_info else model


def _refuse_conditioned_weights(cls: Any, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> None:
    """Refuse a stock configuration that was given beside a conditioned checkpoint: W would be loaded without C."""
    path, config = pretrained_model_name_or_path, kwargs.get("config")
    if config is None or not _knows_settings(cls) or getattr(config, "name_or_path", None) == str(path):
        return  # the configuration comes, or came, from there
    stored = stored_config(path, kwargs) or {}
    if str(stored.get("model_type", "")).startswith(MODEL_TYPE_PREFIX):
        raise ValueError(
            f"{path} is a conditioned checkpoint (model type {stored['model_type']!r}), but the configuration passed with "
            f"it is that of a stock model ({type(config).__name__}): {cls.__name__} would compute with W instead of W + C. "
            "Leave config out, or load it from the checkpoint: AutoConfig.from_pretrained(path)."
        )


def _save_pretrained(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(self.config, SpectralConfigMixin):
        _refuse_untold(self)
    return original(self, *args, **kwargs)


def _refuse_untold(model: Any) -> None:
    """Refuse to save a stock model with a conditioned part that its configuration does not tell of."""
    configurations = [_fields(each) for each in _configurations(model.config)]
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, SpectralModelMixin)]
    told = tuple(f"{name}." for name, part in parts if _fields(part.config) in configurations)
    layers = (*spectral_layers(model), *preconditioned_layers(model))
    untold = next((name for name, _ in layers if not name.startswith(told)), None)
    if untold is None:
        return
    message = (
        f"{untold} of this {type(model).__name__} is conditioned, and {type(model.config).__name__} does not say so"
    )
    if not type(model).__module__.startswith("transformers."):
        logger.warning(
            f"{message}: its checkpoint loads conditioned only if the code of {type(model).__name__} sees to it."
        )
        return
    raise ValueError(
        f"{message}: its checkpoint would load without that. Load a head by its Auto class from the conditioned checkpoint; "
        "make a composite of parts that are conditioned already, whose configurations it takes into its own; or call "
        "hf_specattn.fold(model), which keeps the function of corrections, and save that."
    )


def _fields(config: Any) -> tuple[type, list[Any]]:
    return type(config), [vars(config).get(name) for name in FIELDS]


def _configurations(config: Any) -> Iterator[Any]:
    """A configuration and those within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _configurations(value)


def _new_model(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    # As for configurations: __init__ of the conditioned class takes the flag out.
    if not issubclass(cls, SpectralModelMixin) and _flag(cls, kwargs):
        return original(_counterpart(cls, kwargs))
    return original(cls)


def _post_init(original: Any, self: Any) -> None:
    original(self)
    config = self.config
    if is_constructing.get():
        return
    if getattr(config, FLAG, None) is True and next(spectral_layers(self), None) is None:
        says, without = "spectral_conditioning=True", "corrections"
    elif getattr(config, PRECONDITIONER_FLAG, None) and not is_preconditioned(self):
        says, without = f"attention_preconditioner={config.attention_preconditioner!r}", "preconditioner"
    else:
        return
    if _is_conditioned(type(config)) and not isinstance(config, SpectralConfigMixin):
        return  # of a checkpoint's own code, which conditions the model when it is complete
    name = type(self).__name__
    counterpart = conditioned_counterpart(type(self))
    if counterpart is None:
        raise ValueError(f"The configuration of {name} says {says}, but the model is not conditioned: {_why(self)}")
    raise ValueError(
        f"The configuration of {name} says {says}, but a stock class was made from it, without the {without}. Make "
        f"the model with an Auto class, or hf_specattn.modeling.{counterpart.__name__}, from a conditioned "
        f"configuration: {type(config).__name__.removeprefix('Spec')}({says}, ...) or AutoConfig.from_pretrained(..., "
        f"{says}); setting the attribute afterwards does not change the class. Or condition the stock model: "
        "hf_specattn.condition(model, SpectralConfig(...)), hf_specattn.precondition(model, "
        "PreconditionerConfig(...))."
    )


# --- the flag --------------------------------------------------------------------------------------------------------


def _is_conditioned(config_class: Any) -> bool:
    """Also of classes that a checkpoint's own code brought, which are not this package's."""
    return str(getattr(config_class, "model_type", "")).startswith(MODEL_TYPE_PREFIX)


def _flag(cls: Any, kwargs: Mapping[str, Any], with_init: bool = False) -> bool:
    """Whether keyword arguments ask for conditioning, or a preconditioner.

    Args:
        with_init: `spectral_init` may be among them.

    Raises:
        ValueError: for a flag that is not a truth value, a class that has no conditioned counterpart, settings without their
            flag, or misspelled ones.
    """
    flag = kwargs.get(FLAG)
    if flag is not True and flag is not False and flag is not None:
        raise ValueError(f"spectral_conditioning={flag!r} must be True or False.")
    asked = flag or kwargs.get(PRECONDITIONER_FLAG) not in (None, False)
    if asked and issubclass(cls, PretrainedConfig) and cls not in CONDITIONED_CONFIGS:
        raise ValueError(f"{_asked(kwargs)}: {_why(cls)}")
    if _knows_settings(cls):
        stray = [name for name in (*SPECTRAL_FIELDS, "spectral_init") if name in kwargs and name != FLAG]
        if stray and not flag:
            raise ValueError(
                f"{stray[0]}={kwargs[stray[0]]!r} does nothing without spectral_conditioning=True; add it, or leave "
                f"{stray[0]} out."
            )
        refuse_misspelt(kwargs, cls if issubclass(cls, PretrainedConfig) else cls.config_class, with_init)
        preconditioner_settings(kwargs)  # refuses bad values, and others without their flag
    return asked


def _without_flags(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without flags that are off, which stock classes do not know."""
    return {name: value for name, value in kwargs.items() if name not in FLAGS}


def _asked(kwargs: Mapping[str, Any]) -> str:
    if kwargs.get(FLAG):
        return "spectral_conditioning=True"
    axis = kwargs.get(PRECONDITIONER_FLAG)
    return f"attention_preconditioner={axis!r}" if axis else "A conditioned configuration"


def _knows_settings(cls: Any) -> bool:
    """Whether `lambda_` and similar names can only mean conditioning: outside classes may have such a field."""
    config_class = cls if issubclass(cls, PretrainedConfig) else cls.config_class
    return config_class in CONDITIONED_CONFIGS


def _counterpart(cls: Any, kwargs: Mapping[str, Any]) -> Any:
    counterpart = conditioned_counterpart(cls)
    if counterpart is None:
        raise ValueError(f"{_asked(kwargs)}: {_why(cls)}")
    return counterpart


def _why(cls: Any) -> str:
    """The error that a class has no conditioned counterpart, with what to do."""
    cls = cls if isinstance(cls, type) else type(cls)
    model_type = getattr(cls, "model_type", None) or getattr(getattr(cls, "config_class", None), "model_type", None)
    return (
        f"{cls.__name__} (model type {model_type!r}) has no conditioned class; those of the model types "
        f"{', '.join(ARCHITECTURES)} have one for each head of an Auto class. Load or make the model without the flag "
        "and call hf_specattn.condition(model, SpectralConfig(...)), with architecture=AttentionSpec(...) for "
        "unknown attention; or register the class: hf_specattn.register_architecture."
    )
