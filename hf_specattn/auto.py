"""Registration with transformers' Auto classes, and the dispatch of `from_pretrained(..., spectral_conditioning=True)`."""

from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from .crammed_bert import CrammedBertConfig
from .modeling import CONDITIONED_MODELS, CRAMMED_BERT_CLASSES, SPECTRAL_FIELDS


def register() -> None:
    """Teach the Auto classes the conditioned types, the flag on stock types, and Crammed BERT. Importing the package does.

    Idempotent. Without the flag a stock checkpoint loads as before, in its stock classes.
    """
    for auto_name, model_class in CRAMMED_BERT_CLASSES.items():
        getattr(transformers, auto_name).register(CrammedBertConfig, model_class, exist_ok=True)
    for by_auto_class in CONDITIONED_MODELS.values():
        conditioned = next(iter(by_auto_class.values())).config_class
        AutoConfig.register(conditioned.model_type, conditioned, exist_ok=True)
        for auto_name, model_class in by_auto_class.items():
            getattr(transformers, auto_name).register(conditioned, model_class, exist_ok=True)
        stock = conditioned.stock_config_class
        _share_preprocessors(stock, conditioned)
        AutoConfig.register(stock.model_type, _dispatching_config_class(stock, conditioned), exist_ok=True)


def _share_preprocessors(stock: type[PretrainedConfig], conditioned: type[PretrainedConfig]) -> None:
    if stock in TOKENIZER_MAPPING:
        AutoTokenizer.register(conditioned, tokenizer_class=TOKENIZER_MAPPING[stock], exist_ok=True)
    if stock in IMAGE_PROCESSOR_MAPPING:
        IMAGE_PROCESSOR_MAPPING.register(conditioned, IMAGE_PROCESSOR_MAPPING[stock], exist_ok=True)


def _dispatching_config_class(stock: type[PretrainedConfig], conditioned: Any) -> type[PretrainedConfig]:
    """What AutoConfig finds under a stock model type: a class that makes stock configurations, or conditioned ones.

    It never has instances. `from_dict` looks for the flag among the keyword arguments; construction gives a stock
    configuration. It bears the stock name and module because transformers asks those whether a type is its own: with
    others, third-party remote code of the same model type would stop loading.
    """

    def new(cls: type, *args: Any, **kwargs: Any) -> PretrainedConfig:
        return stock(*args, **kwargs)

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        flag = kwargs.pop("spectral_conditioning", False)
        if flag is not True and flag is not False and flag is not None:
            raise ValueError(f"spectral_conditioning={flag!r} must be True or False.")
        if flag:
            return conditioned.from_dict(config_dict, **kwargs)
        stray = [name for name in (*SPECTRAL_FIELDS, "spectral_init") if name in kwargs]
        if stray:
            raise ValueError(
                f"{stray[0]}={kwargs[stray[0]]!r} does nothing without spectral_conditioning=True; add it, or leave "
                f"{stray[0]} out."
            )
        return stock.from_dict(config_dict, **kwargs)

    namespace: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__new__": new,
        "from_dict": classmethod(from_dict),
    }
    return type(stock.__name__, (stock,), namespace)
