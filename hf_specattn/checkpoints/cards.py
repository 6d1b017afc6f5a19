"""Model cards: the templates in `model_cards/`, filled in with what is known about a checkpoint."""

import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard

from ..architectures import ARCHITECTURES
from ..compat import tasks_of_pipelines
from ..config_fields import MODEL_TYPE_PREFIX
from ..figures import markdown_table
from ..modeling import AUTO_CLASSES, conditioned_class, conditioned_models
from ..preconditioner import PreconditionerConfig
from .evaluations_file import read_evaluations
from .pictures import PICTURE, kappa_picture
from .records import Record
from .remote_code import auto_map, needs_remote_code

CARD = "README.md"
TEMPLATES = "hf_specattn.model_cards"

# The parts of a source's card that also apply to what is made from it.
INHERITED = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag", "library_name")
LISTS = ("language", "datasets", "tags", "license", "base_model")  # of which there may be several
TEMPLATE_OF = {"convert": "conditioned.md", "fold": "folded.md", "balance": "balanced.md"}
PRECONDITIONER_TEMPLATE = "preconditioner.md"  # the part of each that is about it


def source_card(folder: Path) -> dict[str, Any]:
    """What the metadata of a checkpoint's README.md say; empty if there are none, or they are not YAML.

    Raises:
        ValueError: for a field of another type than the Hub's.
    """
    file = folder / CARD
    if not file.is_file():
        return {}
    try:
        data = RepoCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
    found = {name: data[name] for name in (*INHERITED, "base_model") if data.get(name) is not None}
    for name, value in found.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts) or (isinstance(value, list) and name not in LISTS):
            allowed = "a string or a list of strings" if name in LISTS else "a string"
            raise ValueError(f"{file}: {name} in its metadata is {value!r}, but must be {allowed}; correct it.")
    return {name: [value] if name == "tags" and isinstance(value, str) else value for name, value in found.items()}


def write_card(folder: Path, record: Record) -> list[str]:
    """Write README.md and, if matplotlib is installed, the figure; return the names of the files."""
    files = card_files(folder, record)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(files)


def card_files(folder: Path, record: Record, repo_id: str | None = None) -> dict[str, bytes]:
    """The model card of a checkpoint, and its figure if matplotlib is installed: file name -> content.

    Args:
        folder: of the checkpoint; its config.json and `evaluations*.json` are read.
        record: what was done to it.
        repo_id: its name on the Hub, for the examples; None where it has none yet.

    Raises:
        ValueError: for damaged evaluations.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    picture = kappa_picture(record)
    results = read_evaluations(folder)
    template = importlib.resources.files(TEMPLATES) / TEMPLATE_OF[record.command]
    card = ModelCard.from_template(
        _metadata(config, record, results, repo_id),
        template_str=template.read_text(encoding="utf-8"),
        **_variables(config, record, results, repo_id, PICTURE if picture else None),
    )
    # What a template leaves out leaves empty lines.
    files = {CARD: (re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n").encode()}
    return {**files, PICTURE: picture} if picture else files


def _metadata(
    config: Mapping[str, Any], record: Record, results: Sequence[EvalResult], repo_id: str | None
) -> ModelCardData:
    inherited = {name: record.card[name] for name in INHERITED if name in record.card}
    tags = [tag for tag in inherited.pop("tags", []) if isinstance(tag, str)]
    inherited.setdefault("pipeline_tag", _task(config))
    if needs_remote_code(dict(config)):
        inherited["library_name"] = "transformers"  # other libraries that the source names load no conditioned model
        tags.append("custom_code")
    inherited.setdefault("library_name", "transformers")
    return ModelCardData(
        **{name: value for name, value in inherited.items() if value is not None},
        base_model=record.base_model,
        tags=list(dict.fromkeys([*tags, *_own_tags(record)])),
        model_name=(repo_id or _model_name(record)).rpartition("/")[2] if results else None,
        eval_results=list(results) or None,
    )


def _own_tags(record: Record) -> list[str]:
    said = {
        "spectral-conditioning": record.spectral,
        "preconditioned-attention": record.preconditioner,
        "balanced-attention": record.command == "balance",
    }
    return [tag for tag, is_so in said.items() if is_so]


def _model_name(record: Record) -> str:
    return (
        record.source.rpartition("/")[2]
        + {"convert": "-specattn", "fold": "-folded", "balance": "-balanced"}[record.command]
    )


def _task(config: Mapping[str, Any]) -> str | None:
    name = _stock_class_name(config)
    tasks = [task for task, classes in tasks_of_pipelines().items() if name in classes.values()]
    return tasks[0] if tasks else "feature-extraction" if _auto_class(config) == "AutoModel" else None


def _stock_class_name(config: Mapping[str, Any]) -> str:
    name = str((config.get("architectures") or [""])[0])
    return name.removeprefix("Spec") if str(config["model_type"]).startswith(MODEL_TYPE_PREFIX) else name


def _auto_class(config: Mapping[str, Any]) -> str:
    """The Auto class that loads the checkpoint's own head; AutoModel where several or none do."""
    stock_type = str(config["model_type"]).removeprefix(MODEL_TYPE_PREFIX)
    classes = conditioned_models(stock_type) if stock_type in ARCHITECTURES else {}
    wanted = _stock_class_name(config)
    # The pretraining class is another name of one of the others.
    names = [name for name in AUTO_CLASSES if name != "AutoModelForPreTraining"] + ["AutoModelForPreTraining"]
    heads = {name: conditioned_class(classes[name], [f"Spec{wanted}"]) for name in names if name in classes}
    return next((name for name, head in heads.items() if head.stock_class.__name__ == wanted), "AutoModel")


def _variables(
    config: Mapping[str, Any], record: Record, results: Sequence[EvalResult], repo_id: str | None, picture: str | None
) -> dict[str, Any]:
    remote = needs_remote_code(dict(config))
    stock_type = str(config["model_type"]).removeprefix(MODEL_TYPE_PREFIX)
    return {
        "name": (repo_id or _model_name(record)).rpartition("/")[2],
        "path": repo_id or "path/to/this/folder",
        "auto_class": _auto_class(config),
        "remote_code": remote,
        "heads": [name for name in auto_map(str(config["model_type"])) if name != "AutoConfig"] if remote else [],
        "source": record.source,
        "revision": record.source_revision,
        "base_model": record.base_model,
        "license": record.card.get("license"),
        "spectral": record.spectral,
        "init": record.init,
        # For weights alone the source is unknown, and no change was measured.
        "made_here": record.init is not None or record.comparison["relative"] > 0,
        "comparison": record.comparison,
        "diagonal_loss": record.diagonal_loss,
        "kappa_table": kappa_table(record),
        "preconditioner": record.preconditioner,
        "about_preconditioner": _about_preconditioner(record),
        "layers": len({row.name for row in record.rows}),
        "picture": picture,
        "notes": [
            note for note in record.notes if not note.startswith("In ") and not note.startswith("Conditioning moves")
        ],
        "scores": _scores_table(results),
        "stock_class": _stock_class_name(config),
        "stock_in_transformers": not needs_remote_code({"model_type": stock_type}),
        "version": record.version,
    }


def _about_preconditioner(record: Record) -> str:
    if record.preconditioner is None:
        return ""
    import jinja2  # the other commands should not wait for it

    template = (importlib.resources.files(TEMPLATES) / PRECONDITIONER_TEMPLATE).read_text(encoding="utf-8")
    config = PreconditionerConfig(**record.preconditioner)
    return str(jinja2.Template(template).render(preconditioner=config, table=heads_table(record))).strip()


def heads_table(record: Record) -> str:
    """Condition numbers of the heads' outputs without the preconditioner and with it, in Markdown."""
    header = ("", "attentions", "A", "C A", "worst A", "worst C A", "heads where it grew")
    sides = [[_or_inf(row.before) for row in record.heads], [_or_inf(row.after) for row in record.heads]]
    if not record.heads:
        return ""
    figures = [f"{value:.4g}" for value in (*map(median, sides), *map(max, sides))]
    grew = f"{sum(row.grew for row in record.heads)} of {sum(row.heads for row in record.heads)}"
    return markdown_table(header, [("kappa", str(len(record.heads)), *figures, grew)]).strip()


def kappa_table(record: Record) -> str:
    """Condition numbers before and after in Markdown: medians and extremes over the layers, per projection; "" of none."""
    if not record.rows:
        return ""
    after = "balanced" if record.command == "balance" else "W + C"
    header = ("", "layers", "W", after, "worst W", f"worst {after}", "per head, W", f"per head, {after}")
    lines = []
    for projection in dict.fromkeys(row.projection for row in record.rows):
        rows = [row for row in record.rows if row.projection == projection]
        whole = [[_or_inf(row.before) for row in rows], [_or_inf(row.after) for row in rows]]
        heads = [[_or_inf(row.head_before) for row in rows], [_or_inf(row.head_after) for row in rows]]
        figures = [*map(median, whole), *map(max, whole), *map(median, heads)]
        lines.append((f"kappa({projection})", str(len(rows)), *(f"{value:.4g}" for value in figures)))
    return markdown_table(header, lines).strip()


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _scores_table(results: Sequence[EvalResult]) -> str:
    rows = []
    for item in results:
        data = ", ".join(filter(None, (item.dataset_name, item.dataset_split)))
        value = item.metric_value  # a number, or as on the Hub a text such as "20.0 ± 1.2"
        written = f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
        rows.append((data, item.metric_name or item.metric_type, written))
    return markdown_table(("", "metric", "value"), rows).strip() if rows else ""
