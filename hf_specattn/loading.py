"""Loading a conditioned model: what the checkpoint is, whether its corrections are there, and how stock weights enter."""

from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.utils import logging

from .checksums import CORRECTION, check_shape, verify, weight_files
from .compat import IS_REMOTE_CODE, UnsupportedTransformersError
from .conditioning import check_lambda, half_precision_cost, subtract_correction
from .config import INITS, check_choice
from .config_fields import FLAG, MODEL_TYPE_PREFIX, PRECONDITIONER_FLAG
from .layers import spectral_layers
from .preconditioner import preconditioned_layers
from .preconditioning import precondition

logger = logging.get_logger(__name__)


def stored_config(path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of the checkpoint's config.json; None where a local folder, the Hub or a state dict has none."""
    if path is None:
        return None
    names = (
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "token",
        "revision",
        "subfolder",
        "gguf_file",
    )
    try:
        found = PretrainedConfig.get_config_dict(path, **{name: kwargs[name] for name in names if name in kwargs})[0]
    except OSError:
        return None
    return found or None


def is_conditioned_checkpoint(stored: dict[str, Any] | None, config: Any, spectral_init: str | None) -> bool:
    """Whether its weights are those of a conditioned model.

    Args:
        stored: its config.json. Without one the caller says it: by the configuration that comes with the weights, and by
            `spectral_init`, which is for stock weights.
        config: that configuration, as it was given, without settings from keyword arguments.
        spectral_init: as given.
    """
    if stored is None:
        is_stock = isinstance(config, PretrainedConfig) and not str(config.model_type).startswith(MODEL_TYPE_PREFIX)
        return spectral_init is None and not is_stock
    return str(stored.get("model_type", "")).startswith(MODEL_TYPE_PREFIX)


def refuse_unsupported_loading(config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse quantization and tensor parallelism.

    Raises:
        ValueError: with the way out.
    """
    if kwargs.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config is set, but a quantizer would replace the conditioned projections and silently drop "
            "their corrections. Load without it, call hf_specattn.fold(model), save, and quantize the folded "
            "checkpoint."
        )
    for name in ("tp_plan", "tp_size", "distributed_config"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}={kwargs[name]!r}: tensor parallelism would shard W but not C. Use DDP or FSDP, or fold the "
                "model first."
            )


def check_init(spectral_init: str | None, conditioned: bool, config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a `spectral_init` that is unknown, or does nothing with this checkpoint and these settings.

    Raises:
        ValueError: with what to leave out or add.
    """
    if spectral_init is None:
        return
    check_choice("spectral_init", spectral_init, INITS)
    if conditioned:
        raise ValueError(
            f"spectral_init={spectral_init!r}: this checkpoint is already conditioned, so its weights do not enter in "
            "a new way; leave spectral_init out."
        )
    if not getattr(config, FLAG, kwargs.get(FLAG)) and (config is not None or kwargs.get(PRECONDITIONER_FLAG)):
        raise ValueError(
            f"spectral_init={spectral_init!r} does nothing without spectral_conditioning=True; add it, or leave "
            "spectral_init out."
        )
    every = getattr(config, "spectral_refresh_every", kwargs.get("spectral_refresh_every"))
    if spectral_init == "preserve" and every is not None:
        raise ValueError(
            f"spectral_init='preserve' with spectral_refresh_every={every} is not possible: a correction recomputed "
            "from W - C is a different one. Use spectral_init='additive', or no spectral_refresh_every."
        )


def check_corrections_loaded(path: Any, model: Any, info: dict[str, Any], stored: Mapping[str, Any] | None) -> None:
    """Refuse a model whose corrections or conditioned weights are not all from its checkpoint.

    Args:
        path: of the checkpoint.
        model: as loaded.
        stored: its config.json, if it has one.
        info: what `from_pretrained` returns with `output_loading_info=True`.

    Raises:
        ValueError: for corrections that are lost, misshapen or surplus, and for weights under other names.
    """
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    missing = set(info["missing_keys"])
    # An attention that the checkpoint does not have at all (the cross-attention of a new decoder) begins as stock ones do.
    new = {key for key in missing if f"{key.removesuffix(CORRECTION)}.weight" in missing}
    lost = sorted(key for key in {*missing, *mismatched} - new if key.endswith(CORRECTION))
    path = "The state dict" if path is None else path
    if lost:
        by, way_out = "", ""
        if stored is None:
            by = " by the configuration given with it (it has no config.json)"
            way_out = " If the weights are those of a stock model, pass spectral_init='additive' or 'preserve'."
        raise ValueError(
            f"{path} is a conditioned checkpoint{by}, but {len(lost)} correction(s) are missing from it or have the wrong "
            f"shape, such as {lost[0]}. They are part of the trained function and cannot be recomputed; restore the file "
            f"from its source.{way_out}"
        )
    ours = {f"{name}.weight" for name, _ in (*spectral_layers(model), *preconditioned_layers(model))}
    random = sorted(ours & missing)
    parts = tuple(name.removesuffix("weight") for name in random)  # of pruned or parametrized weights
    unexpected = info["unexpected_keys"]
    others = sorted(
        key for key in unexpected if key.startswith(parts) or (ours <= missing and key.endswith(".weight"))
    )
    if random and others:
        raise ValueError(
            f"{path} is one of {type(model).__name__} by its configuration, but holds {others[0]} and others instead of "
            f"{len(random)} weight(s) of its projections, such as {random[0]}, which would be random numbers. Restore "
            "config.json and the weights from their source. Where a wrapper added a prefix to the names ('module.' of DDP, "
            "'_orig_mod.' of torch.compile), remove it; where weights were pruned or parametrized, make them plain "
            "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations) and save again."
        )
    if surplus := sorted(key for key in info["unexpected_keys"] if key.endswith(CORRECTION)):
        raise ValueError(
            f"{path} holds {len(surplus)} correction(s) that its configuration does not mention, such as {surplus[0]} "
            f"(spectral_method={model.config.spectral_method!r}, spectral_targets={model.config.spectral_targets}): "
            "one of the two was changed, and the model would compute something else. Restore both from their source."
        )
    if set(model._computed_corrections) - missing:
        raise UnsupportedTransformersError(
            f"transformers {transformers.__version__} does not mark loaded tensors as this package expects, so the "
            f"corrections of {path} would be recomputed. Install a supported release (pip install hf_specattn)."
        )


def loaded_corrections(model: Any) -> list[str]:
    """The names of the svd corrections that were in the checkpoint, not computed from W; but for offloaded ones."""
    svd = [
        name for name, layer in spectral_layers(model) if layer.spectral.method == "svd" and not layer.weight.is_meta
    ]
    return [f"{name}{CORRECTION}" for name in svd if f"{name}{CORRECTION}" not in model._computed_corrections]


def refuse_stray_corrections(path: Any, found: Iterable[str], stored: Mapping[str, Any] | None) -> None:
    """Refuse the corrections of a conditioned model in weights that are loaded as those of a stock one.

    Args:
        path: of the checkpoint.
        found: names of tensors in it; others than corrections do not matter.
        stored: its config.json, if it has one.

    Raises:
        ValueError: naming one.
    """
    stray = sorted(name for name in found if name.endswith(CORRECTION))
    if not stray:
        return
    if stored is None:
        raise ValueError(
            f"{'The state dict' if path is None else path} holds {len(stray)} correction(s) of a conditioned model, such as "
            f"{stray[0]}, and would be loaded as the weights of a stock one. Pass the configuration that the model was saved "
            "with (it has no config.json), without spectral_init."
        )
    raise ValueError(
        f"{path} has the config.json of a stock model, and {len(stray)} correction(s) of a conditioned one, such "
        f"as {stray[0]}: this config.json was not saved with these weights. Restore it from its source."
    )


def verify_corrections(path: Any, model: Any, stored: dict[str, Any] | None, kwargs: Mapping[str, Any]) -> None:
    """Check svd corrections by their checksums; without those by their shape, and say what stays unproved.

    Raises:
        ValueError: for a correction that is damaged.
    """
    path = "the given state dict" if path is None else path
    if model.config.spectral_method != "svd":
        if stored is None:
            logger.warning(
                f"{path}: that these weights were trained with {model.config.describe_conditioning()} is what the given "
                "configuration says; without a config.json nothing proves it. If they are those of a stock model, pass "
                "spectral_init."
            )
        return
    verified = verify(weight_files(path, model.config, kwargs))
    if verified.checked and not verified.unproved:
        return
    every = (vars(model.config) if stored is None else stored).get("spectral_refresh_every")
    check_shape(path, spectral_layers(model), verified.coarsest, by_products=every is not None)
    logger.warning(f"The corrections of {path}: {verified.describe()}. save_pretrained adds checksums.")


def enter_stock_weights(model: Any, spectral_init: str) -> None:
    """Let the weights of a stock checkpoint enter as `spectral_init` says, and say what it does to the function.

    Raises:
        ValueError: for offloaded projections, and for a lambda that swallows W.
    """
    named = list(spectral_layers(model))
    layers = [layer for _, layer in named]
    if any(layer.weight.is_meta for layer in layers):
        raise ValueError(
            "Projections were offloaded before their corrections could be computed; load with device_map='cpu' (or on one "
            "device), save_pretrained, and offload the conditioned checkpoint."
        )
    for name, layer in named:
        check_lambda(name, layer.weight, layer.spectral)
    if spectral_init == "preserve":
        if cost := half_precision_cost(layers, shift=-1):
            logger.warning(f"{cost}, so spectral_init='preserve' does not keep the function; load with dtype=float32.")
        for layer in layers:
            subtract_correction(layer)
        return
    if layers and model.config.preconditioner_config is None:
        logger.warning(
            f"{type(model).__name__} was loaded from a checkpoint that was not trained conditioned, and adding "
            f"{model.config.spectral_config.describe()} changes its function: it needs training before use. To keep the "
            "function pass spectral_init='preserve'; to start from scratch use from_config."
        )


def enter_preconditioner(model: Any) -> None:
    """Measure the norms of stock weights if they have to be matched, and say that the function changes."""
    preconditioner = model.config.preconditioner_config
    if preconditioner is None:
        return
    if preconditioner.scale == "match":
        if IS_REMOTE_CODE:
            raise ValueError(
                "preconditioner_scale='match' is measured by the package hf_specattn, not by this checkpoint's own "
                "code: install it, import hf_specattn, and load the stock checkpoint again."
            )
        precondition(model, preconditioner)
    logger.warning(
        f"{type(model).__name__} was loaded from a checkpoint that was trained without its "
        f"{model.config.describe_conditioning()}: the function changes, and the model needs training before use. No "
        "form of a preconditioner keeps the function."
    )
