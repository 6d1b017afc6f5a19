"""Tables and pictures of the reports."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hf_specattn.figures import label_powers, markdown_table, new_figure, render


def test_a_table():
    assert markdown_table(["", "a|b", "c"], [["x", "1", "2"], ["y|z", "3", "4"]]) == (
        "|  | a\\|b | c |\n|---|---:|---:|\n| x | 1 | 2 |\n| y\\|z | 3 | 4 |\n"
    )


def draw(name):
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="line")
    axes.legend()
    return render(figure, name)


def test_images_are_of_the_size_asked_for_and_the_same_each_time():
    first = draw("a")
    assert list(first) == ["png", "svg"]
    with Image.open(io.BytesIO(first["png"])) as image:
        assert image.size == (450, 300)  # at 150 dots per inch
    assert b"<svg" in first["svg"]
    assert b"<dc:date>" not in first["svg"]
    assert draw("a") == first


def test_no_display_and_no_pyplot_is_needed():
    code = (
        "import sys; from hf_specattn.figures import new_figure, render;"
        "assert 'matplotlib' not in sys.modules;"
        "figure = new_figure(3, 2); figure.subplots(); render(figure, 'a');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes its import fail
    with pytest.raises(
        ImportError, match=r"needs matplotlib, which is not installed: pip install 'hf_specattn\[train\]'"
    ):
        new_figure(3, 2)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((1.4, 5.5), ["2", "3", "4", "5"]),
        ((0.15, 30.0), ["0.2", "0.5", "1", "2", "5", "10", "20"]),
        ((1.0, 1e33), ["1", "1e+05", "1e+10", "1e+15", "1e+20", "1e+25", "1e+30"]),
    ],
)
def test_axes_of_logarithms_are_labeled_with_the_numbers(values, labels):
    axes = new_figure(4, 3).subplots()
    axes.set_ylim(*np.log10(values))
    label_powers(axes, "y")
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert axes.get_yticks() == pytest.approx(np.log10(np.array(labels, dtype=float)))
    assert axes.get_ylim() == pytest.approx(np.log10(values))
