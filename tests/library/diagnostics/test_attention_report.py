"""The page: every picture decodes, every number is that of the functions; the figures and the command."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pytest
import torch
import typer
from models import ARCHITECTURES
from PIL import Image
from transformers import AutoModel
from transformers.utils import logging
from typer.testing import CliRunner

import specattn
from hf_specattn import PreconditionerConfig, SpectralConfig, condition, precondition
from hf_specattn.diagnostics import (
    capture,
    diagnose,
    jacobian_indicator,
    jacobian_spectrum,
    saturation,
    spectra,
    write_report,
    write_training_report,
)
from hf_specattn.diagnostics.attention_figures import (
    heat_maps_figure,
    jacobian_figure,
    outcome_figure,
    spectra_figure,
    training_figure,
)
from hf_specattn.diagnostics.attention_report import JacobianRow
from hf_specattn.diagnostics.indicator import Indicator
from hf_specattn.preconditioning import preconditioning_reports

BERT = ARCHITECTURES["bert"]


class Page(HTMLParser):
    """The pictures, and the rows of each kind of table, which may be one table per layer."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.tables, self.items, self.tags = [], {}, [], set()
        self._rows, self._text = None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.pictures.append(attributes)
        elif tag == "table":
            self._rows = self.tables.setdefault(attributes["class"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "li"):
            self._text = ""

    def handle_data(self, data):
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag):
        if tag == "td":
            self._rows[-1].append(self._text)
            self._text = None
        elif tag == "li":
            self.items.append(self._text)
            self._text = None

    def rows(self, table):
        return [row for row in self.tables[table] if row]


def four_digits(*values):
    return [f"{value:.4g}" for value in values]


def check_page(page, model, batch, heads, queries):
    parsed = Page(page.read_text())
    assert not parsed.tags & {"script", "link", "iframe"}
    for picture in parsed.pictures:
        kind, _, content = picture["src"].partition(";base64,")
        assert kind == "data:image/png"
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        image.load()
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
        assert picture["alt"]
    expected = [
        [
            row.projection,
            str(row.layer),
            f"{row.shape[0]} x {row.shape[1]}",
            *four_digits(row.raw.sigma_min, row.raw.sigma_max, row.raw.kappa, row.effective.kappa),
            *four_digits(row.raw.effective_rank, row.effective.effective_rank),
            *four_digits(fmean(row.raw.head_kappa), fmean(row.effective.head_kappa)),
        ]
        for row in spectra(model, output=True)
    ]
    assert parsed.rows("spectra") == expected
    assert parsed.rows("saturation") == [
        [str(row.layer), *four_digits(row.entropy.mean(), row.uniform_entropy, row.saturated_share.mean())]
        for row in saturation(model, batch)
    ]
    jacobians = []
    for item in capture(model, batch):
        for head in heads:
            built = item.head(head, queries=queries)
            found, factors = jacobian_spectrum(built), jacobian_indicator(built)
            row = [str(item.attention.layer), str(head), ("at least " * found.is_lower_bound) + f"{found.kappa:.4g}"]
            row += [str(found.rank), str(found.shape[0])]
            row += four_digits(factors.product, factors.x, factors.softmax, factors.query, factors.key, factors.value)
            jacobians.append(row)
    assert parsed.rows("jacobian") == jacobians
    return parsed


@pytest.mark.parametrize("conditioned", [False, True])
def test_every_number_and_picture_of_the_page(conditioned, tmp_path):
    model, batch = BERT.model(), BERT.batch()
    if conditioned:
        condition(model, SpectralConfig(lambda_=1.0))
    page = write_report(model, batch, tmp_path / "out", title="<tiny>", queries=4, jacobian_heads=2)
    parsed = check_page(page, model, batch, (0, 3), 4)
    assert len(parsed.pictures) == 4
    text = page.read_text()
    assert "&lt;tiny&gt;" in text
    assert "prefers-color-scheme: dark" in text
    layers = model.config.num_hidden_layers
    for table in ("products", "jacobian", "spectra"):  # the long ones are folded, one for each layer
        start = r"<details><summary>Layer (\d+):[^<]*</summary>\s*"
        folded = re.findall(rf'{start}<div class="wide"><table class="{table}">', text)
        assert [int(layer) for layer in folded] == list(range(layers)), table
    assert ("W + C" in parsed.items[0]) is conditioned
    names = {"spectra", "heat_maps", "distributions", "jacobian"}
    assert {path.name for path in page.parent.iterdir()} == {"report.html"} | {
        f"{name}.{ending}" for name in names for ending in ("png", "svg")
    }


def test_what_is_wrong_is_said(tmp_path):
    model = BERT.model()
    condition(model, SpectralConfig(lambda_=30.0))
    page = write_report(model, {"input_ids": torch.arange(12)[None]}, tmp_path, jacobian_heads=0)
    parsed = Page(page.read_text())
    assert "jacobian" not in parsed.tables
    assert any("is saturated" in item and "lambda_=" in item for item in parsed.items)
    with torch.no_grad():
        for layer in (model := BERT.model()).encoder.layer:
            layer.attention.self.value.weight[0] *= 1e-6
    items = Page(write_report(model, BERT.batch(), tmp_path, jacobian_heads=0).read_text()).items
    assert any("That is above 1000" in item for item in items)
    assert "No layer's softmax is saturated." in items


def test_diagnose_looks_at_every_head_by_default():
    rows = diagnose(BERT.model(), BERT.batch(), queries=2).jacobians
    assert [(row.layer, row.head) for row in rows] == [(layer, head) for layer in (0, 1) for head in range(4)]


@pytest.fixture
def app():
    application = typer.Typer()
    application.command()(specattn.report)
    verbosity = logging.get_verbosity()
    yield application
    logging.set_verbosity(verbosity)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"spectral_conditioning": True, "lambda_": 1.0}], ids=["stock", "identity"])
def test_command_on_minilm(settings, app, minilm_path, tmp_path):
    checkpoint = minilm_path
    if settings:
        from transformers import AutoTokenizer

        checkpoint = tmp_path / "checkpoint"
        AutoModel.from_pretrained(minilm_path, **settings).save_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(minilm_path).save_pretrained(checkpoint)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the other cat.\n\nAnother line.\n")
    arguments = ["--data", str(text), "--output-dir", str(tmp_path / "out"), "--jacobian-heads", "2", "--queries", "6"]
    result = CliRunner().invoke(app, [str(checkpoint), *arguments])
    assert result.exit_code == 0, result.output
    model = AutoModel.from_pretrained(checkpoint)
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(checkpoint)(
        ["The cat sat on the mat and looked at the other cat.", "Another line."], padding=True, return_tensors="pt"
    )
    check_page(tmp_path / "out" / "report.html", model, dict(batch), (0, 11), 6)


@pytest.mark.parametrize("content", [b"\x80\x04\x95 a pickle", b"caf\xe9 in Latin-1\n", b"zero \x00 byte\n", b"\n \n"])
def test_data_that_are_no_text_are_named(content, app, tmp_path, stock_checkpoint):
    (tmp_path / "data.txt").write_bytes(content)
    result = CliRunner().invoke(app, [str(stock_checkpoint(BERT)), "--data", str(tmp_path / "data.txt")])
    assert isinstance(result.exception, ValueError)
    assert re.search(r"--data .*data\.txt (is not UTF-8 text|has no line of text)", str(result.exception))


def records(kappa):
    steps = [0, 10, 20]
    names = [f"{name}_{part}{end}" for name in ("sigma_min", "kappa") for part in ("query", "key", "value")
             for end in ("", "_effective")]  # fmt: skip
    return [
        {"step": step, "layers": [0], "indicator": [[1e6]], "kappa_jacobian": [[kappa + step]], "seconds": 0.1}
        | {name: [[kappa * (1 + step)]] for name in names}
        for step in steps
    ]


def test_training_figure_has_means_over_runs_and_heads(tmp_path):
    groups = {"stock": [records(3.0), records(5.0)], "svd": [records(2.0)]}
    axes = training_figure(groups).axes
    assert [panel.get_yscale() for panel in axes] == ["linear"] * 3
    for panel in axes:  # logarithms are drawn, and labeled with what they are of
        labels = [label.get_text() for label in panel.get_yticklabels()]
        assert [math.log10(float(label)) for label in labels] == pytest.approx(panel.get_yticks().tolist())
        assert len(labels) >= 2
    lines = {line.get_label(): line for line in axes[2].lines}
    assert lines["stock: Jacobian"].get_xdata().tolist() == [0, 10, 20]
    assert lines["stock: Jacobian"].get_ydata() == pytest.approx(np.log10([4.0, 14.0, 24.0]))
    of_weights = {line.get_label(): line for line in axes[1].lines}
    assert of_weights["svd: W"].get_ydata() == pytest.approx(np.log10([2.0, 22.0, 42.0]))
    band = axes[2].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(math.log10(24 + math.sqrt(2)))
    path = write_training_report(groups, tmp_path)
    Image.open(path).load()
    assert path.with_suffix(".svg").is_file()


def test_outcomes_are_drawn_against_kappa_at_the_end(tmp_path):
    groups = {"stock": [records(3.0), records(5.0)], "svd": [records(2.0)]}
    left, right = outcome_figure(groups, {"stock": [6.5, 6.25], "svd": [6.0]}, "loss").axes
    assert drawn(left)["stock"] == ([pytest.approx(math.log10(63)), pytest.approx(math.log10(105))], [6.5, 6.25])
    assert drawn(right)["svd"] == ([pytest.approx(math.log10(22))], [6.0])
    write_training_report(groups, tmp_path, {"stock": [6.5, 6.25], "svd": [6.0]})
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("training", "outcome") for ending in ("png", "svg")
    }


def drawn(axes):
    """Label -> (x, y) of each line, marks of what is beyond the axis under `_beyond`."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_what_is_beyond_the_axis_is_drawn_at_its_edge_with_a_mark(tmp_path):
    rows = records(3.0)
    rows[1]["kappa_jacobian"], rows[2]["kappa_jacobian"] = [[1e300]], [[None]]  # JSON has no infinity
    rows[0]["indicator"], rows[1]["indicator"] = [[1e29]], [[1e200]]
    axes = training_figure({"stock": [rows, records(4.0)]}).axes[2]
    lines = drawn(axes)
    assert lines["stock: Jacobian"] == ([0, 10, 20], [pytest.approx(math.log10(3.5)), 30.0, 30.0])
    assert lines["stock: indicator (10)"][1] == [pytest.approx(math.log10(5e28)), 30.0, pytest.approx(6.0)]
    marks = [list(line.get_xdata()) for line in axes.lines if line.get_label() == "_beyond"]
    assert marks == [[10, 20], [10]]
    assert np.isfinite(np.concatenate([path.vertices for path in axes.collections[0].get_paths()])).all()
    write_training_report({"stock": [rows]}, tmp_path)


def test_an_indicator_beyond_floats(tmp_path):
    large = Indicator(x=1e110, softmax=1e60, query=1e3, key=1.0, value=1e2)
    assert large.product == math.inf  # x**3 would raise OverflowError
    assert large.log10_product == pytest.approx(330 + 60 + 2 + math.log10(1001))
    small = Indicator(2.0, 3.0, 4.0, 5.0, 6.0)
    assert 10**small.log10_product == pytest.approx(small.product) == 8 * 3 * 6 * 9
    jacobians = [JacobianRow(0, 0, 1e40, True, 3, (4, 5), large), JacobianRow(1, 0, 1e3, False, 3, (4, 5), small)]
    one_hot = Indicator(2.0, math.nan, 4.0, 5.0, 6.0)
    saturated = jacobian_figure([JacobianRow(0, 0, 3.0, False, 3, (4, 5), one_hot)])
    assert drawn(saturated.axes[0])["indicator (10), geometric mean over heads"] == ([0], [30.0])
    lines = drawn(jacobian_figure(jacobians).axes[0])
    assert lines["indicator (10), geometric mean over heads"][1] == [30.0, pytest.approx(small.log10_product)]
    assert lines["kappa of the Jacobian, geometric mean over heads"][1] == [30.0, 3.0]


@pytest.mark.parametrize("lambda_", [10.0, 1e4])
def test_a_saturated_model_has_a_page(lambda_, tmp_path):
    model = BERT.model(dtype=torch.float32)
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.weight[3] = model.encoder.layer[1].attention.self.value.weight[2]
    condition(model, SpectralConfig(lambda_=lambda_))
    page = Page(write_report(model, BERT.batch(), tmp_path).read_text())
    assert len(page.rows("jacobian")) == BERT.layers * 4
    diagnosis = diagnose(model, BERT.batch())
    assert page.rows("jacobian")[0][5] == four_digits(diagnosis.jacobians[0].indicator.product)[0]


def test_singular_heads_are_marked_in_the_heat_map():
    model = BERT.model()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.weight[8:16] = 0  # its second head
    rows = spectra(model)
    figure = heat_maps_figure(rows, [])
    value = next(axes for axes in figure.axes if axes.get_title() == "kappa, value")
    assert value.images[0].get_array()[1, 1] == 30.0
    assert drawn(value)["_beyond"] == ([1], [1])
    assert drawn(next(axes for axes in figure.axes if "query" in axes.get_title()))["_beyond"] == ([], [])
    lines = drawn(spectra_figure(rows).axes[0])
    assert lines["value: W"][1][1] < -10


def test_equal_tokens_are_no_success():
    model, batch = BERT.model(), BERT.batch()
    verdict = "query and key change nothing there"
    assert verdict not in " ".join(diagnose(model, batch).as_dict()["verdicts"])
    model.embeddings.position_embeddings.weight.data.zero_()
    ids = torch.ones_like(batch["input_ids"])
    found = diagnose(model, {"input_ids": ids}, jacobian_heads=2)
    assert [row.kappa for row in found.jacobians] == pytest.approx([1.0] * 2 * BERT.layers)
    assert f"1 in {2 * BERT.layers} of {2 * BERT.layers} heads (first in layer 0)" in " ".join(
        found.as_dict()["verdicts"]
    )


def test_a_preconditioned_model(tmp_path):
    model = BERT.model()
    precondition(model, PreconditionerConfig())
    page = Page(write_report(model, BERT.batch(), tmp_path, jacobian_heads=1).read_text())
    reports = preconditioning_reports(model, BERT.batch())
    assert [row[1:3] for row in page.rows("preconditioner")] == [four_digits(*row.mean_kappa) for row in reports]
    assert any("is preconditioned, row(unit, detached) (a third-party reading" in item for item in page.items)
    stock = Page(write_report(BERT.model(), BERT.batch(), tmp_path / "stock", jacobian_heads=0).read_text())
    assert "preconditioner" not in stock.tables
