"""docs/evidence.md and its figure, from the committed results of sweeps: every number of that page is computed here.

    PYTHONPATH=scripts python -m recipes.compare.evidence_page

`evidence.md.jinja`, beside this file, is the text; it asks for numbers by the names of sweep, setting and variant.
"""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_specattn.figures import COLORS, markdown_table, new_figure, render
from hf_specattn.files import write_bytes

from .comparison import PairedDifference, paired_difference

REPOSITORY = Path(__file__).resolve().parents[3]
SWEEPS = REPOSITORY / "docs" / "sweeps"
PAGE = REPOSITORY / "docs" / "evidence.md"
FIGURE = REPOSITORY / "docs" / "images" / "regimes"
TEMPLATE = "evidence.md.jinja"
WIDTH = 120  # characters of a line
ITEM = re.compile(r"(- |\d+\. )")


class EvidenceError(ValueError):
    """The page asks for a result that no sweep has; the message names it."""


# --- results ---------------------------------------------------------------------------------------------------------


@cache
def sweep_results(name: str) -> dict[str, Any]:
    """The JSON of a sweep, by its place below docs/sweeps."""
    return json.loads((SWEEPS / f"{name}.json").read_text(encoding="utf-8"))


def find_arm(sweep: str, variant: str, setting: str | None = None) -> Mapping[str, Any]:
    """One arm; without a setting that of the sweep's only one.

    Raises:
        EvidenceError: where there is none of these names.
    """
    found = [
        item
        for item in sweep_results(sweep)["arms"]
        if item["variant"] == variant and (setting is None or item["setting"] == setting)
    ]
    if len(found) != 1:
        known = sorted({f"{item['setting']}: {item['variant']}" for item in sweep_results(sweep)["arms"]})
        raise EvidenceError(f"{sweep} has {len(found)} arms {variant!r} of {setting!r}; it has {'; '.join(known)}.")
    return found[0]


def difference(sweep: str, variant: str, other: str, setting: str | None = None) -> PairedDifference:
    """The mean difference of two arms over their common seeds, with its 95 % interval.

    Raises:
        EvidenceError: as `find_arm`, and without a common seed.
    """
    values, reference = (find_arm(sweep, name, setting)["values"] for name in (variant, other))
    return _paired(values, reference, f"{sweep}: {variant!r} and {other!r}")


def _paired(values: Mapping[int, float], reference: Mapping[int, float], names: str) -> PairedDifference:
    found = paired_difference(values, reference)
    if found is None:
        raise EvidenceError(f"{names} have no common seed.")
    return found


def best_of(sweep: str, variants: Sequence[str], setting: str | None = None) -> str:
    """Of several variants that with the best mean."""
    return max(variants, key=lambda variant: fmean(find_arm(sweep, variant, setting)["values"].values()))


# --- what the template calls -----------------------------------------------------------------------------------------


def arm(sweep: str, variant: str, setting: str | None = None, digits: int = 2) -> str:
    """Mean and standard deviation over the seeds: 98.06 ± 0.56."""
    values = list(find_arm(sweep, variant, setting)["values"].values())
    if not values:
        return "failed"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def mean(sweep: str, variant: str, setting: str | None = None, digits: int = 1) -> str:
    """The mean over the seeds."""
    return f"{fmean(find_arm(sweep, variant, setting)['values'].values()):.{digits}f}"


def minus(sweep: str, variant: str, other: str, setting: str | None = None, digits: int = 1) -> str:
    """A difference with its 95 % interval: +6.2 (+2.3 to +10.1)."""
    return _signed(difference(sweep, variant, other, setting), digits)


def _signed(found: PairedDifference, digits: int) -> str:
    text = f"{found.mean:+.{digits}f}"
    if found.interval is None:
        return text
    low, high = (f"{end:+.{digits}f}" for end in found.interval)
    return f"{text} ({low} to {high})"


def pooled(sweep: str, variant: str, other: str, digits: int = 1) -> str:
    """As `minus`, over the seeds of all the sweep's settings together.

    Raises:
        EvidenceError: as `difference`.
    """
    ours: dict[int, float] = {}
    others: dict[int, float] = {}
    for setting in dict.fromkeys(item["setting"] for item in sweep_results(sweep)["arms"]):
        values, reference = (find_arm(sweep, name, setting)["values"] for name in (variant, other))
        for seed in values.keys() & reference.keys():
            place = len(ours)
            ours[place], others[place] = values[seed], reference[seed]
    return _signed(_paired(ours, others, f"{sweep}: {variant!r} and {other!r}"), digits)


def gain(sweep: str, variant: str, other: str, setting: str | None = None, digits: int = 1) -> str:
    """A difference alone."""
    return f"{difference(sweep, variant, other, setting).mean:+.{digits}f}"


def table(
    sweep: str,
    variants: Sequence[str],
    settings: Sequence[str] | None = None,
    title: str = "accuracy (%)",
    digits: int = 2,
) -> str:
    """Rows of variants under columns of settings, all of the sweep's where none are named."""
    columns = settings or list(dict.fromkeys(item["setting"] for item in sweep_results(sweep)["arms"]))
    rows = [[variant, *(arm(sweep, variant, setting, digits) for setting in columns)] for variant in variants]
    return markdown_table([title, *columns], rows).rstrip("\n")


def seen(sweep: str, variant: str, quantity: str, setting: str | None = None, when: str = "first") -> str:
    """What the monitor saw before the first step (or "last"), the median over the seeds."""
    records = find_arm(sweep, variant, setting)["monitor"].values()
    return f"{median(record[when][quantity] for record in records):,.3g}"


def time_ratio(sweep: str, variant: str, other: str, setting: str | None = None) -> str:
    """The median over the seeds of the training times' ratio."""
    ours, others = (find_arm(sweep, name, setting)["seconds"] for name in (variant, other))
    return f"{median(ours[seed] / others[seed] for seed in ours.keys() & others.keys()):.2f}"


def variants(sweep: str) -> list[str]:
    """The labels of its variants, in order."""
    return list(dict.fromkeys(item["variant"] for item in sweep_results(sweep)["arms"]))


def seeds(sweep: str) -> int:
    """How many seeds its arms have at most."""
    return max(len(item["values"]) for item in sweep_results(sweep)["arms"])


def chosen(sweep: str, tuning: str, setting: str) -> str:
    """The value that a tuning chose."""
    return f"{sweep_results(sweep)['chosen'][setting][tuning]:g}"


def hours(*sweeps: str) -> str:
    """Hours of training of the runs in the reports, one after the other."""
    arms = [item for sweep in sweeps for item in sweep_results(sweep)["arms"]]
    return f"{sum(sum(item['seconds'].values()) for item in arms) / 3600:.1f}"


# --- the figure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """A row of the figure: what conditioning gained there.

    Attributes:
        label: In words.
        sweep, setting: Where its runs are.
        treated: The conditioned variant.
        stock: The default stock model; None where it does not train, or is not what was asked.
        controls: Stock models with what else could explain the gain; the best by its mean counts.
    """

    label: str
    sweep: str
    setting: str
    treated: str
    stock: str | None
    controls: tuple[str, ...]


IN_VIT = ("stock, tuned scale", "conditioned initialization")
NO_DECAY = ("no decay on Q, K, V", "decay toward the start on Q, K, V")
FASTER = ("scale 3", "learning rate 3 on Q, K, V", "scale 3, learning rate 3 on Q, K, V")
FAMILIES = ("DeiT", "Swin", "XCiT", "DaViT")
REGIMES = (
    *(
        Regime(f"no residual, {data}, {depth}: {treated}", sweep, depth, treated, None, ("stock, tuned",))
        for treated in ("svd on V and O", "svd on Q, K, V")
        for data, sweep in (("digits", "residual_free"), ("clothes", "fashion-mnist/residual_free"))
        for depth in ("6 layers", "12 layers")
    ),
    Regime("ViT: identity, tuned lambda", "precondition", "ViT", "identity, tuned lambda", "stock", IN_VIT),
    Regime("ViT: svd", "precondition", "ViT", "svd", "stock", IN_VIT),
    Regime("ViT: row preconditioner", "precondition", "ViT", "row preconditioner", "stock", IN_VIT),
    Regime(
        "ViT, well scaled: identity 1",
        *("evidence", "ViT", "identity, lambda 1, tuned scale", None, ("stock, tuned scale",)),
    ),
    Regime("ViT, well scaled: svd", "evidence", "ViT", "svd, static, tuned scale", None, ("stock, tuned scale",)),
    *(
        Regime(
            f"{name}: svd, every 20 steps",
            *("table1", name, "svd, every 20 steps", "stock", ("stock, tuned scale", "stock, norm of svd")),
        )
        for name in FAMILIES
    ),
    *(
        Regime(f"weight {decay}: svd", "strong_decay", decay, "svd", "stock", NO_DECAY)
        for decay in ("decay 0.05", "decay 5", "decay 15")
    ),
    Regime("svd that follows W each step", "dynamic", "6 layers", "svd, each step", "stock", FASTER),
)


def regimes_figure(regimes: Sequence[Regime]) -> dict[str, bytes]:
    """Points gained on default stock, and on the best control, with 95 % intervals; file ending -> image."""
    figure = new_figure(9.5, 1.4 + 0.3 * len(regimes))
    axes = figure.subplots()
    kinds = (("minus default stock", COLORS[3], "o", 0.14), ("minus the best control", COLORS[0], "s", -0.14))
    for number, (label, color, marker, shift) in enumerate(kinds):
        drawn = []
        for row, regime in enumerate(regimes):
            other = regime.stock if number == 0 else best_of(regime.sweep, regime.controls, regime.setting)
            if other is not None:
                drawn.append((row - shift, difference(regime.sweep, regime.treated, other, regime.setting)))
        means = [found.mean for _, found in drawn]
        ends = [found.interval or (found.mean, found.mean) for _, found in drawn]
        errors = [[m - low for m, (low, _) in zip(means, ends)], [high - m for m, (_, high) in zip(means, ends)]]
        places = [row for row, _ in drawn]
        axes.errorbar(means, places, xerr=errors, color=color, marker=marker, linestyle="none", capsize=3, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=5)
    ticks = [-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(regimes)), [regime.label for regime in regimes], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points gained, mean and 95 % interval over the seeds (linear up to 5)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    return render(figure, "regimes")


# --- the page --------------------------------------------------------------------------------------------------------


def page() -> str:
    """The page as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = (arm, mean, minus, pooled, gain, table, seen, time_ratio, variants, seeds, chosen, hours)
    environment.globals.update({function.__name__: function for function in functions})
    return wrapped(environment.get_template(TEMPLATE).render())


def wrapped(text: str) -> str:
    """Markdown with its paragraphs and lists broken at `WIDTH` characters, whatever lengths the numbers have."""
    blocks = [_wrapped_block(block) for block in text.strip("\n").split("\n\n") if block.strip()]
    return "\n\n".join(blocks) + "\n"


def _wrapped_block(block: str) -> str:
    if block.lstrip("\n").startswith(("|", "#", "!")):
        return block.strip("\n")
    items: list[str] = []
    for line in block.strip("\n").splitlines():
        if not items or ITEM.match(line):
            items.append(line)
        else:
            items[-1] += " " + line.strip()
    return "\n".join(_filled(item) for item in items)


def _filled(item: str) -> str:
    found = ITEM.match(item)
    indent = " " * len(found[0]) if found else ""
    return textwrap.fill(item, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the page and its figure."""
    write_bytes(PAGE, page().encode())
    for ending, image in regimes_figure(REGIMES).items():
        write_bytes(FIGURE.with_suffix(f".{ending}"), image)
    print(f"Wrote {PAGE.relative_to(REPOSITORY)} and {FIGURE.relative_to(REPOSITORY)}.png, .svg.")


if __name__ == "__main__":
    main()
