"""benchmarks/gpu.py: what it keeps, skips, stops and says, with small items of its own; and all its items on tiny models."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import pytest
import torch
from scripts_loading import REPOSITORY, load_script

from hf_specattn import SpectralConfig
from hf_specattn.files import is_alive
from hf_specattn.layers import ProjectionLayout

BENCHMARKS = REPOSITORY / "benchmarks"


def load(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # as for a program that lies there
        return load_script(BENCHMARKS / f"{name}.py")


@pytest.fixture(scope="module")
def gpu():
    return load("gpu")


@pytest.fixture(scope="module")
def steps(gpu):
    return load("gpu_steps")


@pytest.fixture(scope="module")
def correctness():
    return load("gpu_correctness")


@pytest.fixture(scope="module")
def detection(steps):
    pytest.importorskip("timm")
    return load("gpu_detection")


@pytest.fixture(scope="module")
def residual_free():
    pytest.importorskip("timm")
    return load("gpu_residual_free")


# What `parts` below may be made of; each leaves a line in the file that RAN names when it runs.
MODULE = """
import os, sys, time
from pathlib import Path
from gpu_parts import Outcome, Part

RAN = Path({ran!r})

def outcome(name, **others):
    return Outcome("The section", ("name", "value"), [[name, "1.5"]], {{"value": 1.5}}, notes=["a note"], **others)

def part(name, work=None):
    def run():
        with RAN.open("a") as stream:
            stream.write(name + "\\n")
        print("printed by", name)
        return outcome(name) if work is None else work(name)
    return Part(name, run)

def parts(options):
    assert options.device == "cpu" and options.tiny
    return [{parts}]
"""


class Command:
    """The command with items of a test's own."""

    def __init__(self, gpu, folder):
        self.gpu, self.folder, self.items = gpu, folder, []
        self.ran_file = folder / "ran"
        self.results = folder / "results"

    def item(self, name, parts, limit_s=60.0):
        path = self.folder / f"{name}.py"
        path.write_text(MODULE.format(ran=str(self.ran_file), parts=parts))
        self.items = [item for item in self.items if item.name != name]
        self.items.append(self.gpu.Item(name, f"What is {name}?", path, limit_s))

    def run(self, **fields):
        """Whether nothing failed, and the entries by item."""
        settings = {"items": [item.name for item in self.items], "results": str(self.results), "minutes": 5.0}
        settings |= {"earlier": str(self.folder / "none"), "device": "cpu", "tiny": True}
        arguments = self.gpu.GpuArguments(**settings | fields)
        self.ran_file.write_text("")
        results = self.gpu.Results(arguments, self.items, time.monotonic())
        succeeded = self.gpu.run(self.items, arguments, results)
        return succeeded, {entry["item"]: entry for entry in self.entries()}

    def entries(self):
        return json.loads((self.results / "gpu.json").read_text())["entries"]

    @property
    def ran(self):
        return self.ran_file.read_text().split()

    @property
    def page(self):
        return (self.results / "gpu.md").read_text(encoding="utf-8")

    @property
    def log(self):
        return (self.results / "gpu.log").read_text(encoding="utf-8")


@pytest.fixture
def command(gpu, tmp_path):
    return Command(gpu, tmp_path)


# --- what it keeps and skips -----------------------------------------------------------------------------------------


def test_what_was_measured_is_in_all_three_files_and_is_not_measured_again(command):
    command.item("one", "part('first'), part('second')")
    command.item("two", "part('third')")
    succeeded, entries = command.run()
    assert succeeded
    assert command.ran == ["first", "second", "third"]
    assert [entry["state"] for entry in entries.values()] == ["done", "done"]
    assert entries["one"]["parts"]["second"]["numbers"] == {"value": 1.5}
    assert "| one | What is one? | done | 2 of 2 |" in command.page
    assert "### The section\n\n| name | value |\n|---|---:|\n| first | 1.5 |\n| second | 1.5 |\n" in command.page
    assert command.page.count("- a note") == 2  # once for each item
    assert "printed by first" in command.log
    assert "one: first: done" in command.log
    assert sorted(path.name for path in command.results.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]

    succeeded, entries = command.run()
    assert succeeded
    assert command.ran == []
    assert "two: done before, with the same sources on the same card" in command.log
    assert "| first | 1.5 |" in command.page


def test_earlier_results_are_taken_up_in_another_folder(command):
    command.item("one", "part('first')")
    command.run()
    shutil.copytree(command.results, command.folder / "brought")
    command.results = command.folder / "other"
    command.item("two", "part('second')")
    command.run(earlier=str(command.folder / "brought"))
    assert command.ran == ["second"]
    assert "| first | 1.5 |" in command.page
    assert "printed by first" in command.log


def test_changed_sources_are_measured_again_and_what_was_before_stays_until_that_is_done(command):
    command.item("one", "part('first')")
    command.run()
    command.item("one", "part('first', lambda name: 1 / 0), part('second')")
    succeeded, _ = command.run()
    assert not succeeded
    assert command.ran == ["first", "second"]
    old, new = command.entries()
    assert (old["state"], new["state"]) == ("done", "failed")
    assert old["sources"] != new["sources"]
    assert "(other sources than today's)" in command.page
    assert "| first | 1.5 |" in command.page.partition("# Other cards, other sources")[2]

    command.item("one", "part('first'), part('second')")
    assert command.run()[0]
    assert [entry["state"] for entry in command.entries()] == ["done"]
    assert "# Other cards, other sources" not in command.page


def test_what_another_card_measured_is_neither_taken_nor_lost(command):
    command.item("one", "part('first')")
    command.run()
    (entry,) = command.entries()
    (command.results / "gpu.json").write_text(json.dumps({"entries": [entry | {"card": "NVIDIA Other"}]}))
    command.run()
    assert command.ran == ["first"]
    assert {entry["card"] for entry in command.entries()} == {"NVIDIA Other", entry["card"]}
    assert "## one on NVIDIA Other (another card)" in command.page


def test_items_that_are_not_asked_for_keep_their_results(command):
    command.item("one", "part('first')")
    command.item("two", "part('second')")
    command.run(items=["one"])
    assert command.ran == ["first"]
    _, entries = command.run(items=["two"])
    assert command.ran == ["second"]
    assert {name: entry["state"] for name, entry in entries.items()} == {"one": "done", "two": "done"}
    assert "# Other cards, other sources" not in command.page


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_item_is_stopped_at_its_limit_keeps_what_it_had_and_goes_on_from_there(command):
    hangs = "part('first'), part('hangs', lambda name: (RAN.with_name('pid').write_text(str(os.getpid())), time.sleep(99)))"
    command.item("one", f"{hangs}, part('last')", limit_s=4.0)
    command.item("two", "part('after')")
    started = time.monotonic()
    succeeded, entries = command.run()
    assert time.monotonic() - started < 40
    assert succeeded  # it is no failure, and goes on next time
    assert command.ran == ["first", "hangs", "after"]
    assert entries["one"]["state"] == "stopped"
    assert entries["one"]["why"] == "stopped after 4 s (in the part 'hangs'), its limit"
    assert list(entries["one"]["parts"]) == ["first"]
    assert entries["two"]["state"] == "done"
    assert "| stopped (stopped after 4 s (in the part 'hangs'), its limit) | 1 of 3 |" in command.page
    assert re.search(r"\| one \|.*\| hangs, last \|", command.page)
    assert not is_alive(int((command.folder / "pid").read_text()))

    command.run()
    assert command.ran == ["hangs"]  # of "one" alone, and not what was done


def test_the_minutes_are_kept(command):
    command.item("one", "part('first'), part('hangs', lambda name: time.sleep(99))")
    command.item("two", "part('after')")
    started = time.monotonic()
    _, entries = command.run(minutes=0.45)
    assert time.monotonic() - started < 27
    assert re.fullmatch(
        r"stopped after 2\d s \(in the part 'hangs'\), because the 0\.45 minutes were over", entries["one"]["why"]
    )
    assert command.ran == ["first", "hangs"]
    assert (entries["two"]["state"], entries["two"]["why"]) == ("not started", "the 0.45 minutes were over")
    assert (
        "| two | What is two? | not started (the 0.45 minutes were over) | 0 of ? | 0 | everything |" in command.page
    )


def test_a_part_that_raises_fails_and_the_others_go_on(command):
    command.item("one", "part('first', lambda name: 1 / 0), part('second')")
    command.item("two", "part('third')")
    succeeded, entries = command.run()
    assert not succeeded
    assert command.ran == ["first", "second", "third"]
    assert [entry["state"] for entry in entries.values()] == ["failed", "done"]
    assert "- **first** failed: ZeroDivisionError: division by zero." in command.page
    assert "| second | 1.5 |" in command.page
    assert "Traceback" in command.log
    command.run()
    assert command.ran == ["first"]


def test_a_part_may_follow_from_the_numbers_of_those_before_it(command):
    follows = "lambda name: Outcome('s', ('a',), [[str(options.measured['first']['value'] + 1)]], None)"
    command.item("one", f"part('first'), part('second', {follows})")
    succeeded, _ = command.run()
    assert succeeded
    assert "| 2.5 |" in command.page
    command.item("one", f"part('first'), part('second', {follows}), part('third', {follows})")  # other sources
    command.run()
    entry = command.entries()[-1]
    entry["parts"].pop("third")  # as if it had been stopped there
    entry["state"] = "stopped"
    (command.results / "gpu.json").write_text(json.dumps({"entries": [entry]}))
    succeeded, entries = command.run()
    assert succeeded
    assert command.ran == ["third"]
    assert entries["one"]["parts"]["third"]["table"]["rows"] == [["2.5"]]


def test_a_failed_check_keeps_its_numbers(command):
    failing = "lambda name: outcome(name, failures=['the sum: 2.0, where 1.0 is allowed'])"
    command.item("one", f"part('first', {failing})")
    succeeded, entries = command.run()
    assert not succeeded
    assert entries["one"]["state"] == "failed"
    assert entries["one"]["parts"]["first"]["numbers"] == {"value": 1.5}
    assert "- **first** failed: 1 of its checks.\n  - the sum: 2.0, where 1.0 is allowed\n" in command.page
    assert "| first | 1.5 |" in command.page


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ("part('first'), part('dies', lambda name: os.kill(os.getpid(), 9))", "its process ended with code -9"),
        ("part('first'), part('dies', lambda name: os._exit(3))", "its process ended with code 3"),
        ("nonsense", "NameError: name 'nonsense' is not defined"),
    ],
)
def test_a_process_that_dies_is_one_item_less(command, parts, why):
    command.item("one", parts)
    command.item("two", "part('after')")
    succeeded, entries = command.run()
    assert not succeeded
    assert entries["one"]["state"] == "failed"
    assert entries["one"]["why"].startswith(why)
    assert list(entries["one"]["parts"]) == (["first"] if "first" in parts else [])
    assert entries["two"]["state"] == "done"
    assert why in command.page


def test_what_is_measured_may_be_no_number(command):
    command.item("one", "part('first', lambda name: Outcome('s', ('a',), [['x']], {'nan': float('nan'), 1: (2, 3)}))")
    _, entries = command.run()
    assert entries["one"]["parts"]["first"]["numbers"] == {"nan": "nan", "1": [2, 3]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "cpu"], "--device cpu would take days at full size; give --tiny, too."),
        (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes 0.0 must be above 0."),
        (["--device", "cpu", "--tiny", "--items", "other"], "invalid choice: 'other'"),
        (
            ["--device", "cpu", "--tiny", "--cifar10", "none"],
            "--cifar10 none has no train*.parquet or no test*.parquet",
        ),
    ],
)
def test_refuses_bad_arguments(gpu, given, message, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu.main(given)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_a_file_that_is_not_its_own(gpu, tmp_path, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny", "--results", str(tmp_path)])
    assert "gpu.json is not a result of this command" in capsys.readouterr().err


# --- what a result is known by ---------------------------------------------------------------------------------------


def test_the_sources_of_an_item_are_what_it_imports(gpu):
    sources = {
        item.name: {str(path.relative_to(REPOSITORY)) for path in gpu.source_files(item.module)} for item in gpu.ITEMS
    }
    for found in sources.values():
        assert {f"hf_specattn/{name}.py" for name in ("layers", "refreshing", "polar", "conditioning")} <= found
        assert "benchmarks/gpu_parts.py" in found
        # What imports everything, what asks, and what has nothing to do with a step.
        assert not found & {"hf_specattn/__init__.py", "benchmarks/gpu.py", "hf_specattn/checkpoints/cards.py"}
    assert {"benchmarks/bench_step.py", "scripts/recipes/run/memory.py"} <= sources["steps"] & sources["families"]
    assert "benchmarks/bench_polar.py" in sources["polar"]
    assert "benchmarks/bench_step.py" not in sources["correctness"]
    steps, families = (item for item in gpu.ITEMS if item.name in ("steps", "families"))
    assert steps.module == families.module
    assert gpu.sources_hash(steps) != gpu.sources_hash(families)
    assert "scripts/recipes/detection/detector.py" in sources["detection"]
    assert {"scripts/train_image_classification.py", "scripts/recipes/run/ablations.py"} <= sources["experiments"]


def test_nothing_is_imported_at_the_start_that_a_lent_machine_lacks(gpu):
    """Neither datasets nor evaluate nor pycocotools is there: functions may ask for them, modules may not."""
    for item in gpu.ITEMS:
        for path in gpu.source_files(item.module):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
            assert not {"datasets", "evaluate", "pycocotools"} & {name.partition(".")[0] for name in names}, path


def test_other_images_are_another_measurement(gpu, tmp_path):
    for name, content in (("train.parquet", b"12"), ("test.parquet", b"1")):
        (tmp_path / name).write_bytes(content)
    for item in gpu.ITEMS:
        hashes = {gpu.sources_hash(item), gpu.sources_hash(item, str(tmp_path))}
        assert len(hashes) == (2 if item.name == "experiments" else 1)
    (item,) = (item for item in gpu.ITEMS if item.name == "experiments")
    before = gpu.sources_hash(item, str(tmp_path))
    (tmp_path / "test.parquet").write_bytes(b"12")
    assert gpu.sources_hash(item, str(tmp_path)) != before


def test_make_gpu_is_the_command_and_needs_no_environment(gpu):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    # `make test` may have started these tests, and would have this make speak of folders.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "gpu"]
    said = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    expected = 'PYTHONPATH=. python3 benchmarks/gpu.py --minutes 8 --results "${OUT:-benchmarks/results/gpu}"'
    assert said.stdout.strip() == expected


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_tenth_of_a_refresh(steps):
    seconds = {"stock": [1.0, 1.0], "svd": [2.0, 4.0], "svd_products": [12.0, 5.0]}
    assert steps.shared(seconds) == {"svd by products, every 10 steps": pytest.approx([3.0, 4.1])}


def test_kernels_are_counted_apart_from_copies_and_against_stock(steps):
    stock = {"events": {"kernel": 1200, "gpu_memcpy": 3, "gpu_memset": 2, "cuda_runtime": 5000}}
    numbers = {"events": {"kernel": 1272, "gpu_memset": 2}}
    assert steps.kernels_cell(stock, stock) == "1,200, 5 copies"
    assert steps.kernels_cell(numbers, stock) == "1,272 (+72), 2 copies"
    assert steps.kernels_cell({}, {}) == "not on this device"
    assert steps.kernels_cell({"events": {"cuda_runtime": 1}}, stock) == "the profiler saw none"
    assert steps.kernels_cell({"uncounted": "RuntimeError: no CUPTI"}, stock) == "RuntimeError: no CUPTI"
    assert steps.kernels_cell(numbers, {"uncounted": "RuntimeError: no CUPTI"}) == "1,272, 2 copies"


def test_the_profilers_events_are_counted_by_category(steps):
    tensor = torch.ones(3)
    one = steps.device_events(lambda: tensor.neg(), torch.profiler.ProfilerActivity.CPU)
    three = steps.device_events(lambda: tensor.neg().neg().neg(), torch.profiler.ProfilerActivity.CPU)
    assert (one["cpu_op"], three["cpu_op"]) == (1, 3)


def test_a_batch_that_does_not_fit_is_halved(steps, monkeypatch):
    bench = steps.StepTimings(steps.Options("cpu", False))
    tried = []

    def measure(case, group):
        tried.append(bench.batches[case.model])
        if bench.batches[case.model] > 128:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")
        return "measured"

    monkeypatch.setattr(bench, "_measure", measure)
    case = steps.Case("bert", "eager")
    assert bench.run(case, "identity") == "measured"
    assert tried == [512, 256, 128]
    assert bench.run(case, "identity") == "measured"
    assert tried[3:] == [128]  # and is not tried again


def test_stock_stays_for_the_next_variants_of_the_same_model(steps, monkeypatch):
    bench = steps.StepTimings(steps.Options("cpu", True))
    built = []
    original = bench._built
    monkeypatch.setattr(bench, "_built", lambda case, name: built.append((case.mode, name)) or original(case, name))
    case = steps.Case("bert", "eager")
    outcome = bench.run(case, "identity")
    assert [row[1] for row in outcome.rows] == ["stock", "identity"]
    assert all(len(row) == len(outcome.columns) for row in outcome.rows)
    bench.run(case, "svd, products")
    assert built == [("eager", name) for name in (steps.STOCK, steps.CONTROL, "identity", "svd", "svd_products")]
    ratios = outcome.numbers["ratios"]
    assert set(ratios) == {steps.CONTROL, "identity"}
    assert outcome.rows[1][4].startswith(f"{ratios[steps.CONTROL]['median']:.3f} (")


def test_every_variant_of_every_model_is_a_part(steps):
    from_device = steps.Options("cuda", False)
    names = [part.name for part in steps.parts(from_device)]
    expected = {
        f"{model}, {mode}: {group}"
        for model in ("bert", "vit")
        for mode in ("eager", "compiled")
        for group in steps.GROUPS
    }
    assert set(names) == expected - {"bert, compiled: svd, exact", "vit, compiled: svd, exact"}
    assert names[0] == "bert, eager: identity"
    assert names[-2:] == ["bert, eager: svd, exact", "vit, eager: svd, exact"]  # they take long
    pytest.importorskip("timm")
    families = [part.name for part in steps.families(from_device)]
    assert len(families) == len(set(families)) == 2 * (4 * 3 - 2)
    assert {"deit, eager: preconditioned", "xcit, compiled: svd, products"} < set(families)
    assert "davit, eager: preconditioned" not in families


# --- detection -------------------------------------------------------------------------------------------------------


def test_objects_lie_in_the_image_and_masks_fill_their_boxes(detection):
    image, found = detection.example(40, 80, torch.Generator().manual_seed(1))
    assert image.shape == (3, 40, 80)
    left, top, right, bottom = found["boxes"].unbind(1)
    for low, high, end in ((left, right, 80), (top, bottom, 40)):
        assert (torch.stack([low, end - high, high - low - 1]) >= 0).all()
    areas = (right - left) * (bottom - top)
    assert torch.equal(found["masks"].sum((1, 2)).float(), areas)
    for mask, box in zip(found["masks"], found["boxes"].int().tolist()):
        assert mask[box[1] : box[3], box[0] : box[2]].all()


def test_a_detectors_step_is_that_of_its_preset(detection, monkeypatch):
    """At full size, but for the detector itself: the published body and heads."""
    from recipes.detection import detector

    built = {}
    monkeypatch.setattr(detector, "register_detector", lambda: None)
    monkeypatch.setattr(detector, "Detector", lambda config: built.update(config=config) or torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Identity, "freeze_batch_norm", lambda self: None, raising=False)
    monkeypatch.setattr(detection, "example", lambda *size: (torch.zeros(3, *size[:2]), {}))
    arguments = detection.BenchArguments(models=["bert"], batch_size=2, device="cpu")
    step = object.__new__(detection.DetectionStep)
    _, batch = step.build("xcit_s12_p16", arguments)
    config = built["config"]
    assert (config.body["timm"], config.body["out_indices"]) == ("xcit_small_12_p16_384", [3, 5, 7, 11])
    assert (config.fpn_channels, config.box_head_size, len(config.id2label)) == (256, 1024, 80)
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 800, 1088)] * 2
    assert [part.name for part in detection.parts(detection.Options("cuda", False))] == [
        "xcit_s12_p16, eager: identity",
        "xcit_s12_p16, eager: svd, products",
        "swin_b, eager: identity",
        "swin_b, eager: svd, products",
        "swin_b, eager: preconditioned",
    ]


def test_a_conditioned_detector_steps_and_has_its_control(detection):
    (_, swin) = detection.parts(detection.Options("cpu", True))
    outcome = swin.run()
    assert [row[1] for row in outcome.rows] == ["stock", "preconditioned"]
    numbers = outcome.numbers
    assert set(numbers["ratios"]) == {"stock again (A/A control)", "preconditioned"}
    memory = {name: each["memory_bytes"] for name, each in numbers["counted"].items()}
    assert memory["preconditioned"] > memory["stock"] > 0


# --- attention without its residual ----------------------------------------------------------------------------------


def test_the_scale_is_the_stock_models_best(residual_free):
    names = [residual_free.tuning_name(12, scale) for scale in (5, 7, 10)]
    measured = dict(zip(names, ({"accuracy": value} for value in (0.3, 0.6, 0.6))))
    assert residual_free.best_scale(measured, 12, (5, 7, 10)) == 7
    with pytest.raises(ValueError, match=r"24 layers: V and O x 5, 7, 10 failed"):
        residual_free.best_scale(measured, 24, (5, 7, 10))
    del measured[names[0]]
    with pytest.raises(ValueError, match=r"12 layers: V and O x 5 failed"):
        residual_free.best_scale(measured, 12, (5, 7, 10))


def test_each_arm_of_each_seed_is_a_part(residual_free):
    names = [part.name for part in residual_free.parts(residual_free.Options("cuda", False))]
    assert len(names) == len(set(names)) == 2 * 4 + 2 * 4 * 4
    assert names[:5] == [
        *(f"12 layers, tuning: V and O x {scale}" for scale in (5, 7, 10, 14)),
        "12 layers, stock, seed 0",
    ]
    assert names.index("24 layers, with the residual, seed 0") < names.index("12 layers, stock, seed 1")


def test_an_arm_is_compared_with_stock_of_the_same_seed(residual_free, monkeypatch):
    ran = []

    def train(options, depth, scale, flags, seed, share=1.0):
        ran.append((depth, scale, tuple(flags), seed, share))
        return {"accuracy": 0.5 + 0.01 * seed + 0.1 * ("orthogonal" in flags), "mean_loss": 1.25, "seconds": 3.0}

    monkeypatch.setattr(residual_free, "train", train)
    options = residual_free.Options("cpu", True)
    rows = []
    for part in residual_free.parts(options):
        outcome = part.run()
        options.measured[part.name] = outcome.numbers
        rows += outcome.rows
    assert rows[2] == ["stock", "2", "0", "5", "50.00", "", "1.2500", "3"]
    assert rows[3] == ["orthogonal V and O", "2", "0", "5", "60.00", "+10.00", "1.2500", "3"]
    assert rows[5] == ["with the residual", "2", "0", "5", "50.00", "+0.00", "1.2500", "3"]
    assert [each[3:] for each in ran] == [(100, 0.25)] * 2 + [(0, 1.0)] * 4
    assert ["--held_out_share" in each[2] for each in ran] == [True] * 2 + [False] * 4
    assert ["--no_attention_residual" in each[2] for each in ran] == [True] * 5 + [False]


def test_the_images_of_a_lent_machine_are_folders_of_classes(residual_free, tmp_path, monkeypatch):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name, labels in (("train-00000-of-00001", [1, 0, 1]), ("test", [0])):
        images = [{"bytes": f"{name}{number}".encode(), "path": None} for number in range(len(labels))]
        parquet.write_table(pyarrow.table({"image": images, "label": labels}), tmp_path / f"{name}.parquet")
    folder = residual_free.image_folders(str(tmp_path))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}
    assert found == {
        "train/1/train-00000-of-00001-00000.jpg": b"train-00000-of-000010",
        "train/0/train-00000-of-00001-00001.jpg": b"train-00000-of-000011",
        "train/1/train-00000-of-00001-00002.jpg": b"train-00000-of-000012",
        "test/0/test-00000.jpg": b"test0",
    }
    assert residual_free.image_folders(str(tmp_path)) == folder
    assert [path.name for path in (tmp_path / "temporary").iterdir()] == [folder.name]


def test_a_script_that_refuses_is_a_failed_part(residual_free, monkeypatch):
    monkeypatch.setattr(residual_free, "WIDTH", ["--hidden_size", "0"])
    monkeypatch.setattr(residual_free, "TINY_WIDTH", ["--hidden_size", "0"])
    with pytest.raises(RuntimeError, match="train_image_classification"):
        residual_free.train(residual_free.Options("cpu", True), 2, 5, (), 0)


# --- correctness -----------------------------------------------------------------------------------------------------


def test_waits_are_counted_as_torch_tells_of_them(correctness, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at here.)", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)

    assert correctness.host_waits(work) == 3
    assert modes == ["warn", "default"]


@pytest.mark.parametrize("granularity", ["projection", "head"])
def test_the_reference_by_hand(correctness, granularity):
    layout = ProjectionLayout(("query", "key"), (2, 2), (1, 1), groups=2)  # rows: q0, k0, q1, k1
    spectral = SpectralConfig("identity", {"query": 10.0, "key": 1.0}, ("query", "key"), granularity)
    found = correctness.effective_by_numpy(np.zeros((4, 3)), layout, spectral)
    second = [10, 0, 0] if granularity == "head" else [0, 10, 0]
    np.testing.assert_array_equal(found, [[10, 0, 0], [1, 0, 0], second, [value / 10 for value in second]])
    svd = correctness.effective_by_numpy(
        np.diag([3.0, 2.0]), ProjectionLayout(("query",), (1,), (2,)), SpectralConfig("svd")
    )
    np.testing.assert_allclose(svd, np.diag([6.0, 5.0]))


def test_tolerances(correctness):
    eps = {name: torch.finfo(getattr(torch, name)).eps for name in ("float32", "bfloat16")}
    assert correctness.FLOAT32.tolerance(64) == 9 * eps["float32"]
    assert correctness.BF16.tolerance(64) == 3 * eps["bfloat16"] + 8 * eps["float32"]
    assert correctness.TF32.tolerance(64) == 2 * 2**-10 + 9 * eps["float32"]


def test_the_matmul_precision_is_put_back(correctness):
    before = torch.get_float32_matmul_precision()
    with correctness.TF32.products():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_nan_and_one_wrong_entry_fail(correctness):
    checks = correctness.Checks("section")
    expected = torch.tensor([1.0, 2.0])
    checks.at_most("right", correctness.greatest_difference(torch.tensor([1.0, 2.002]), expected), 2e-3)
    checks.at_most("wrong", correctness.greatest_difference(torch.tensor([1.0, 2.2]), expected), 2e-3)
    checks.at_most("nan", correctness.greatest_difference(torch.tensor([1.0, float("nan")]), expected), 2e-3)
    assert [number["passed"] for number in checks.outcome.numbers] == [True, False, False]
    assert checks.outcome.failures == [
        "wrong: 1.0e-01, where 2.0e-03 is allowed",
        "nan: nan, where 2.0e-03 is allowed",
    ]
    (row,) = correctness.summarized(checks.outcome, lambda check: "all").rows
    assert row == ["nan", "nan", "2.0e-03", "1 of 3"]


@pytest.mark.parametrize("name", ["FLOAT32", "BF16", "FP16_WEIGHTS"])
def test_a_wrong_correction_fails(correctness, name, monkeypatch):
    options = correctness.Options("cpu", True)
    right = correctness.projections(getattr(correctness, name), options)
    assert not right.failures
    original = correctness.new_layer

    def wrong(case, spectral, precision, device):
        layer = original(case, spectral, precision, device)
        if spectral.method == "identity":
            layer.spectral = dataclasses.replace(spectral, lambda_=11.0)
        else:
            layer.correction.mul_(0.9)
        return layer

    monkeypatch.setattr(correctness, "new_layer", wrong)
    failures = correctness.projections(getattr(correctness, name), options).failures
    outputs = [failure for failure in failures if ": output" in failure]
    assert len(outputs) == 20  # every layout, method and granularity


def test_a_lost_diagonal_fails(correctness, monkeypatch):
    options = correctness.Options("cpu", True)
    assert not correctness.diagonal(options).failures
    original = correctness.new_layer

    def without_diagonal(case, spectral, precision, device):
        layer = original(case, spectral, precision, device)
        kept = layer.weight.detach().clone()
        layer.matrix = lambda: kept  # the reference has it
        with torch.no_grad():
            layer.weight.fill_diagonal_(0)
        return layer

    monkeypatch.setattr(correctness, "new_layer", without_diagonal)
    assert len(correctness.diagonal(options).failures) == 4


def test_an_attention_kernel_that_is_missing_fails_alone(correctness, monkeypatch):
    # torch has the memory-efficient kernel for GPUs only, so that forcing it here is an error.
    monkeypatch.setattr(
        correctness,
        "BACKENDS",
        {"flash": correctness.SDPBackend.EFFICIENT_ATTENTION, "math": correctness.SDPBackend.MATH},
    )
    options = correctness.Options("cpu", True)
    monkeypatch.setattr(correctness, "ON_GPUS_ONLY", ())
    outcome = correctness.attention_kernels(options)
    assert len(outcome.failures) == 4
    assert all(", flash: RuntimeError: No viable backend" in failure for failure in outcome.failures)
    assert sum(number["passed"] for number in outcome.numbers) == 8  # logits and gradients by "math"


# --- everything ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_item_runs_on_tiny_models(gpu, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("peft")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--minutes", "9"]
    command += ["--results", str(tmp_path), "--earlier", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stdout + log
    entries = json.loads((tmp_path / "gpu.json").read_text())["entries"]
    assert [entry["item"] for entry in entries] == [item.name for item in gpu.ITEMS]
    assert {entry["state"] for entry in entries} == {"done"}, log
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for missing in (
        "TF32 is a format of NVIDIA's GPUs",
        "torch has this kernel for GPUs only",
        "no profiler of kernels",
    ):
        assert f"{missing}" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert str(tmp_path) not in page + json.dumps(entries)
    started = time.monotonic()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert again.returncode == 0
    assert again.stdout.count("done before, with the same sources on the same card") == len(gpu.ITEMS)
    assert time.monotonic() - started < 60
