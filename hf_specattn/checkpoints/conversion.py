"""One checkpoint in, another out: conditioned (`convert`), folded, or balanced.

Memory: the model in its stored dtype (the correction too, of an svd model) and one layer in float64, which is the largest
module, often the embedding, while the dtype's own error is measured.
"""

import contextlib
import logging as standard_logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..architectures import ARCHITECTURES
from ..balance import balance, format_balance
from ..conditioning import condition, conditioned_counterpart, fold, format_reports
from ..config import INITS, SpectralConfig, check_choice
from ..diagnostics.spectra import spectra
from ..layers import spectral_layers
from ..modeling import AUTO_CLASSES
from ..preconditioner import PreconditionerConfig
from ..preconditioning import format_preconditioning, precondition, preconditioning_reports
from ..projections import find_projections
from .cards import CARD, source_card, write_card
from .destinations import (
    check_destination,
    check_space,
    companions,
    copy_companions,
    files_in,
    left_behind,
    save_model,
    whole_folder,
)
from .probe import Comparison, Diagonals, Probe, make_batch
from .records import (
    RECORD,
    HeadsRow,
    KappaRow,
    Record,
    balance_rows,
    conditioning_rows,
    heads_rows,
    spectra_rows,
)
from .remote_code import add_remote_code, source_files
from .source_checkpoint import Source, SourceError, find_source, load_model, unknown_architecture_way_out
from .tables import format_rows
from .tokenizers import name_tokenizer_class

# Configuration, tokenizer, card and picture, beyond the weights.
SMALL_FILES_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        folder: the destination.
        table: the condition numbers per layer, as text.
        comparison: the change of the outputs on the probe.
        notes: further remarks, one or more sentences each.
        files: the names of the files written.
    """

    folder: Path
    table: str
    comparison: Comparison
    notes: tuple[str, ...]
    files: tuple[str, ...]

    def describe(self) -> str:
        """The report that the command ends with."""
        return "\n".join([self.table, self.comparison.describe(), *self.notes, f"Written: {self.folder}"])


@dataclass(frozen=True)
class Options:
    """What the three conversions share.

    Attributes:
        revision: branch, tag or commit, of a source on the Hub.
        dtype: of the written weights; None for the source's.
        overwrite: replace the whole destination if it is not empty.
        allow_pickle: load pickled weights, with `weights_only`.
        base_model: name on the Hub of the source, for the card; None takes it from the source if known.
    """

    revision: str | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False
    allow_pickle: bool = False
    base_model: str | None = None


@dataclass(frozen=True)
class _Done:
    """What was done to the model in memory, for the record and the report."""

    table: str
    rows: list[KappaRow]
    comparison: Comparison
    spectral: SpectralConfig | None
    init: str | None = None
    diagonal_loss: float | None = None
    preconditioner: PreconditionerConfig | None = None
    heads: list[HeadsRow] = field(default_factory=list)


def convert(
    source: str,
    destination: str | Path,
    config: SpectralConfig | None,
    init: str = "additive",
    options: Options | None = None,
    preconditioner: PreconditionerConfig | None = None,
) -> Result:
    """Make a conditioned or preconditioned checkpoint from a stock one: weights, configuration, tokenizer, code and card.

    Args:
        source: a folder, or a model on the Hub.
        destination: the new folder; it is written completely or not at all.
        config: what to add where; None for no corrections.
        init: as in [`condition`]. `"preserve"` must keep the outputs to the tolerance of the dtype (until they are
            preconditioned).
        preconditioner: as in [`precondition`], measured on a random probe; None for none. It changes the function.

    Raises:
        SourceError: no checkpoint, a damaged one, a conditioned one, or an architecture that is not known.
        DestinationError: a destination that is not empty, the source itself, or a full disk.
        OutputChangedError: with `"preserve"`, if the dtype is too coarse. Nothing is written.
        ValueError: as in [`condition`] and [`precondition`], and where there is neither.
    """
    check_choice("init", init, INITS)
    if config is None and preconditioner is None:
        raise ValueError("There is nothing to convert to: pass a SpectralConfig, a PreconditionerConfig, or both.")

    def work(found: Source, model: Any) -> _Done:
        _refuse_unsaveable(found)
        find_projections(model)  # its warnings; the rest is quiet
        preserves = config is not None and init == "preserve"
        probe = Probe(model, keeps_function=preserves)
        done = None if config is None else _condition(model, config, init, probe)
        if preconditioner is not None:
            done = _precondition(model, preconditioner, probe, done)
        assert done is not None
        return done

    return _run("convert", source, destination, options or Options(), work)


def _condition(model: Any, config: SpectralConfig, init: str, probe: Probe) -> _Done:
    diagonals = Diagonals(model, config) if init == "preserve" else None
    with _quiet():
        reports = condition(model, config, init)
    if config.method == "svd" and init == "additive":
        _compute_in_float64(model)
    comparison = probe.compare(model, "Conditioning with init='preserve'")
    loss = diagonals.loss(model) if diagonals is not None else None
    return _Done(format_reports(reports), conditioning_rows(reports, init), comparison, config, init, loss)


def _precondition(model: Any, preconditioner: PreconditionerConfig, probe: Probe, done: _Done | None) -> _Done:
    reports = precondition(model, preconditioner, probe.batch)
    probe.tolerance = None
    done = done or _Done("", [], Comparison(0.0, 0.0, None, None), None)
    return replace(
        done,
        table="\n\n".join(filter(None, (done.table, format_preconditioning(reports)))),
        comparison=probe.compare(model, "Preconditioning"),
        preconditioner=preconditioner,
        heads=heads_rows(reports),
    )


def fold_checkpoint(source: str, destination: str | Path, options: Options | None = None) -> Result:
    """Make a plain checkpoint of the stock architecture from a conditioned one; a preconditioner stays.

    Arguments, errors and result as in [`convert`]; a source that is not conditioned is an error.
    """

    def work(found: Source, model: Any) -> _Done:
        probe, diagonals = Probe(model, keeps_function=True), Diagonals(model)
        config, before = model.config.spectral_config, spectra(model)
        with _quiet():
            fold(model)
        comparison = probe.compare(model, "Folding")
        rows = spectra_rows(before)
        table = format_rows(rows, is_conditioned=True)
        return _Done(table, rows, comparison, config, None, diagonals.loss(model), *_kept_preconditioner(model))

    return _run("fold", source, destination, options or Options(), work)


def balance_checkpoint(source: str, destination: str | Path, options: Options | None = None) -> Result:
    """Make a checkpoint of the same architecture and function whose heads are balanced (see [`balance`]).

    Arguments, errors and result as in [`convert`]; a conditioned source is an error.
    """

    def work(found: Source, model: Any) -> _Done:
        reports = balance(model, make_batch(model))
        change = reports.output_change
        comparison = Comparison(change.absolute, change.relative, reports.dtype_error, reports.tolerance)
        table = format_balance(reports).rsplit("\n", 2)[0]  # its last two lines are said below
        return _Done(table, balance_rows(reports), comparison, None, None, None, *_kept_preconditioner(model))

    return _run("balance", source, destination, options or Options(), work)


def _kept_preconditioner(model: Any) -> tuple[PreconditionerConfig | None, list[HeadsRow]]:
    """The preconditioner that stays on a folded or balanced model, and what it does to the heads."""
    preconditioner = getattr(model.config, "preconditioner_config", None)
    if preconditioner is None:
        return None, []
    return preconditioner, heads_rows(preconditioning_reports(model, make_batch(model)))


@torch.no_grad()
def _compute_in_float64(model: Any) -> None:
    """Recompute the svd corrections in float64: in float32 an ill-conditioned weight leaves them four digits or fewer.

    It decides what an additive model computes. A preserved one computes with W, whatever C is.
    """
    for _, layer in spectral_layers(model):
        layer.correction.copy_(layer.orient(layer.correction_of(layer.matrix().double())))


def _run(
    command: str, source: str, destination: str | Path, options: Options, work: Callable[[Source, Any], _Done]
) -> Result:
    destination = Path(destination).expanduser()
    local = Path(source).expanduser()
    check_destination(destination, local if local.is_dir() else None, options.overwrite)
    found = find_source(source, options.revision, options.allow_pickle)
    check_destination(destination, found.folder, options.overwrite)
    _refuse_wrong_state(command, found)
    companions(found.folder), source_card(found.folder)  # refuse links and damaged metadata, before any work
    check_space(destination, _expected_bytes(found, options))
    model, info = load_model(found, options.dtype)
    done = work(found, model)
    notes = _notes(command, found, done, info, options)
    with whole_folder(destination, options.overwrite) as folder:
        save_model(model, folder, found, without=info["missing_keys"])
        copied = copy_companions(found.folder, folder)
        add_remote_code(folder)
        name_tokenizer_class(found.folder, folder)
        record = _record(command, found, done, notes, options)
        record.write(folder)
        write_card(folder, record)
        written = files_in(folder)
    remote = [file.name for file in source_files(found.model_type)]
    if dropped := left_behind(found, [*copied, *written, *remote, RECORD, CARD]):
        notes = [*notes, f"Left behind: {_some(dropped, 8)}."]
    return Result(destination, done.table, done.comparison, tuple(notes), tuple(written))


def _refuse_wrong_state(command: str, found: Source) -> None:
    if command == "convert" and found.is_conditioned:
        raise SourceError(
            f"{found.name} is already conditioned (model type {found.model_type!r}); conditioning twice would add both "
            "corrections. `specattn fold` it first, then convert the result."
        )
    if command == "convert" and found.is_preconditioned:
        raise SourceError(
            f"{found.name} is already preconditioned, which fold does not remove: convert the stock checkpoint that "
            "it was made from. To add corrections to it as it is, load it, condition(model, SpectralConfig(...)), "
            "and save it."
        )
    if command == "fold" and not found.is_conditioned:
        what = "preconditioned" if found.is_preconditioned else "a stock"
        raise SourceError(
            f"{found.name} is {what} {found.model_type}, not conditioned: there is nothing to fold. "
            + (
                "No weight can hold a preconditioner: it stays."
                if found.is_preconditioned
                else "`specattn convert` makes a conditioned checkpoint of it."
            )
        )
    if command == "balance" and found.is_conditioned:
        raise SourceError(f"{found.name} is conditioned; balancing W would change W + C. `specattn fold` it first.")


def _refuse_unsaveable(found: Source) -> None:
    """An unknown architecture, before the model is worked on."""
    if conditioned_counterpart(found.model_class) is None:
        known = found.model_type in ARCHITECTURES
        why = f"only the heads of {', '.join(AUTO_CLASSES)} have one; " if known else ""
        raise SourceError(
            f"{found.name} is a {found.model_class.__name__} (model type {found.model_type!r}), which has no conditioned "
            f"class to be saved as: {why}{unknown_architecture_way_out()}"
        )


def _expected_bytes(found: Source, options: Options) -> int:
    # A correction for each projection is less than the weights themselves; a wider dtype is known.
    wider = 1 if options.dtype is None else max(1, options.dtype.itemsize // found.dtype.itemsize)
    return 2 * wider * found.weight_bytes + SMALL_FILES_BYTES


def _notes(command: str, found: Source, done: _Done, info: dict[str, Any], options: Options) -> list[str]:
    notes = []
    dtype = str(options.dtype or found.dtype).removeprefix("torch.")
    if done.diagonal_loss is not None:
        where = "folded" if command == "fold" else "preserved"
        notes.append(
            f"In {dtype}, the {where} weights hold W's diagonal with a mean relative error of "
            f"{done.diagonal_loss:.2g}, because next to lambda few digits are left for it. The outputs are within the "
            "tolerance; --dtype float32 keeps W."
        )
    if len(found.dtypes) > 1 and options.dtype is None:
        notes.append(f"The source mixes {', '.join(found.dtypes)}; everything was loaded and written in {dtype}.")
    if missing := sorted(info["missing_keys"]):
        notes.append(f"Not in the source, and so not written (a model initializes them at random): {_some(missing)}.")
    if unexpected := sorted(info["unexpected_keys"]):
        notes.append(
            f"In the source, but not part of {found.model_class.__name__}, and left out: {_some(unexpected)}."
        )
    if command == "balance":
        notes.append(
            "Conditioning moves, it does not vanish: what W_V loses W_O takes up, and W_Q and W_K share theirs. The function "
            "is the same."
        )
    if done.preconditioner is not None and command != "convert":
        notes.append(
            "The preconditioner stays: no weight can hold it, and the checkpoint needs this package, or the code "
            "saved with it."
        )
    return notes


def _some(names: list[str], count: int = 4) -> str:
    return f"{', '.join(names[:count])}{f' and {len(names) - count} more' if len(names) > count else ''}"


def _record(command: str, found: Source, done: _Done, notes: list[str], options: Options) -> Record:
    card = source_card(found.folder)
    own = card.get("base_model") if command == "fold" else None  # the conditioned model is no base of others
    base = options.base_model or (own if isinstance(own, str) else None) or found.hub_id
    return Record(
        command=command,
        source=found.name,
        source_revision=found.revision,
        base_model=base,
        spectral=None if done.spectral is None else done.spectral.to_dict(),
        init=done.init,
        comparison=asdict(done.comparison),
        diagonal_loss=done.diagonal_loss,
        rows=done.rows,
        notes=notes,
        card=card,
        preconditioner=None if done.preconditioner is None else done.preconditioner.to_dict(),
        heads=done.heads,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings: what they would say is measured, and said in the report."""
    logger = standard_logging.getLogger(__name__.partition(".")[0])
    level = logger.level
    logger.setLevel(standard_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
