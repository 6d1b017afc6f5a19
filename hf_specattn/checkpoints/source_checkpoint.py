"""A source checkpoint: found in a folder or on the Hub, and checked before any work on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .. import modeling
from ..architectures import ARCHITECTURES
from ..checksums import CORRECTION
from ..config_fields import FIELDS, FLAG, MODEL_TYPE_PREFIX, PRECONDITIONER_FLAG, refuse_stored_fields
from ..modeling import crammed_bert_classes
from ..projections import find_projections
from .remote_code import refuse_outside

CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# Weight files of other frameworks, which the error mentions.
FOREIGN_WEIGHTS = ("tf_model.h5", "flax_model.msgpack", "*.gguf", "*.ckpt*")

# What is fetched from the Hub: weights of the folder itself, and every small file of text.
HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md", "*.safetensors"]
HUB_PICKLES = ["*.bin"]
HUB_IGNORED = ["*/*.safetensors", "*/*.bin", "onnx/*", "openvino/*"]

# What the Auto classes read of a config.json before its model does, which loads it by its class here.
LOADING_FIELDS: dict[str, tuple[type, ...]] = {"auto_map": (dict,), "dtype": (str, dict), "torch_dtype": (str, dict)}

# By the names of the safetensors format.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Floating-point formats that only a quantized model is stored in.
QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2")
INTEGER_DTYPES = ("I8", "U8")


class SourceError(ValueError):
    """The source is not a checkpoint, is damaged, or cannot be processed; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be loaded.

    Attributes:
        folder: Where its files are: the folder given, or the copy of the Hub's repository in the cache.
        hub_id: Its name on the Hub; None for a folder.
        revision: The commit that was fetched; None for a folder.
        config: The fields of its config.json.
        shards: File name -> names of the tensors in it, in the order of the names. A pickle that is one file has no names.
        dtype: The floating-point type of its weights; where there are several, the widest.
        dtypes: All of them, as torch names them.
        is_pickle: Whether the weights are pickled.
        model_class: What `architectures` names: the class to load it with.
    """

    folder: Path
    hub_id: str | None
    revision: str | None
    config: dict[str, Any]
    shards: dict[str, tuple[str, ...]]
    dtype: torch.dtype
    dtypes: tuple[str, ...]
    is_pickle: bool
    model_class: type[PreTrainedModel]

    @property
    def name(self) -> str:
        """Its name on the Hub, or the folder's own name without its path."""
        return self.hub_id or self.folder.name

    @property
    def model_type(self) -> str:
        """The model type in config.json."""
        return str(self.config["model_type"])

    @property
    def is_stock(self) -> bool:
        """Whether it is neither conditioned nor preconditioned."""
        return not self.model_type.startswith(MODEL_TYPE_PREFIX)

    @property
    def is_conditioned(self) -> bool:
        """Whether its projections have corrections."""
        return not self.is_stock and self.config.get(FLAG) is not False

    @property
    def is_preconditioned(self) -> bool:
        """Whether its attention is preconditioned."""
        return not self.is_stock and bool(self.config.get(PRECONDITIONER_FLAG))

    @property
    def weight_bytes(self) -> int:
        """The size of the files with the weights."""
        return sum((self.folder / file).stat().st_size for file in self.shards)


def find_source(path_or_id: str, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """Find a checkpoint and check it: every file of weights is opened, but no tensor is read.

    Args:
        path_or_id: A folder, or the name of a model repository on the Hub, which is downloaded into the cache.
        revision: Branch, tag or commit on the Hub.
        allow_pickle: Accept weights that are pickled; they are loaded with `weights_only`.

    Raises:
        SourceError: naming what is wrong, the file, and what to do.
    """
    folder, hub_id, commit = _locate(path_or_id, revision, allow_pickle)
    config = _read_config(folder, path_or_id)
    _refuse_quantized_config(config, path_or_id)
    _refuse_other_contents(config, folder, path_or_id)
    shards, is_pickle = _list_shards(folder, path_or_id, allow_pickle)
    shards, dtypes = (shards, {}) if is_pickle else _open_shards(folder, shards)
    _refuse_stray_corrections(config, shards, path_or_id)
    model_class = _model_class(config, path_or_id)
    if is_pickle:
        shards, dtypes = _open_pickles(folder, shards)
    if not dtypes:
        raise SourceError(
            f"The weights of {path_or_id} have no floating-point tensor: this is not a checkpoint of a model."
        )
    widest = max(dtypes.values(), key=lambda dtype: (torch.finfo(dtype).bits, -torch.finfo(dtype).eps))
    return Source(
        folder=folder,
        hub_id=hub_id,
        revision=commit,
        config=config,
        shards=shards,
        dtype=widest,
        dtypes=tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes.values())),
        is_pickle=is_pickle,
        model_class=model_class,
    )


def _refuse_other_contents(config: dict[str, Any], folder: Path, path_or_id: str) -> None:
    """Refuse a folder whose weights and config.json do not match."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise SourceError(
            f"{path_or_id} has a PEFT adapter next to its weights ({ADAPTER_CONFIG}), which transformers adds when it "
            "loads them. Merge it (model.merge_and_unload(), then save_pretrained into another folder), or move the "
            "adapter's files away if you want the model without it."
        )
    if not str(config["model_type"]).startswith(MODEL_TYPE_PREFIX):
        known = config["model_type"] in ARCHITECTURES
        try:
            refuse_stored_fields(config, FIELDS if known else (FLAG, PRECONDITIONER_FLAG))
        except ValueError as error:
            raise SourceError(f"{folder / CONFIG}: {error}") from error


def _refuse_stray_corrections(config: dict[str, Any], shards: dict[str, tuple[str, ...]], path_or_id: str) -> None:
    names = {name for found in shards.values() for name in found}
    stray = sorted(
        name for name in names if name.endswith(CORRECTION) and name.replace(CORRECTION, ".weight") in names
    )
    if stray and not str(config["model_type"]).startswith(MODEL_TYPE_PREFIX):
        raise SourceError(
            f"{path_or_id} has the {CONFIG} of a stock {config['model_type']}, and {len(stray)} correction(s) of a "
            f"conditioned model, such as {stray[0]}: {CONFIG} is not the one that was saved with the weights. Restore it "
            "from its source."
        )


def load_model(source: Source, dtype: torch.dtype | None = None) -> tuple[Any, dict[str, Any]]:
    """The model of a source in eval mode, and what became of its tensors (transformers' loading report).

    Args:
        dtype: Of the floating-point weights; None for the source's own.

    Raises:
        SourceError: if a tensor has another shape than the model's, a projection is missing, or a file cannot be read.
    """
    try:
        loaded: Any = source.model_class.from_pretrained(
            source.folder,
            dtype=source.dtype if dtype is None else dtype,
            local_files_only=True,
            use_safetensors=not source.is_pickle,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise SourceError(f"{source.name} cannot be loaded as {source.model_class.__name__}: {error}") from error
    model, info = loaded
    if mismatched := sorted(_key(entry) for entry in info["mismatched_keys"]):
        raise SourceError(
            f"{source.name}: {len(mismatched)} tensor(s) do not have the shapes that config.json says, such as "
            f"{mismatched[0]}. Either the weights or config.json belong to another model; restore them from their "
            "source."
        )
    _check_projections(source, model, set(info["missing_keys"]))
    return model.eval(), info


def _key(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


def _check_projections(source: Source, model: Any, missing: set[str]) -> None:
    try:
        projections = find_projections(model)
    except ValueError:  # an unknown architecture, which is reported elsewhere
        return
    for item in projections:
        for name in ("weight", "correction"):
            tensor = getattr(item.module, name, None)
            if tensor is not None and not torch.isfinite(tensor).all():
                cast = "" if tensor.dtype == source.dtype else f" as {tensor.dtype}, which may be too narrow (--dtype)"
                raise SourceError(
                    f"{source.name}: {item.name}.{name} has nan or inf entries{cast}. Restore the weights from their source, "
                    "or go back to a checkpoint before the training diverged."
                )
    lost = sorted(missing & {f"{item.name}.weight" for item in projections})
    if lost:
        raise SourceError(
            f"{source.name} lacks {len(lost)} weight(s) of its projections, such as {lost[0]}: they would be random numbers. "
            f'Either files are missing, or "architectures" in {CONFIG} names the wrong class for these weights.'
        )


# --- where ------------------------------------------------------------------------------------------------------------


def _locate(path_or_id: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None, str | None]:
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise SourceError(f"revision={revision!r} is for the Hub, but {path_or_id} is a folder; leave it out.")
        return path.resolve(), None, None
    if path.exists():
        raise SourceError(f"{path_or_id} is a file, not a checkpoint; pass the folder that contains its {CONFIG}.")
    try:
        validate_repo_id(path_or_id)
    except HFValidationError as error:
        raise SourceError(f"{path_or_id} is neither a folder nor a name on the Hub ('organization/model').") from error
    try:
        folder = Path(
            snapshot_download(
                path_or_id,
                revision=revision,
                allow_patterns=HUB_PATTERNS + (HUB_PICKLES if allow_pickle else []),
                ignore_patterns=HUB_IGNORED,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise SourceError(
            f"{path_or_id}{at} is not a folder here, and could not be fetched from the Hub ({type(error).__name__}). Check "
            "the name and the connection, and for a private model that you are logged in (`hf auth login`)."
        ) from error
    return folder, path_or_id, folder.name


def _read_config(folder: Path, path_or_id: str) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise SourceError(
                f"{path_or_id} is a PEFT adapter, not a model: it has {ADAPTER_CONFIG} and no {CONFIG}. Merge it into "
                "its base model first (model.merge_and_unload().save_pretrained(...))."
            )
        raise SourceError(
            f"{path_or_id} is not a checkpoint: it has no {CONFIG}. Pass a folder that save_pretrained wrote, or a "
            "model on the Hub."
        )
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{file} names no model_type: it is not a configuration of transformers.")
    for name, kinds in LOADING_FIELDS.items():
        if not isinstance(config.get(name), (*kinds, type(None))):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise SourceError(
                f"{file} is damaged: {name} is {config[name]!r}, not a {expected}. Restore it from its source."
            )
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SourceError: if it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} is damaged: {error}. Restore it from its source.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} is damaged: it holds a {type(content).__name__}, not an object.")
    return content


def _refuse_quantized_config(config: dict[str, Any], path_or_id: str) -> None:
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise SourceError(_quantized(path_or_id, f"quantization_config, method {method!r}"))


def _quantized(where: Any, what: str) -> str:
    return (
        f"{where} is quantized ({what}), which is not supported: quantized weights can be neither corrected nor "
        "balanced. Start from the checkpoint that it was quantized from, and quantize the result (folded, if it is "
        "conditioned)."
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def _list_shards(folder: Path, path_or_id: str, allow_pickle: bool) -> tuple[dict[str, tuple[str, ...]], bool]:
    """File name -> tensors that the index says are in it (none where there is no index), and whether they are pickles."""
    # In transformers' order.
    for single, index, is_pickle in ((SAFETENSORS, SAFETENSORS_INDEX, False), (PICKLE, PICKLE_INDEX, True)):
        found = single if (folder / single).is_file() else index if (folder / index).is_file() else None
        if found is None:
            continue
        if is_pickle and not allow_pickle:
            raise SourceError(
                f"{path_or_id} has its weights in {found} only, a pickle, which can run code when it is loaded. Ask its "
                "author for safetensors; if you trust it, --allow-pickle (allow_pickle=True) loads it with weights_only."
            )
        return ({single: ()} if found == single else _read_index(folder / index)), is_pickle
    foreign = sorted(file.name for pattern in FOREIGN_WEIGHTS for file in folder.glob(pattern))
    also = f" It has {', '.join(foreign)}, which belongs to another framework." if foreign else ""
    raise SourceError(
        f"{path_or_id} is not a checkpoint with weights: it has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}.{also}"
    )


def _read_index(file: Path) -> dict[str, tuple[str, ...]]:
    content = read_json(file)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        lost = "weight_map" if not isinstance(weight_map, dict) or not weight_map else "metadata"
        raise SourceError(
            f"{file} is damaged: it has no {lost}, which transformers reads. Restore it from its source."
        )
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise SourceError(f"{file} is damaged: {tensor} is listed in {shard!r}, which is not a file next to it.")
        shards.setdefault(shard, []).append(tensor)
    if absent := sorted(shard for shard in shards if not (file.parent / shard).is_file()):
        raise SourceError(
            f"{file.parent / absent[0]} is missing, which {file.name} lists. Restore it from its source."
        )
    return {shard: tuple(sorted(shards[shard])) for shard in sorted(shards)}


def _open_shards(
    folder: Path, shards: dict[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[str, ...]], dict[str, torch.dtype]]:
    """The tensors that each file really has, and the floating-point types among them."""
    present: dict[str, tuple[str, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for shard, listed in shards.items():
        file = folder / shard
        try:
            with safe_open(file, framework="pt") as stream:
                stored = {name: stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{file} is truncated or corrupted, or not a safetensors file at all: {error}. Restore it from its "
                "source."
            ) from error
        if lost := sorted(set(listed) - set(stored)):
            raise SourceError(f"{file} lacks {lost[0]}, which the index lists in it. Restore it from its source.")
        for name, dtype in stored.items():
            if dtype in QUANTIZED_DTYPES or (dtype in INTEGER_DTYPES and name.endswith(".weight")):
                raise SourceError(_quantized(file, f"{name} is stored as {dtype}"))
            _refuse_no_floats(file, name, dtype in FLOAT_DTYPES, dtype)
            if other := next((each for each, names in present.items() if name in names), None):
                raise SourceError(
                    f"{file} and {other} both hold {name}, and which one counts is left open. Restore both from their source."
                )
        dtypes |= {dtype: FLOAT_DTYPES[dtype] for dtype in stored.values() if dtype in FLOAT_DTYPES}
        present[shard] = tuple(sorted(stored))
    return present, dtypes


def _refuse_no_floats(file: Path, name: str, are_floats: bool, dtype: Any) -> None:
    """Refuse a weight that loading would cast, and so change."""
    if not are_floats and name.endswith(".weight"):
        raise SourceError(f"{file} is damaged: {name} is stored as {dtype}. Restore it from its source.")


def _open_pickles(
    folder: Path, shards: dict[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[str, ...]], dict[str, torch.dtype]]:
    present: dict[str, tuple[str, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for shard in shards:
        file = folder / shard
        try:
            tensors = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # whatever unpickling meets
            raise SourceError(f"{file} cannot be read with weights_only: {str(error).splitlines()[0]}") from error
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
        for name, value in tensors.items():
            _refuse_no_floats(file, name, value.is_floating_point(), value.dtype)
        dtypes |= {str(value.dtype): value.dtype for value in tensors.values() if value.is_floating_point()}
        present[shard] = tuple(sorted(tensors))
    return present, dtypes


# --- the class --------------------------------------------------------------------------------------------------------


def _model_class(config: dict[str, Any], path_or_id: str) -> type[PreTrainedModel]:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise SourceError(
            f'"architectures" in the {CONFIG} of {path_or_id} is {names!r}; it must name the class that the weights are of, '
            'such as ["BertForMaskedLM"]. Add it, or load the model and save it again.'
        )
    try:
        refuse_outside(str(config["model_type"]))
    except ValueError as error:
        raise SourceError(f"{path_or_id}: {error}") from error
    found: Any = _own_class(str(names[0])) or getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SourceError(
            f"{path_or_id} is a {names[0]} (model type {config['model_type']!r}), a class that neither transformers "
            f"{transformers.__version__} nor this package has: {unknown_architecture_way_out()}"
        )
    model_type = getattr(found.config_class, "model_type", None)
    if config["model_type"] != model_type and str(model_type).removeprefix(MODEL_TYPE_PREFIX) in ARCHITECTURES:
        raise SourceError(
            f"The {CONFIG} of {path_or_id} has model_type={config['model_type']!r}, but {names[0]} in its architectures is "
            f"of {model_type!r}: it was edited, or is damaged. Restore it from its source."
        )
    return found


def _own_class(name: str) -> Any:
    """The class of that name in this package; None where it has none."""
    crammed: dict[str, Any] = {each.__name__: each for each in crammed_bert_classes()[1].values()}
    found = getattr(modeling, name, None) if name.startswith("Spec") else crammed.get(name)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def unknown_architecture_way_out() -> str:
    """How a model that the table does not know is conditioned, for an error."""
    return (
        f"the architectures known here are {', '.join(ARCHITECTURES)}. For another one load the model in Python, say where "
        "its projections are, condition(model, SpectralConfig(...), architecture=AttentionSpec(...)), and save it folded, "
        "fold(model).save_pretrained(...); balance(model, architecture=AttentionSpec(...)) takes the same."
    )
