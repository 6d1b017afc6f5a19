"""One self-contained HTML page about the conditioning of a model's attention, with its figures as PNG and SVG."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from torch import nn

from ..figures import render
from ..files import write_bytes
from ..preconditioner import is_preconditioned
from ..preconditioning import SOURCE, PreconditionReport, preconditioning_reports
from .advice import advise
from .attention_figures import (
    distributions_figure,
    heat_maps_figure,
    is_conditioned,
    jacobian_figure,
    outcome_figure,
    spectra_figure,
    training_figure,
)
from .attentions import Architecture
from .capture import CapturedAttention, capture
from .head_products import HeadProducts, head_products
from .indicator import Indicator, jacobian_indicator
from .jacobian import jacobian_spectrum
from .saturation import Saturation
from .spectra import ProjectionSpectra, spectra

PAGE = "report.html"

# The paper's stock ViT-B heads are at about 1e2 to 1e3; above that, float32 products lose half of their digits.
LARGE_KAPPA = 1e3
WITHOUT_CHOICE = 1 + 1e-4


@dataclass(frozen=True)
class JacobianRow:
    """The Jacobian of one head.

    Attributes:
        layer, head: which.
        kappa: its condition number; a lower bound where `is_lower_bound`.
        is_lower_bound: see [`JacobianSpectrum`].
        rank: the number of nonzero singular values; None if unknown.
        shape: of J.
        indicator: the factors of (10).
    """

    layer: int
    head: int
    kappa: float
    is_lower_bound: bool
    rank: int | None
    shape: tuple[int, int]
    indicator: Indicator

    @property
    def without_choice(self) -> bool:
        """Whether query and key change nothing: then J is that of the values, the same at every token, and its kappa is 1."""
        return self.kappa < WITHOUT_CHOICE and self.rank is not None and self.rank < min(self.shape)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the page shows.

    Attributes:
        spectra: of every projection, W_O included.
        products: of every head's `W_Q^T W_K` and `W_O W_V`.
        saturation: of every layer on the batch.
        jacobians: of the measured heads.
        warnings: what is wrong, in sentences.
        preconditioning: what the preconditioner does to the heads; empty if there is none.
    """

    spectra: list[ProjectionSpectra]
    products: list[HeadProducts]
    saturation: list[Saturation]
    jacobians: list[JacobianRow]
    warnings: list[str]
    preconditioning: list[PreconditionReport] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything on the page, by name, for `--json`; layers and heads count from 0."""
        return {
            "verdicts": verdicts(self),
            "projections": [
                {
                    "layer": row.layer,
                    "name": row.name,
                    "projection": row.projection,
                    "shape": row.shape,
                    "kappa_raw": row.raw.kappa,
                    "kappa": row.effective.kappa,
                    "sigma_min": row.effective.sigma_min,
                    "sigma_max": row.effective.sigma_max,
                    "head_kappa": row.effective.head_kappa,
                }
                for row in self.spectra
            ],
            "products": self.products,
            "saturation": self.saturation,
            "jacobians": self.jacobians,
            "preconditioning": self.preconditioning,
        }


def diagnose(
    model: nn.Module,
    data: Mapping[str, Any],
    *,
    architecture: Architecture = None,
    queries: int | None = 16,
    jacobian_heads: int | None = None,
) -> Diagnosis:
    """Compute what the page shows.

    Args:
        data: keyword arguments of a forward pass.
        architecture: as in [`condition`].
        queries: tokens of the first sequence at which the Jacobian's output is taken; None: all.
        jacobian_heads: heads of each layer, spread evenly; None: all, 0: none.

    Raises:
        ValueError: as [`capture`] and `CapturedAttention.head`.
    """
    captured = capture(model, data, architecture)
    jacobians = [row for item in captured for row in _jacobian_rows(item, queries, jacobian_heads)]
    return Diagnosis(
        spectra=spectra(model, architecture, output=True),
        products=head_products(model, architecture),
        saturation=[Saturation.of(item) for item in captured],
        jacobians=jacobians,
        warnings=advise(model, data, architecture).warnings(),
        preconditioning=preconditioning_reports(model, data, architecture) if is_preconditioned(model) else [],
    )


def _jacobian_rows(captured: CapturedAttention, queries: int | None, heads: int | None) -> list[JacobianRow]:
    rows = []
    for place in captured.spread_heads(heads):
        head = captured.head(place, queries=queries)
        found = jacobian_spectrum(head)
        layer, indicator = captured.attention.layer, jacobian_indicator(head)
        rows.append(JacobianRow(layer, place, found.kappa, found.is_lower_bound, found.rank, found.shape, indicator))
    return rows


def write_report(
    model: nn.Module,
    data: Mapping[str, Any],
    folder: str | Path,
    *,
    title: str | None = None,
    architecture: Architecture = None,
    queries: int | None = 16,
    jacobian_heads: int | None = None,
) -> Path:
    """Examine the model on `data`, and write `report.html` and its figures (PNG and SVG) into `folder`.

    Args:
        title: of the page; None: the model's class.
        data, architecture, queries, jacobian_heads: as in [`diagnose`].

    Returns:
        The page.

    Raises:
        ValueError: as in [`diagnose`].
        ImportError: if matplotlib is missing.
    """
    diagnosis = diagnose(model, data, architecture=architecture, queries=queries, jacobian_heads=jacobian_heads)
    return write_diagnosis(diagnosis, folder, title or type(model).__name__)


def write_diagnosis(diagnosis: Diagnosis, folder: str | Path, title: str) -> Path:
    """Write a diagnosis as `report.html`, with its figures (PNG and SVG) next to it; returns the page.

    The page is self-contained: it has no scripts, and the figures are in it.
    """
    figures = {
        "spectra": spectra_figure(diagnosis.spectra),
        "heat_maps": heat_maps_figure(diagnosis.spectra, diagnosis.saturation),
        "distributions": distributions_figure(diagnosis.spectra),
    }
    if diagnosis.jacobians:
        figures["jacobian"] = jacobian_figure(diagnosis.jacobians)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: write_figure(figure, folder, name) for name, figure in figures.items()}
    page = folder / PAGE
    write_bytes(page, page_of(diagnosis, images, title).encode())
    return page


def write_training_report(
    groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    folder: str | Path,
    outcomes: Mapping[str, Sequence[float]] | None = None,
    measure: str = "final validation loss",
) -> Path:
    """Write the figure of training runs, `training.png` and `.svg`, into `folder`; returns the PNG.

    Args:
        groups: as in [`training_figure`].
        outcomes: label -> the final value of each run; with it `outcome.png` and `.svg` show them against kappa.
        measure: what those values are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_figure(training_figure(groups), folder, "training")
    if outcomes is not None:
        write_figure(outcome_figure(groups, outcomes, measure), folder, "outcome")
    return folder / "training.png"


def write_figure(figure: Any, folder: Path, name: str) -> bytes:
    """Write a figure as PNG and SVG; returns the PNG."""
    images = render(figure, name)
    for ending, image in images.items():
        write_bytes(folder / f"{name}.{ending}", image)
    return images["png"]


def page_of(diagnosis: Diagnosis, images: Mapping[str, bytes], title: str) -> str:
    """The page as text.

    Args:
        images: figure name -> PNG.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment.from_string(TEMPLATE).render(
        title=title,
        conditioned=is_conditioned(diagnosis.spectra),
        verdicts=verdicts(diagnosis),
        diagnosis=diagnosis,
        mean=fmean,
        geometric_mean=geometric_mean,
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
    )


def number(value: float) -> str:
    """Four digits, as everywhere else on the page."""
    return f"{value:.4g}"


def verdicts(diagnosis: Diagnosis) -> list[str]:
    """What the numbers mean and what to do about them, in sentences."""
    used = [row for row in diagnosis.spectra if row.projection != "output"]
    worst = max(used, key=lambda row: row.effective.kappa)
    where = f"{worst.projection} of layer {worst.layer}"
    kind = "W + C" if is_conditioned([worst]) else "W"
    found = [
        f"The largest condition number of a query, key or value projection is {number(worst.effective.kappa)} ({kind}, "
        f"{where})."
    ]
    if worst.effective.kappa > LARGE_KAPPA:
        found.append(
            f"That is above {number(LARGE_KAPPA)}: some directions of the input hardly reach the attention. Condition "
            "the model before training (svd bounds kappa by 2, identity with lambda 1 is the mildest), or balance a "
            "trained one, which keeps its function."
        )
    if grown := [row for row in used if row.effective.kappa > row.raw.kappa * (1 + 1e-6)]:
        names = ", ".join(f"{row.projection} of layer {row.layer}" for row in grown[:4])
        found.append(
            f"Conditioning made {len(grown)} of {len(used)} projections worse than W alone: "
            f"{names}{' ...' if len(grown) > 4 else ''}. Use another lambda, or method svd."
        )
    entropies = [row.entropy.mean().item() / max(row.uniform_entropy, 1e-12) for row in diagnosis.saturation]
    least = min(range(len(entropies)), key=entropies.__getitem__)
    found.append(
        f"Attention entropy is lowest in layer {diagnosis.saturation[least].layer}: {number(entropies[least])} of that of "
        "uniform attention."
    )
    found += diagnosis.warnings or ["No layer's softmax is saturated."]
    if reports := diagnosis.preconditioning:
        grew, heads = sum(len(row.kappa_grew) for row in reports), sum(len(row.kappa_before) for row in reports)
        found.append(
            f"The attention is preconditioned, {reports[0].preconditioner.describe()} ({SOURCE}): on this input the "
            f"condition number of a head's output grew in {grew} of {heads} heads. The Jacobians are those of the "
            "outputs before it."
        )
    if dead := [row for row in diagnosis.jacobians if row.without_choice]:
        found.append(
            f"The Jacobian has condition number 1 in {len(dead)} of {len(diagnosis.jacobians)} heads (first in layer "
            f"{dead[0].layer}), which is not good: query and key change nothing there. Either all tokens have become the "
            "same vector, as in deep models without residual connections, or query and key are zero."
        )
    if any(row.is_lower_bound for row in diagnosis.jacobians):
        found.append("The conditioning of some Jacobians is too bad to be resolved; their numbers are lower bounds.")
    found.append(
        "kappa(W) is a property of the parameters: other weights with other kappa compute the same function. The products "
        "W_O W_V and W_Q^T W_K of each head are the same in all of them."
    )
    return found


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Conditioning of attention: {{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ccc; --quiet: #f3f3f3; }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --page: #181a1b; --line: #444; --quiet: #242729; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--page); overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0.5rem 0; }
img { display: block; width: 100%; min-width: 42rem; background: #fff; border-radius: 4px; }
img.narrow { max-width: 44rem; min-width: 30rem; }
table { border-collapse: collapse; font-size: 13px; overflow-wrap: normal; }
th, td { border: 1px solid var(--line); padding: 2px 8px; text-align: right; white-space: nowrap; }
th { background: var(--quiet); white-space: normal; vertical-align: bottom; min-width: 4em; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; padding: 2px 0; }
</style>
</head>
<body>
<h1>Conditioning of attention: {{ title }}</h1>
<h2>What it says</h2>
<ul>
{% for verdict in verdicts %}
<li>{{ verdict }}</li>
{% endfor %}
</ul>
<h2>Spectra</h2>
<p>Layers and heads are counted from 0. Singular values of each projection
{{- " before (W) and with the correction (W + C)" if conditioned }}. The condition number
kappa is the largest divided by the smallest.</p>
<div class="wide">
<img alt="Spectra over the layers" src="data:image/png;base64,{{ images.spectra }}"></div>
<h2>Heads</h2>
<p>The condition number of each head's block, and how even its attention is: 1 is uniform, 0 a softmax that picks one token
and passes no gradient to query and key.</p>
<div class="wide">
<img alt="Condition numbers and entropy by layer and head" src="data:image/png;base64,{{ images.heat_maps }}"></div>
<h2>What the heads compute with</h2>
<p>Condition numbers of each head's W_Q^T W_K and W_O W_V, geometric mean and largest of the layer. Weights of the same
function can have another kappa(W), but the same products, so these are the numbers to compare models by.</p>
{% for layer, rows in diagnosis.products | groupby("layer") %}
<details><summary>Layer {{ layer }}: largest kappa {{ rows | map(attribute="kappa") | map("max") | max | number }}</summary>
<div class="wide"><table class="products">
<tr><th>attention</th><th>product</th>{% if conditioned %}<th>mean, W</th><th>largest, W</th>{% endif %}<th>mean</th>
<th>largest</th></tr>
{% for row in rows %}
<tr><td>{{ row.name }}</td><td>{{ row.product }}</td>
{% if conditioned %}<td>{{ geometric_mean(row.kappa_raw) | number }}</td>
<td>{{ row.kappa_raw | max | number }}</td>{% endif %}
<td>{{ geometric_mean(row.kappa) | number }}</td><td>{{ row.kappa | max | number }}</td></tr>
{% endfor %}
</table></div></details>
{% endfor %}
<h2>Distributions</h2>
<div class="wide">
<img alt="All singular values" src="data:image/png;base64,{{ images.distributions }}"></div>
{% if diagnosis.jacobians %}
<h2>The Jacobian</h2>
<p>Of each head's output with respect to its W_Q, W_K and W_V, computed exactly, next to the product of the factors of the
paper's inequality (10). That product is an indicator: read with nonzero singular values, it is not a bound.</p>
<div class="wide">
<img class="narrow" alt="Condition number of the Jacobian" src="data:image/png;base64,{{ images.jacobian }}"></div>
{% for layer, rows in diagnosis.jacobians | groupby("layer") %}
<details><summary>Layer {{ layer }}: kappa(J) of {{ rows | length }} head{{ "s" if rows | length > 1 }},
{{ rows | map(attribute="kappa") | min | number }} to {{ rows | map(attribute="kappa") | max | number }}</summary>
<div class="wide"><table class="jacobian">
<tr><th>layer</th><th>head</th><th>kappa(J)</th><th>rank</th><th>rows of J</th><th>indicator</th><th>kappa(X)</th>
<th>kappa(Lambda)</th><th>kappa(W_Q)</th><th>kappa(W_K)</th><th>kappa(W_V)</th></tr>
{% for row in rows %}
<tr><td>{{ row.layer }}</td><td>{{ row.head }}</td><td>{{ "at least " if row.is_lower_bound }}{{ row.kappa | number }}</td>
<td>{{ "unknown" if row.rank is none else row.rank }}</td><td>{{ row.shape[0] }}</td>
<td>{{ row.indicator.product | number }}</td><td>{{ row.indicator.x | number }}</td>
<td>{{ row.indicator.softmax | number }}</td><td>{{ row.indicator.query | number }}</td>
<td>{{ row.indicator.key | number }}</td><td>{{ row.indicator.value | number }}</td></tr>
{% endfor %}
</table></div></details>
{% endfor %}
{% endif %}
{% if diagnosis.preconditioning %}
<h2>The preconditioner</h2>
<p>Condition numbers of the output A of the heads on this input, in the unchanged layers: without the preconditioner and
with it, geometric means over the heads.</p>
<div class="wide"><table class="preconditioner">
<tr><th>attention</th><th>kappa(A)</th><th>kappa(C A)</th><th>heads in which it grew</th></tr>
{% for row in diagnosis.preconditioning %}
<tr><td>{{ row.attention }}</td><td>{{ row.mean_kappa[0] | number }}</td><td>{{ row.mean_kappa[1] | number }}</td>
<td>{{ row.kappa_grew | length }} of {{ row.kappa_before | length }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
<h2>Saturation</h2>
<div class="wide"><table class="saturation">
<tr><th>layer</th><th>entropy, mean over heads (nats)</th><th>uniform (nats)</th>
<th>share of rows with a weight above 0.999</th></tr>
{% for row in diagnosis.saturation %}
<tr><td>{{ row.layer }}</td><td>{{ row.entropy.mean().item() | number }}</td><td>{{ row.uniform_entropy | number }}</td>
<td>{{ row.saturated_share.mean().item() | number }}</td></tr>
{% endfor %}
</table></div>
<h2>All numbers</h2>
{% for layer, rows in diagnosis.spectra | groupby("layer") %}
<details><summary>Layer {{ layer }}: largest kappa {{ rows | map(attribute="effective.kappa") | max | number }}</summary>
<div class="wide"><table class="spectra">
<tr><th>projection</th><th>layer</th><th>shape</th><th>sigma_min(W)</th><th>sigma_max(W)</th><th>kappa(W)</th>
<th>kappa(W + C)</th><th>effective rank(W)</th><th>effective rank(W + C)</th><th>kappa(W) per head, mean</th>
<th>kappa(W + C) per head, mean</th></tr>
{% for row in rows %}
<tr><td>{{ row.projection }}</td><td>{{ row.layer }}</td><td>{{ row.shape[0] }} x {{ row.shape[1] }}</td>
<td>{{ row.raw.sigma_min | number }}</td><td>{{ row.raw.sigma_max | number }}</td><td>{{ row.raw.kappa | number }}</td>
<td>{{ row.effective.kappa | number }}</td><td>{{ row.raw.effective_rank | number }}</td>
<td>{{ row.effective.effective_rank | number }}</td><td>{{ mean(row.raw.head_kappa) | number }}</td>
<td>{{ mean(row.effective.head_kappa) | number }}</td></tr>
{% endfor %}
</table></div></details>
{% endfor %}
</body>
</html>
"""
