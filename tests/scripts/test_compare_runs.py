"""The table and picture of compare_runs.py on small records, and all that it refuses."""

import json
import sys
from pathlib import Path
from statistics import fmean

import pytest
from scipy import stats
from scripts_loading import REPOSITORY, load_script

from recipes.compare.comparison import METRICS

SCRIPT = REPOSITORY / "scripts" / "compare_runs.py"

LOSSES = {"stock": (3.10, 3.40, 3.05), "identity": (3.00, 3.35, 2.99)}


@pytest.fixture(scope="module")
def compare_runs():
    return load_script(SCRIPT)


def write_run(folder, seed, loss, facts=(), **arguments):
    record = {
        "arguments": {"seed": seed, "learning_rate": 1e-3, "spectral_conditioning": False} | arguments,
        "facts": {"validation_fingerprint": "abc", "validation_tokens": 5000, "tokens_per_step": 1024, "device": "cpu"}
        | dict(facts),
        "history": [
            {"step": step, "train_loss": loss + 4 / step, "tokens_per_second": 1000.0 + step} for step in (1, 2, 3, 4)
        ],
        "validation": [{"step": step, "validation_loss": loss + (4 - step)} for step in (2, 4)],
        "final": {"step": 4, "validation_loss": loss},
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Three seeds of stock and identity, and two of svd, one of them of another seed."""
    identity = {"spectral_conditioning": True, "lambda_": "1"}
    svd = {"spectral_conditioning": True, "spectral_method": "svd"}
    folders = [
        write_run(tmp_path / f"identity-{seed}", seed, LOSSES["identity"][seed], **identity) for seed in range(3)
    ]
    folders += [write_run(tmp_path / f"stock-{seed}", seed, LOSSES["stock"][seed]) for seed in range(3)]
    return [*folders, *(write_run(tmp_path / f"svd-{seed}", seed, 4.0, **svd) for seed in (2, 7))]


def rows_of(text):
    """Group -> the cells behind it."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def test_the_table(compare_runs, runs, capsys):
    compare_runs.main(runs)
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert list(rows) == ["identity, lambda 1", "stock", "svd"]
    # By hand: (3.10 + 3.40 + 3.05) / 3, deviations -0.0833, 0.2167, -0.1333; exp(3.18333).
    # Two of its own runs end at its mean or below, and none of svd.
    assert rows["stock"] == ["3", "3.1833", "0.1893", "24.13", "1,002", "4 (2 of 3)", "–", "–"]
    assert rows["svd"][5] == "–"
    low, high = stats.ttest_rel(LOSSES["identity"], LOSSES["stock"]).confidence_interval(0.95)
    assert rows["identity, lambda 1"][-2:] == ["-0.0700 (3)", f"{low:+.4f} to {high:+.4f}"]
    assert rows["svd"][-2:] == ["+0.9500 (1)", "–"]
    assert "4 steps, 4,096 training tokens, the same 5,000 validation tokens" in text
    assert (
        "A difference of one seed, or the same for each seed, has no interval and is not evidence for either side."
        in text
    )
    assert "Each interval stands by itself" in text


def test_another_reference_and_labels(compare_runs, runs, capsys):
    compare_runs.main([*runs, "--labels", "A", "B|b", "C", "--reference", "C"])
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["C"][-2:] == ["–", "–"]
    assert rows["B\\|b"][-2:] == ["-0.9500 (1)", "–"]
    assert "A: identity, lambda 1." in text
    assert "C: svd." in text


def test_an_interval_around_zero_is_explained(compare_runs, tmp_path, capsys):
    folders = [write_run(tmp_path / f"a{seed}", seed, 3.0) for seed in (0, 1)]
    folders += [write_run(tmp_path / f"b{seed}", seed, 2.9 + 0.3 * seed, learning_rate=0.01) for seed in (0, 1, 2)]
    compare_runs.main(folders)
    text = capsys.readouterr().out
    assert rows_of(text)["stock, learning_rate 0.01"][-1].endswith(", contains 0")
    assert "do not tell which of the two is better, not that they are equal" in text
    assert "Each interval stands by itself" not in text


def test_groups_without_a_common_seed(compare_runs, tmp_path, capsys):
    compare_runs.main([write_run(tmp_path / "a", 0, 3.0), write_run(tmp_path / "b", 1, 3.0, learning_rate=0.01)])
    text = capsys.readouterr().out
    assert rows_of(text)["stock, learning_rate 0.01"][-2:] == ["no common seed", "–"]
    assert "interval" not in text.partition("Every run")[2]


def test_one_run_alone(compare_runs, tmp_path, capsys):
    compare_runs.main([write_run(tmp_path / "a", 0, 1e4)])
    assert rows_of(capsys.readouterr().out)["stock"][:4] == ["1", "10000.0000", "–", "beyond floats"]


def test_writes_table_and_picture(compare_runs, runs, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    compare_runs.main([*runs, "--output_dir", str(output)])
    assert {path.name for path in output.iterdir()} == {"comparison.md", "comparison.png", "comparison.svg"}
    assert (output / "comparison.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert (output / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = (output / "comparison.svg").read_bytes()
    assert b"<svg" in first
    compare_runs.main([*runs, "--output_dir", str(output)])
    assert (output / "comparison.svg").read_bytes() == first


def monitored_run(folder, seed, loss, **arguments):
    """A run with the file that `SpectralMonitor` writes."""
    directory = write_run(folder, seed, loss, spectral_monitor_every=2, **arguments)
    names = [f"{name}_{part}{end}" for name in ("sigma_min", "kappa") for part in ("query", "key", "value")
             for end in ("", "_effective")]  # fmt: skip
    records = [
        {"step": step, "layers": [0, 1], "indicator": [[9.0], [9.0]], "kappa_jacobian": [[2.0 + step], [3.0 + step]]}
        | {name: [[1.0], [1.0]] for name in names}
        for step in (0, 2, 4)
    ]
    (folder / "spectral_monitor.json").write_text(json.dumps({"records": records}))
    return directory


def test_runs_with_the_monitor_are_drawn_over_training(compare_runs, tmp_path, monkeypatch, capsys):
    runs = [monitored_run(tmp_path / f"stock-{seed}", seed, 3.0) for seed in (0, 1)]
    runs += [monitored_run(tmp_path / "svd", 0, 3.0, spectral_conditioning=True, spectral_method="svd")]
    groups, original = [], compare_runs.write_training_report
    monkeypatch.setattr(
        compare_runs, "write_training_report", lambda found, *rest: groups.append(found) or original(found, *rest)
    )
    output = tmp_path / "out"
    compare_runs.main([*runs, "--output_dir", str(output), "--labels", "A", "B"])
    assert f"Conditioning of attention over training: {output / 'training'}.png, .svg" in capsys.readouterr().out
    for name in ("training", "outcome"):
        assert (output / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in (output / "training.svg").read_bytes()
    assert {label: len(found) for label, found in groups[0].items()} == {"A": 2, "B": 1}
    assert [record["kappa_jacobian"] for record in groups[0]["B"][0]] == [
        [[2.0], [3.0]],
        [[4.0], [5.0]],
        [[6.0], [7.0]],
    ]


def test_what_keeps_the_monitor_from_being_drawn_is_said(compare_runs, tmp_path, capsys):
    runs = [monitored_run(tmp_path / f"stock-{seed}", seed, 3.0) for seed in (0, 1)]
    output = ["--output_dir", str(tmp_path / "out")]
    # A run without the monitor in a folder in which an earlier one had it.
    earlier = monitored_run(tmp_path / "stock-2", 2, 3.0)
    record = json.loads((tmp_path / "stock-2" / "metrics.json").read_text())
    record["arguments"]["spectral_monitor_every"] = 0
    (tmp_path / "stock-2" / "metrics.json").write_text(json.dumps(record))
    compare_runs.main([*runs, earlier, *output])
    said = "is not drawn: no spectral_monitor.json (--spectral_monitor_every) in"
    assert f"{said} {tmp_path / 'stock-2'}." in capsys.readouterr().out
    compare_runs.main([write_run(tmp_path / "other", 0, 3.0), *output])
    assert "Conditioning of attention" not in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("training*"))
    for content in ("[]", "{", '{"records": [{}]}'):
        (tmp_path / "stock-1" / "spectral_monitor.json").write_text(content)
        with pytest.raises(
            SystemExit, match=r"^error: .*stock-1/spectral_monitor\.json is damaged or not a file of Spec"
        ):
            compare_runs.main([*runs, *output])


@pytest.fixture
def drawn(monkeypatch):
    """The figures in place of their files."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def with_validations(folders, steps):
    for folder in folders:
        file = Path(folder) / "metrics.json"
        record = json.loads(file.read_text())
        loss = record["final"]["validation_loss"]
        record["validation"] = [{"step": step, "validation_loss": loss + (4 - step)} for step in steps]
        file.write_text(json.dumps(record))
    return folders


def test_the_picture_names_axes_and_units_and_shows_every_run(compare_runs, runs, drawn):
    groups = compare_runs.group_runs(compare_runs.read_runs(with_validations(runs, (1, 2, 4))))
    compare_runs.picture(groups, METRICS["tokens"]["loss"])
    training, validation, final = drawn[0].axes
    assert training.get_xlabel() == validation.get_xlabel() == "optimizer step"
    for label in (training.get_ylabel(), validation.get_ylabel(), final.get_xlabel()):
        assert label.endswith("loss (nats per predicted token)")
    assert len(training.lines) == len(validation.lines) == 8 + 3
    thick = [line for line in training.lines if line.get_linewidth() == 2]
    assert [line.get_label() for line in thick] == ["identity, lambda 1", "stock", "svd"]
    assert list(thick[1].get_ydata()) == pytest.approx([3.18333 + 4 / step for step in (1, 2, 3, 4)], rel=1e-5)
    assert len({line.get_color() for line in thick}) == 3
    assert [label.get_text() for label in final.get_yticklabels()] == ["identity,\nlambda 1", "stock", "svd"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["identity, lambda 1", "stock", "svd"]
    runs_drawn = [line for line in final.lines if line.get_fillstyle() == "none"]
    assert [sorted(line.get_xdata()) for line in runs_drawn] == [
        pytest.approx(sorted(LOSSES["identity"])),
        pytest.approx(sorted(LOSSES["stock"])),
        [4.0, 4.0],
    ]
    means = [bars.lines[0].get_xdata()[0] for bars in final.containers]
    assert means == pytest.approx([fmean(LOSSES["identity"]), fmean(LOSSES["stock"]), 4.0])


def test_two_validations_are_no_curve_and_one_run_is_drawn_once(compare_runs, tmp_path, drawn):
    folders = [write_run(tmp_path / "a", 0, 3.0), write_run(tmp_path / "b", 0, 2.5, learning_rate=0.01)]
    compare_runs.picture(compare_runs.group_runs(compare_runs.read_runs(folders)), METRICS["tokens"]["loss"])
    training, final = drawn[0].axes
    assert (training.get_title(), final.get_title()) == ("Training", "Final")
    assert [line.get_xdata().tolist() for line in final.lines] == [[3.0], [2.5]]
    assert not final.containers


def write_timed_run(folder, seed, loss, step, tokens, **arguments):
    """A run that a budget of two hours ended at that step, its batch ramped so that steps and tokens are not proportional."""
    directory = write_run(folder, seed, loss, max_train_hours=2.0, **arguments)
    record = json.loads((folder / "metrics.json").read_text())
    record["history"] = [
        {"step": 1, "train_loss": loss + 4, "tokens_per_second": 1.0, "train_tokens_seen": 100},
        {"step": step, "train_loss": loss, "tokens_per_second": 1.0, "train_tokens_seen": tokens},
    ]
    record["validation"] = [{"step": step, "validation_loss": loss}]
    record["final"] = {"step": step, "validation_loss": loss, "train_tokens_seen": tokens}
    (folder / "metrics.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def timed_runs(tmp_path):
    svd = {"spectral_conditioning": True, "spectral_method": "svd"}
    return [
        write_timed_run(tmp_path / "stock-0", 0, 3.0, 50, 50_000),
        write_timed_run(tmp_path / "stock-1", 1, 3.2, 40, 40_000),
        write_timed_run(tmp_path / "svd-0", 0, 3.1, 30, 20_000, **svd),
        write_timed_run(tmp_path / "svd-1", 1, 3.1, 30, 20_000, **svd),
    ]


def test_runs_that_share_a_time_budget(compare_runs, timed_runs, capsys):
    compare_runs.main(timed_runs)
    text = capsys.readouterr().out
    assert rows_of(text)["svd"][-2] == "+0.0000 (2)"
    assert "Caution" not in text
    assert "Every run: 2 h of training, the same 5,000 validation tokens." in text
    assert (
        "These runs share a time budget of 2 h, not a number of steps. stock: 40,000 to 50,000 training tokens in 40 to 50 "
        "steps; svd: 20,000 training tokens in 30 steps. So the comparison includes speed"
    ) in text
    assert "speaks for this model, corpus and time on this machine alone" in text
    assert "number of steps alone" not in text


def test_runs_that_share_a_time_budget_are_drawn_over_tokens(compare_runs, timed_runs, drawn):
    compare_runs.picture(compare_runs.group_runs(compare_runs.read_runs(timed_runs)), METRICS["tokens"]["loss"])
    training, _ = drawn[0].axes
    assert training.get_xlabel() == "training tokens"
    mean = next(line for line in training.lines if line.get_label() == "stock")
    assert list(mean.get_xdata()) == [100, 40_000]
    # At 40,000 tokens one run has ended at 3.2; the other is on its way from 7 at 100 to 3 at 50,000.
    assert mean.get_ydata()[1] == pytest.approx((3.2 + 7 - 4 * 39_900 / 49_900) / 2)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["stock", "svd"]


def test_different_time_budgets_are_refused(compare_runs, timed_runs, tmp_path):
    other = write_run(tmp_path / "other", 9, 3.0)
    with pytest.raises(SystemExit, match=r"do not compare(?s:.*)time budget \(hours\): 2\.0 in .*; None in .*other"):
        compare_runs.main([*timed_runs, other])


def test_more_groups_than_colors_and_runs_without_log_entries(compare_runs, tmp_path):
    folders = [write_run(tmp_path / f"{i}", 0, 3.0, learning_rate=0.1 * i) for i in range(9)]
    record = json.loads((tmp_path / "0" / "metrics.json").read_text())
    (tmp_path / "0" / "metrics.json").write_text(json.dumps(record | {"history": []}))
    compare_runs.main([*folders, "--output_dir", str(tmp_path / "out")])


def test_refuses_different_data_unless_told(compare_runs, runs, tmp_path, capsys):
    other = write_run(tmp_path / "other", 8, 3.0, facts={"validation_fingerprint": "xyz"})
    with pytest.raises(SystemExit, match=r"do not compare(?s:.*)xyz in .*other(?s:.*)--allow_different"):
        compare_runs.main([*runs, other])
    compare_runs.main([*runs, other, "--allow_different"])
    assert "**Caution, these runs differ where they should not.** validation data" in capsys.readouterr().out


def test_says_when_speeds_do_not_compare(compare_runs, tmp_path, capsys):
    folders = [write_run(tmp_path / "a", 0, 3.0), write_run(tmp_path / "b", 1, 3.0, facts={"device": "cuda"})]
    compare_runs.main(folders)
    assert (
        "Speeds do not compare: the runs differ in device, device_name, processes, threads." in capsys.readouterr().out
    )


def test_errors_are_one_line_for_the_user(compare_runs, runs, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}/none has no metrics.json"):
        compare_runs.main([*runs, str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^error: .*svd-7 is given twice"):
        compare_runs.main([*runs, runs[-1]])
    with pytest.raises(SystemExit, match=r"^error: --reference 'x' is not a group"):
        compare_runs.main([*runs, "--reference", "x"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: --output_dir .*file cannot be written: .* is a file, not a folder"):
        compare_runs.main([*runs, "--output_dir", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("module", "needs"), [("scipy", "intervals need scipy"), ("matplotlib", "figure needs matplotlib")]
)
def test_a_missing_package_is_named(compare_runs, runs, tmp_path, monkeypatch, module, needs):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(
        SystemExit, match=rf"^error: The {needs}, which is not installed: pip install 'hf_specattn\[train\]'"
    ):
        compare_runs.main([*runs, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("huge", [1e30, 1e200, 1.5e308])
def test_runs_that_diverged_beyond_all_measure(compare_runs, tmp_path, capsys, huge):
    folders = [write_run(tmp_path / f"a{seed}", seed, 3.0 + seed / 10) for seed in (0, 1)]
    folders += [
        write_run(tmp_path / f"b{seed}", seed, value, learning_rate=0.1) for seed, value in enumerate((huge, huge / 3))
    ]
    compare_runs.main([*folders, "--output_dir", str(tmp_path / "out")])
    row = rows_of(capsys.readouterr().out)["stock, learning_rate 0.1"]
    # Of x and x / 3: the mean is 2 x / 3, the deviation x / 3 * sqrt(2).
    assert row[1:4] == [f"{huge / 3 * 2:.4g}", f"{huge / 3 * 2**0.5:.4g}", "beyond floats"]
    assert row[6] == f"{huge / 3 * 2:+.4g} (2)"
    assert "contains 0" in row[7]
    text = (tmp_path / "out" / "comparison.svg").read_text()
    assert text.count("<!-- 1e+30 -->") == 2  # beyond it nothing is drawn
    assert "nan" not in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
