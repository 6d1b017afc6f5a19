"""What a checkpoint is, without changing it: `specattn inspect`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architectures import ARCHITECTURES
from ..checksums import verify
from ..config_fields import FIELDS, MODEL_TYPE_PREFIX
from ..diagnostics.spectra import spectra
from ..files import megabytes
from ..preconditioning import SOURCE, PreconditionReport, format_preconditioning, preconditioning_reports
from .probe import make_batch
from .records import KappaRow, heads_rows, read_record, spectra_rows
from .remote_code import auto_map, needs_remote_code, source_files
from .source_checkpoint import find_source, load_model
from .tables import format_rows


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        facts: name -> value, in order.
        rows: condition numbers of W, and of W + C, per projection.
        is_conditioned: whether W + C differs from W.
        heads: what its preconditioner does to each attention on a random probe; empty if it has none.
        settings: of the correction and the preconditioner, by the names of config.json; empty for a stock model.
    """

    facts: dict[str, str]
    rows: list[KappaRow]
    is_conditioned: bool
    heads: list[PreconditionReport] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What `describe` says, for `--json`; infinite condition numbers are None."""
        facts = {"facts": self.facts, "is_conditioned": self.is_conditioned, "settings": self.settings}
        return {**facts, "projections": self.rows, "heads": heads_rows(self.heads)}

    def describe(self) -> str:
        """The facts and the tables."""
        width = max(map(len, self.facts))
        lines = [f"{name.ljust(width)}  {value}" for name, value in self.facts.items()]
        preconditioning = ["", format_preconditioning(self.heads)] if self.heads else []
        return "\n".join([*lines, "", format_rows(self.rows, self.is_conditioned), *preconditioning])


def inspect_checkpoint(source: str, revision: str | None = None, allow_pickle: bool = False) -> Inspection:
    """Load a checkpoint and describe it.

    Args:
        source: a folder, or a model on the Hub.
        revision: branch, tag or commit, on the Hub.
        allow_pickle: load pickled weights, with `weights_only`.

    Raises:
        SourceError: no checkpoint, or a damaged one.
        ValueError: if no projection is found in it.
    """
    found = find_source(source, revision, allow_pickle)
    model, info = load_model(found)
    kind = "stock" if not needs_remote_code(found.config) else "of this package"
    facts = {
        "checkpoint": found.name + (f" at {found.revision}" if found.revision else ""),
        "class": f"{found.model_class.__name__} (model type {found.model_type}, {kind})",
    }
    if found.is_conditioned:
        spectral = model.config.spectral_config
        stored = "one correction stored per weight" if spectral.method == "svd" else "a number, no tensor"
        facts["conditioned"] = f"{spectral.describe()} on {', '.join(spectral.targets)}; {stored}"
        if spectral.method == "svd":
            files = [] if found.is_pickle else [found.folder / file for file in found.shards]
            facts["corrections"] = verify(files).describe()
    else:
        facts["conditioned"] = "no"
    if found.is_preconditioned:
        facts["preconditioned"] = f"{model.config.preconditioner_config.describe()}: {SOURCE}; no tensor"
    if (record := read_record(found.folder)) is not None:
        entered = f", init {record.init}" if record.init else ""
        facts["made by"] = f"specattn {record.command} from {record.source}{entered} (version {record.version})"
    count = len(found.shards)
    facts["weights"] = (
        f"{model.num_parameters():,} parameters, {', '.join(found.dtypes)}, {megabytes(found.weight_bytes)} in {count} "
        f"{'pickle' if found.is_pickle else 'safetensors file'}{'s' if count > 1 else ''}"
    )
    facts["loads without the package"] = _loads_without(found.folder, found.config)
    if missing := sorted(info["missing_keys"]):
        facts["not in the checkpoint"] = ", ".join(missing)
    if unexpected := sorted(info["unexpected_keys"]):
        facts["not in the model"] = ", ".join(unexpected)
    heads = preconditioning_reports(model, make_batch(model)) if found.is_preconditioned else []
    settings = {name: found.config[name] for name in FIELDS if name in found.config}
    return Inspection(facts, spectra_rows(spectra(model)), found.is_conditioned, heads, settings)


def _loads_without(folder: Path, config: dict[str, object]) -> str:
    if not needs_remote_code(config):
        return "yes"
    model_type = str(config["model_type"])
    known = model_type.removeprefix(MODEL_TYPE_PREFIX) in ARCHITECTURES
    missing = [file.name for file in source_files(model_type) if not (folder / file.name).is_file()]
    if known and not missing and config.get("auto_map") == auto_map(model_type):
        return "with trust_remote_code=True"
    return "no (specattn convert and specattn push add the remote code, specattn fold makes it unnecessary)"
