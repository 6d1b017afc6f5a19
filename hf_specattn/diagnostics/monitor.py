"""`SpectralMonitor`: the conditioning and saturation of attention during training, with the Trainer or in a loop."""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..files import write_json
from ..preconditioner import PreconditionedLayer, precondition_heads
from ..preconditioning import head_condition
from .advice import advise
from .attentions import Architecture, find_attentions
from .capture import CapturedAttention, capture
from .head_products import HeadProducts, head_products, value_path
from .indicator import jacobian_indicator
from .jacobian import jacobian_spectrum
from .saturation import Saturation, gradient_norms
from .spectra import ProjectionSpectra, effective_rank, spectra

if TYPE_CHECKING:
    from transformers import Trainer  # whose module imports datasets

MONITOR_FILE = "spectral_monitor.json"
PREFIX = "spectral/"
LABELS = ("labels", "label", "label_ids", "next_sentence_label")

logger = logging.get_logger(__name__)

Values = dict[str, float]


class SpectralMonitor(TrainerCallback):
    """Every `every` optimizer steps: spectra of W and W + C, the Jacobian's kappa, entropy, saturation, gradient norms.

    For the Trainer, `SpectralMonitor().attach(trainer)`, which adds it as a callback and logs through `trainer.log`,
    so that every tracker has the values; as a plain member of `callbacks=[...]` it only logs to the state's history.
    In your own loop, call `begin` before the first step, `observe_gradients` before each optimizer step, `measure`
    after it if `is_due`, and `end` after the last. The values are means over the chosen layers and all heads, as in
    the paper's figures; the file has them by layer.

    Training does not change: eval mode for one forward pass, no random number drawn, no gradient touched.

    Args:
        every: optimizer steps between measurements; there is one before the first step, too.
        batch: keyword arguments of a forward pass on which attention is measured; labels are left out. None: with the
            Trainer, the first two samples of the training data.
        layers: indices of the attention layers to measure, from 0, negative ones from the end. None: first, middle and last.
        jacobian_heads: heads of each layer, spread evenly, whose Jacobian is computed; 0: none.
        queries: tokens at which the Jacobian's output is taken, spread evenly (see `CapturedAttention.head`): its cost grows
            with their third power.
        architecture: as in [`condition`].
        file: JSON file for the measurements by layer. None: with the Trainer, `spectral_monitor.json` in its output
        folder, otherwise none.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        every: int = 200,
        *,
        batch: Mapping[str, Any] | None = None,
        layers: Iterable[int] | None = None,
        jacobian_heads: int = 1,
        queries: int = 8,
        architecture: Architecture = None,
        file: str | Path | None = None,
    ):
        for name, value, least in (
            ("every", every, 1),
            ("jacobian_heads", jacobian_heads, 0),
            ("queries", queries, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not allowed; give an integer >= {least}.")
        self.every, self.jacobian_heads, self.queries = every, jacobian_heads, queries
        self.architecture, self.file = architecture, None if file is None else Path(file)
        self.layers = None if layers is None else list(layers)
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._batch = batch
        self._inputs: dict[str, Any] = {}
        self._gradients: tuple[int, dict[str, list[list[float]]]] | None = None
        self._began: float | None = None
        self._log: Callable[[Values], None] | None = None

    # --- in your own loop ---

    def first_values(self, model: nn.Module, step: int = 0) -> Values:
        """Warn about problems before training, and measure; `step` is where a resumed run continues.

        Returns:
            The values by name, each starting with `spectral/`; empty for a resumed run, whose file is read instead.

        Raises:
            ValueError: without a batch, or if the attention of this model cannot be measured.
        """
        if self._batch is None:
            raise ValueError("SpectralMonitor needs batch={...}, the keyword arguments of a forward pass.")
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        self._inputs = _on_device(self._batch, model)
        places = len(find_attentions(model, self.architecture))
        if self.layers is None:
            self.layers = sorted({0, places // 2, places - 1})
        if step:
            self.records = self._earlier(step)
            return {}
        with self._timed():
            advice = advise(model, self._inputs, self.architecture)
        for warning in advice.warnings():
            logger.warning(warning)
        return self.measure(model, 0)

    def is_due(self, step: int) -> bool:
        """Whether this step, counted from 1, has a measurement."""
        return step % self.every == 0

    def observe_gradients(self, model: nn.Module, step: int) -> None:
        """Read the gradients before optimizer step `step`, if it has a measurement."""
        if self.is_due(step):
            with self._timed():
                rows = gradient_norms(model, self.architecture, self.layers)
                names = rows[0].norms
                self._gradients = (step, {name: [row.norms[name].tolist() for row in rows] for name in names})

    def measure(self, model: nn.Module, step: int) -> Values:
        """Measure the model now, keep the record and write the file; returns the values for the trackers."""
        with self._timed() as timer:
            record: dict[str, Any] = {"step": step, "layers": self.layers}
            rows = spectra(model, self.architecture, layers=self.layers)
            record |= _spectra_record(rows)
            record |= _products_record(head_products(model, self.architecture, layers=self.layers))
            record |= _path_record(value_path(model, self.architecture))
            captured = capture(model, self._inputs, self.architecture, self.layers)
            record |= _saturation_record([Saturation.of(item) for item in captured])
            record |= _outputs_record(captured)
            if self.jacobian_heads:
                record |= self._jacobian_record(captured)
            if self._gradients is not None and self._gradients[0] == step:
                record |= {f"grad_norm_{name}": norms for name, norms in self._gradients[1].items()}
            self._gradients = None
        record["seconds"] = timer[0]
        self.records.append(record)
        if self.file is not None:
            write_json(self.file, {"every": self.every, "records": self.records})
        return {f"{PREFIX}{name}": value for name, value in summary_of(record).items()}

    def end(self) -> str:
        """Log what it cost, and return that line."""
        total = 0.0 if self._began is None else time.perf_counter() - self._began
        share = f", {self.seconds / total:.1%} of the {total:.1f} s since training began" if total else ""
        line = f"Spectral monitor: {len(self.records)} measurements took {self.seconds:.2f} s{share}."
        logger.info(line)
        return line

    # --- with the Trainer ---

    def attach(self, trainer: "Trainer") -> "SpectralMonitor":
        """Become a callback of the Trainer and log through it."""
        trainer.add_callback(self)
        self._log = trainer.log
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn and measure before the first step."""
        if not state.is_world_process_zero:
            return
        if self._batch is None:
            self._batch = _first_samples(kwargs["train_dataloader"])
        if self.file is None:
            self.file = Path(str(args.output_dir)) / MONITOR_FILE
        self._report(state, self.first_values(kwargs["model"], state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the gradients, which are gone when the step ends."""
        if state.is_world_process_zero:
            self.observe_gradients(kwargs["model"], state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if it is due."""
        if state.is_world_process_zero and self.is_due(state.global_step):
            self._report(state, self.measure(kwargs["model"], state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what it cost."""
        if state.is_world_process_zero:
            print(self.end())

    def _report(self, state: TrainerState, values: Values) -> None:
        if not values:
            return
        if self._log is not None:
            self._log(dict(values))
        else:
            state.log_history.append({**values, "step": state.global_step})

    # --- parts ---

    def _jacobian_record(self, captured: list[CapturedAttention]) -> dict[str, Any]:
        found: dict[str, Any] = {"jacobian_heads": [], "kappa_jacobian": [], "jacobian_at_least": [], "indicator": []}
        for item in captured:
            places = item.spread_heads(self.jacobian_heads)
            heads = [item.head(place, queries=self.queries) for place in places]
            exact = [jacobian_spectrum(head) for head in heads]
            found["jacobian_heads"].append(places)
            found["kappa_jacobian"].append([_finite(spectrum.kappa) for spectrum in exact])
            found["jacobian_at_least"].append([spectrum.is_lower_bound for spectrum in exact])
            found["indicator"].append([_finite(jacobian_indicator(head).product) for head in heads])
        return found

    def _earlier(self, step: int) -> list[dict[str, Any]]:
        if self.file is None or not self.file.is_file():
            return []
        records = json.loads(self.file.read_text(encoding="utf-8"))["records"]
        return [record for record in records if record["step"] <= step]

    @contextlib.contextmanager
    def _timed(self) -> Iterator[list[float]]:
        """Add the time within to the cost; the list has it afterwards."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what training has queued does not count as the monitor's time
        started, timer = time.perf_counter(), [0.0]
        try:
            yield timer
        finally:
            timer[0] = time.perf_counter() - started
            self.seconds += timer[0]


def summary_of(record: Mapping[str, Any]) -> Values:
    """Of one measurement: the means over its layers and heads, by the names that trackers get (without `spectral/`)."""
    values = {}
    for name, by_layer in record.items():
        if name in ("step", "layers", "jacobian_heads", "jacobian_at_least"):
            continue
        numbers = [number for row in by_layer for number in row] if isinstance(by_layer, list) else [by_layer]
        known = [number for number in numbers if number is not None]
        if known:
            values[name] = sum(known) / len(known)
    return values


def _spectra_record(rows: list[ProjectionSpectra]) -> dict[str, Any]:
    """Per name a list over layers of lists over heads; `_effective` is W + C."""
    record: dict[str, Any] = {}
    for row in rows:
        for suffix, spectrum in (("", row.raw), ("_effective", row.effective)):
            for name, values in (
                ("sigma_min", spectrum.head_sigma_min),
                ("sigma_max", spectrum.head_sigma_max),
                ("kappa", spectrum.head_kappa),
                ("effective_rank", spectrum.head_effective_rank),
            ):
                record.setdefault(f"{name}_{row.projection}{suffix}", []).append([_finite(value) for value in values])
    return record


def _products_record(rows: list[HeadProducts]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for row in rows:
        name = f"kappa_{row.product.replace('-', '_')}"
        for suffix, values in (("", row.kappa_raw), ("_effective", row.kappa)):
            record.setdefault(f"{name}{suffix}", []).append([_finite(value) for value in values])
    return record


def _path_record(values: torch.Tensor | None) -> dict[str, Any]:
    """Of the product of all layers' `W_O W_V`: its effective rank, and its largest singular value over the median."""
    if values is None:
        return {}
    ratio = (values[0] / values.median()).item()
    return {"path_effective_rank": effective_rank(values).item(), "path_largest_to_median": _finite(ratio)}


def _saturation_record(rows: list[Saturation]) -> dict[str, Any]:
    return {
        "entropy": [row.entropy.tolist() for row in rows],
        "uniform_entropy": [[row.uniform_entropy] for row in rows],
        "saturated_share": [[_finite(share) for share in row.saturated_share.tolist()] for row in rows],
    }


def _outputs_record(captured: list[CapturedAttention]) -> dict[str, Any]:
    """kappa of what each head gives, geometric mean over the sequences; beside it, of what its preconditioner makes of it."""
    record: dict[str, Any] = {"kappa_head_output": []}
    for item in captured:
        # As many sequences as there are, each of its own length.
        outputs = [item.head_outputs(sequence).movedim(0, 1)[None] for sequence in range(len(item.x))]
        record["kappa_head_output"].append(_mean_kappa(outputs))
        layer = item.attention.output()
        if isinstance(layer, PreconditionedLayer):
            settings = (layer.heads, layer.preconditioner, layer.stock_norm)
            scaled = [
                precondition_heads(each.flatten(2), *settings).unflatten(-1, (layer.heads, -1)) for each in outputs
            ]
            record.setdefault("kappa_head_output_preconditioned", []).append(_mean_kappa(scaled))
    return record


def _mean_kappa(outputs: list[torch.Tensor]) -> list[float | None]:
    logs = torch.stack([head_condition(each)[0].log() for each in outputs])
    return [_finite(value) for value in logs.mean(0).exp().tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has neither nan nor infinity


def _on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in LABELS
    }


def _first_samples(loader: Any, count: int = 2) -> Mapping[str, Any]:
    """The first samples of a loader's dataset, collated; the random generators stay as they are."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            "SpectralMonitor cannot take samples from this training data without drawing from its stream; pass "
            f"batch={...}, the keyword arguments of a forward pass."
        )
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  collators draw from the global generator
    try:
        with torch.random.fork_rng():
            batch = loader.collate_fn([dataset[index] for index in range(count)])
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
    if not isinstance(batch, Mapping):
        raise ValueError(f"The collator returned a {type(batch).__name__}; pass batch={{...}} to SpectralMonitor.")
    return batch
