"""Reading and grouping runs, and paired differences against scipy and numbers worked out by hand."""

import builtins
import json
import math

import numpy as np
import pytest
from scipy import stats

from hf_specattn.figures import COLORS, MARKERS, OKABE_ITO
from recipes.compare.comparison import (
    METRICS,
    ComparisonError,
    find_differences,
    find_reference,
    group_runs,
    mean_curve,
    paired_difference,
    read_run,
    read_runs,
    shared_time_budget,
)

IDENTITY = {"spectral_conditioning": True, "lambda_": "1.0"}


@pytest.fixture
def write_run(tmp_path):
    """A function: name, seed, loss, changed arguments and facts -> folder with the `metrics.json` of such a run."""

    def write(name, seed=0, loss=3.0, facts=(), **arguments):
        record = {
            "arguments": {
                "seed": seed,
                "output_dir": f"runs/{name}",
                "learning_rate": 1e-3,
                "mlm_probability": 0.25,
                "mixed_precision": None,
                "per_device_train_batch_size": 8,
                "spectral_conditioning": False,
                "lambda_": None,
            }
            | arguments,
            "facts": {
                "model_type": "crammed_bert",
                "validation_fingerprint": "abc",
                "tokens_per_step": 1024,
                "global_batch_size": 8,
                "mixed_precision": "no",
            }
            | dict(facts),
            "history": [
                {"step": step, "train_loss": 9.0 - step, "tokens_per_second": 100.0 * step} for step in (2, 4)
            ],
            "validation": [{"step": 4, "validation_loss": loss}],
            "final": {"step": 4, "validation_loss": loss, "seconds": 1.0},
            "versions": {"python": "3.11"},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
        return tmp_path / name

    return write


def labels_of(*folders):
    return [group.label for group in group_runs(read_runs(folders))]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reads_what_the_run_recorded(write_run):
    run = read_run(write_run("a", seed=3, loss=2.5))
    assert (run.seed, run.loss, run.steps, run.tokens, run.spectral) == (3, 2.5, 4, 4096, "stock")
    assert run.settings == {
        "learning_rate": 1e-3,
        "mlm_probability": 0.25,
        "global_batch_size": 8,
        "mixed_precision": "no",
    }


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ({}, "stock"),
        (IDENTITY, "identity, lambda 1"),
        ({"spectral_conditioning": True}, "identity, lambda 10"),
        ({"spectral_conditioning": True, "lambda_": "10", "spectral_method": "identity"}, "identity, lambda 10"),
        (
            {"spectral_conditioning": True, "lambda_": "key=2.5,query=10", "spectral_targets": ["query", "key"]},
            "identity, lambda query=10 key=2.5, on query+key",
        ),
        (
            {"spectral_conditioning": True, "spectral_method": "svd", "spectral_granularity": "head"}
            | {"spectral_refresh_every": 5},
            "svd, per head, refreshed every 5",
        ),
        (
            {"spectral_conditioning": True, "spectral_method": "svd", "spectral_init": "preserve"},
            "svd, preserve",
        ),
    ],
)
def test_names_the_spectral_settings(write_run, flags, label):
    assert read_run(write_run("a", **flags)).spectral == label


def test_a_run_from_a_conditioned_checkpoint_is_not_stock(write_run):
    folder = write_run("a", facts={"model_type": "specattn_crammed_bert"})
    assert read_run(folder).spectral == "conditioned as its checkpoint"


def test_refuses_a_folder_without_a_record(tmp_path):
    with pytest.raises(ComparisonError, match=f"{tmp_path} has no metrics.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"arguments": ', "{}", "[]", '"text"', "[" * 100_000], ids=lambda text: text[:12]
)
def test_refuses_a_damaged_record(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ComparisonError, match=r"metrics\.json is damaged or no record of a run"):
        read_run(tmp_path)


def edit(folder, change):
    record = json.loads((folder / "metrics.json").read_text())
    change(record)
    (folder / "metrics.json").write_text(json.dumps(record))


def test_refuses_an_unfinished_run(write_run):
    folder = write_run("a")
    edit(folder, lambda record: record.update(final={}))
    with pytest.raises(ComparisonError, match=r"a/metrics\.json has no final result: the run is unfinished"):
        read_run(folder)


def test_refuses_a_record_of_something_else(write_run):
    folder = write_run("a")
    edit(folder, lambda record: record.update(facts={}))
    with pytest.raises(ComparisonError, match="has no validation_fingerprint among its facts"):
        read_run(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": ["seed"]}, "arguments is no object"),
        ({"facts": "validation_fingerprint tokens_per_step"}, "facts is no object"),
        ({"final": "step validation_loss"}, "final is no object"),
        ({"history": None}, "history is no list of steps"),
        ({"history": [1]}, "history is no list of steps"),
        ({"history": [{"step": 1, "train_loss": 1.0}]}, "history has a step without its loss or speed"),
        ({"validation": [{}]}, "validation is no list of steps"),
        ({"arguments": {"seed": "0"}}, "seed '0' is no integer"),
        ({"facts": {"validation_fingerprint": [1]}}, r"validation_fingerprint \[1\] is no text"),
    ],
)
def test_refuses_a_record_of_another_form(write_run, change, message):
    folder = write_run("a")
    edit(folder, lambda record: record.update(change))
    with pytest.raises(ComparisonError, match=rf"a/metrics\.json is damaged or no record of a run: {message}"):
        read_run(folder)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None, "2.5", True])
def test_refuses_a_result_that_is_no_number(write_run, loss):
    folder = write_run("a")
    edit(folder, lambda record: record["final"].update(validation_loss=loss))
    with pytest.raises(ComparisonError, match=rf"a/metrics\.json has the final validation_loss {loss!r}: the run div"):
        read_run(folder)


def test_refuses_spectral_settings_that_do_not_exist(write_run):
    folder = write_run("a", spectral_conditioning=True, lambda_="-1")
    with pytest.raises(ComparisonError, match=r"a/metrics\.json records spectral settings.*lambda_=-1"):
        read_run(folder)


def test_refuses_a_folder_given_twice(write_run, tmp_path):
    folder = write_run("a")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ComparisonError, match="link is given twice"):
        read_runs([folder, tmp_path / "link"])


# --- grouping --------------------------------------------------------------------------------------------------------


def test_groups_differ_in_more_than_the_seed(write_run):
    folders = [
        write_run("i0", 0, 2.0, **IDENTITY),
        write_run("s0", 0, 3.0),
        write_run("s1", 1, 4.0, logging_steps=7, eval_steps=3),
        write_run("i1", 1, 2.5, **IDENTITY),
    ]
    identity, stock = group_runs(read_runs(folders))
    assert (identity.label, stock.label) == ("identity, lambda 1", "stock")
    loss = METRICS["tokens"]["loss"]
    assert stock.values(loss) == {0: 3.0, 1: 4.0}
    assert stock.mean(loss) == 3.5
    assert stock.deviation(loss) == pytest.approx(math.sqrt(0.5))
    assert stock.tokens_per_second == 300.0  # of 200, 400, 200, 400


def test_other_differences_are_in_the_label(write_run):
    folders = write_run("a"), write_run("b", learning_rate=0.002), write_run("c", warmup=5)
    assert labels_of(*folders) == [
        "stock, learning_rate 0.001, warmup not recorded",
        "stock, learning_rate 0.002, warmup not recorded",
        "stock, learning_rate 0.001, warmup 5",
    ]


def test_the_batch_counts_and_not_how_it_was_made(write_run):
    accumulated = write_run("b", seed=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    halved = write_run("c", seed=2, facts={"global_batch_size": 4})
    assert labels_of(write_run("a"), accumulated) == ["stock"]
    assert labels_of(accumulated, halved) == ["stock, global_batch_size 8", "stock, global_batch_size 4"]


def test_a_precision_that_the_launcher_chose_counts(write_run):
    folders = write_run("a"), write_run("b", facts={"mixed_precision": "bf16"})
    assert labels_of(*folders) == ["stock, mixed_precision no", "stock, mixed_precision bf16"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("torch_compile", (False, True)),
        ("gradient_checkpointing", (False, True)),
        ("preset", (None, "demo")),
        ("show_plan", (False, True)),
        ("streaming", (False, True)),
        ("cache_dir", (None, "cache")),
    ],
)
def test_bookkeeping_and_what_changes_rounding_alone_form_no_groups(write_run, name, values):
    folders = [write_run(f"r{seed}", seed, **{name: value}) for seed, value in enumerate(values)]
    assert labels_of(*folders) == ["stock"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("torch_compile", (False, True)),
        ("gradient_checkpointing", (False, True)),
        ("per_device_train_batch_size", (8, 4)),
    ],
)
def test_under_a_time_budget_speed_counts(write_run, name, values):
    folders = [write_run(f"r{seed}", seed, max_train_hours=2.0, **{name: v}) for seed, v in enumerate(values)]
    assert labels_of(*folders) == [f"stock, {name} {value}" for value in values]


def test_under_a_ramp_the_cut_of_the_batch_counts(write_run):
    """It decides with which batch the ramp begins."""
    folders = [
        write_run(f"r{steps}", batch_size_ramp=0.6, gradient_accumulation_steps=steps, torch_compile=steps > 1)
        for steps in (1, 2)
    ]
    assert labels_of(*folders) == [f"stock, gradient_accumulation_steps {steps}" for steps in (1, 2)]


def test_several_files_in_labels(write_run):
    folders = [
        write_run("a", train_file=["x.txt"], validation_file=["v.txt", "w.txt"]),
        write_run("b", train_file=["x.txt", "y z.txt"], validation_file=["v.txt", "w.txt"]),
        write_run("c", train_file=None, validation_file=None),
    ]
    assert labels_of(*folders) == [
        "stock, train_file x.txt, validation_file v.txt w.txt",
        "stock, train_file x.txt y z.txt, validation_file v.txt w.txt",
        "stock, train_file None, validation_file None",
    ]


def test_one_file_is_the_same_in_a_list_or_alone(write_run):
    assert labels_of(write_run("a", 0, train_file="x.txt"), write_run("b", 1, train_file=["x.txt"])) == ["stock"]


def test_refuses_two_runs_of_one_seed(write_run):
    runs = read_runs([write_run("a", seed=5), write_run("b", seed=5)])
    with pytest.raises(ComparisonError, match=r"/a and .*/b are runs of one seed \(5\)"):
        group_runs(runs)


def test_own_labels(write_run):
    runs = read_runs([write_run("a"), write_run("b", **IDENTITY)])
    assert [group.label for group in group_runs(runs, ["x", "y"])] == ["x", "y"]
    for labels in (["x"], ["x", "x"], ["x", "y", "z"]):
        with pytest.raises(ComparisonError, match="the runs form 2 groups, in this order: stock; identity, lambda 1"):
            group_runs(runs, labels)


def test_the_reference_is_stock_or_the_first(write_run):
    identity, stock = group_runs(read_runs([write_run("a", **IDENTITY), write_run("b")]))
    assert find_reference([identity, stock]) is stock
    assert find_reference([identity]) is identity
    assert find_reference([identity, stock], "identity, lambda 1") is identity
    with pytest.raises(
        ComparisonError, match="--reference 'svd' is not a group; the groups are: identity, lambda 1; stock"
    ):
        find_reference([identity, stock], "svd")


def test_finds_what_must_be_equal_and_is_not(write_run):
    plain = write_run("a")
    assert find_differences(read_runs([plain, write_run("b", seed=1, learning_rate=1.0)])) == []
    other_data = write_run("c", facts={"validation_fingerprint": "xyz"}, mlm_probability=0.15)
    data, share = find_differences(read_runs([plain, other_data]))
    assert data == f"validation data (fingerprint): abc in {plain}; xyz in {other_data}"
    assert share.startswith("share of predicted tokens: 0.25 in ")
    (tokens,) = find_differences(read_runs([plain, write_run("d", facts={"tokens_per_step": 512})]))
    assert tokens.startswith("training tokens: 4096 in ")
    longer = write_run("e")
    edit(longer, lambda record: record["final"].update(step=5))
    assert [line.split(":")[0] for line in find_differences(read_runs([plain, longer]))] == [
        "steps",
        "training tokens",
    ]


# --- tokens, and runs scheduled by the clock -------------------------------------------------------------------------


def finish(folder, step, tokens=None):
    """Let the run end at that step, with the tokens it records."""
    seen = {} if tokens is None else {"train_tokens_seen": tokens}
    edit(folder, lambda record: record["final"].update(step=step, **seen))
    return folder


def test_recorded_tokens_count(write_run):
    """Under a ramp of the batch they are not steps times the full batch."""
    ramped, plain = write_run("a"), write_run("b", seed=1)
    assert read_run(finish(ramped, 4, 1500)).tokens == 1500
    (line,) = find_differences(read_runs([ramped, plain]))
    assert line == f"training tokens: 1500 in {ramped}; 4096 in {plain}"
    assert find_differences(read_runs([ramped, finish(write_run("c", seed=2), 4, 1500)])) == []


def test_a_shared_time_budget_allows_other_steps_and_tokens(write_run):
    folders = [write_run(name, seed, max_train_hours=2.0) for seed, name in enumerate("ab")]
    runs = read_runs([folders[0], finish(folders[1], 7, 900)])
    assert [run.time_budget for run in runs] == [2.0, 2.0]
    assert (runs[1].steps, runs[1].tokens) == (7, 900)
    assert find_differences(runs) == []
    assert shared_time_budget(runs) == 2.0


def test_a_shared_time_budget_needs_the_same_data_and_hardware(write_run):
    runs = read_runs(
        [
            write_run("a", max_train_hours=2.0, facts={"device": "cuda", "processes": 1}),
            write_run(
                "b", max_train_hours=2.0, facts={"device": "cpu", "processes": 1, "validation_fingerprint": "x"}
            ),
        ]
    )
    data, hardware = find_differences(runs)
    assert data.startswith("validation data")
    assert hardware.startswith(
        "hardware under a time budget (device, device_name, processes, threads): cuda not recorded 1"
    )


@pytest.mark.parametrize("other", [None, 3.0])
def test_different_time_budgets_are_a_difference(write_run, other):
    runs = read_runs([write_run("a", max_train_hours=2.0), finish(write_run("b", max_train_hours=other), 5)])
    assert shared_time_budget(runs) is None
    assert [line.split(":")[0] for line in find_differences(runs)] == [
        "time budget (hours)",
        "steps",
        "training tokens",
    ]
    assert find_differences(runs)[0].startswith(f"time budget (hours): 2.0 in {runs[0].directory}; {other} in ")


def test_no_time_budget_is_none_that_is_shared(write_run):
    assert shared_time_budget(read_runs([write_run("a"), write_run("b", max_train_hours=None)])) is None


def test_curves_over_steps_and_over_tokens(write_run):
    run = read_run(write_run("a"))
    assert run.curve("train_loss") == [(2, 7.0), (4, 5.0)]
    assert run.curve("validation_loss") == [(4, 3.0)]
    assert run.curve("train_loss", over_tokens=True) == [(2048, 7.0), (4096, 5.0)]
    assert run.curve("validation_loss", over_tokens=True) == [(4096, 3.0)]


def test_recorded_tokens_of_a_curve(write_run):
    """Steps 1 to 4 of a ramp: 100, 300, 600, 1000; where an evaluation lacks them, on the line between 300 and 1000."""
    folder = finish(write_run("a"), 4, 1000)
    edit(
        folder,
        lambda record: record.update(
            history=[
                {"step": 1, "train_loss": 8.0, "tokens_per_second": 1.0},
                {"step": 2, "train_loss": 7.0, "tokens_per_second": 1.0, "train_tokens_seen": 300},
                {"step": 4, "train_loss": 5.0, "tokens_per_second": 1.0, "train_tokens_seen": 1000},
            ],
            validation=[{"step": step, "validation_loss": 9.0 - step} for step in (2, 3, 4)],
        ),
    )
    run = read_run(folder)
    assert run.curve("train_loss", over_tokens=True) == [(150, 8.0), (300, 7.0), (1000, 5.0)]
    assert run.curve("validation_loss", over_tokens=True) == [(300, 7.0), (650, 6.0), (1000, 5.0)]
    edit(folder, lambda record: record["validation"][1].update(train_tokens_seen=600))
    assert read_run(folder).curve("validation_loss", over_tokens=True)[1] == (600, 6.0)


# --- statistics ------------------------------------------------------------------------------------------------------

STOCK_LOSSES = {0: 3.10, 1: 3.40, 2: 3.05, 3: 3.30, 9: 100.0}
IDENTITY_LOSSES = {3: 3.21, 1: 3.33, 0: 3.08, 2: 3.02, 7: -100.0}


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_of_a_paired_difference_is_students(confidence):
    result = paired_difference(IDENTITY_LOSSES, STOCK_LOSSES, confidence)
    assert result.seeds == (0, 1, 2, 3)
    differences = np.array([IDENTITY_LOSSES[seed] - STOCK_LOSSES[seed] for seed in result.seeds])
    half = stats.t.ppf((1 + confidence) / 2, 3) * differences.std(ddof=1) / 2
    assert result.interval == pytest.approx((differences.mean() - half, differences.mean() + half), rel=1e-12)


def test_paired_difference_by_hand():
    """Differences 1 and 3: mean 2, deviation sqrt(2), standard error 1; t of one degree of freedom is 12.706."""
    result = paired_difference({0: 2.0, 1: 5.0}, {0: 1.0, 1: 2.0})
    assert result.mean == 2.0
    assert result.interval == pytest.approx((2 - 12.7062047, 2 + 12.7062047), rel=1e-7)
    assert result.contains_zero
    assert not paired_difference({0: 2.0, 1: 5.0}, {0: 1.0, 1: 3.99}).contains_zero


def test_equal_differences_give_no_interval():
    result = paired_difference({0: 2.0, 1: 5.0}, {0: 1.0, 1: 4.0})
    assert (result.mean, result.interval, result.contains_zero) == (1.0, None, False)


def test_one_or_no_common_seed_gives_no_interval(monkeypatch):
    def no_scipy(name, *arguments, **keywords):
        raise ImportError(name)

    monkeypatch.setattr(builtins, "__import__", no_scipy)  # none is needed
    result = paired_difference({0: 1.5, 1: 2.0}, {1: 1.0, 2: 0.0})
    assert (result.mean, result.seeds, result.interval, result.contains_zero) == (1.0, (1,), None, False)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(
        ImportError, match=r"The intervals need scipy, which is not installed: pip install 'hf_specattn\[train\]'"
    ):
        paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.0})


def test_mean_curve_where_all_have_the_same_positions():
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(1, 1.0), (2, 6.0)]]) == [(1, 1.5), (2, 5.0)]
    assert mean_curve([[(1, 2.0)]]) == [(1, 2.0)]


def test_mean_curve_joins_points_by_lines_within_all_curves():
    """The second curve at 2 is 6, and at 4, half-way from 3 to 5, it is 8; nothing before 1.5 or after 4."""
    curves = [[(0, 9.0), (2, 4.0), (4, 0.0)], [(1.5, 5.0), (2, 6.0), (3, 7.0), (5, 9.0)]]
    assert mean_curve(curves) == [(1.5, (5.25 + 5) / 2), (2, 5.0), (3, (2 + 7) / 2), (4, 4.0)]


@pytest.mark.parametrize("curves", [[], [[]], [[(1, 2.0)], []], [[(1, 2.0)], [(2, 3.0)]]])
def test_mean_curve_of_curves_without_a_common_position(curves):
    assert mean_curve(curves) == []


def test_colors_and_markers_are_distinct():
    assert COLORS[:4] == tuple(OKABE_ITO.values())
    assert len(set(COLORS)) == len(COLORS) == 7
    assert len(set(MARKERS)) == len(MARKERS) == 8
