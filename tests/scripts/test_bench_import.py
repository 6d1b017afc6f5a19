"""bench_import.py on a package whose cost is known: what it sleeps and holds is found. No time is asserted from above."""

import json
import sys

import pytest
from scripts_loading import REPOSITORY, load_script

SCRIPT = REPOSITORY / "benchmarks" / "bench_import.py"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as for a program that lies there
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        return load_script(SCRIPT)


def package(root, source):
    folder = root / "hf_specattn"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    (folder / "other.py").write_text("")
    return str(root)


@pytest.mark.slow
def test_finds_what_a_package_costs(bench, tmp_path, capsys):
    heavy = package(tmp_path, "import time\ntime.sleep(0.5)\nheld = b'x' * 80_000_000\nfrom . import other\n")
    flags = ["--package_roots", heavy, "--labels", "heavy", "--rounds", "2", "--command_rounds", "0"]
    bench.main([*flags, "--output_dir", str(tmp_path / "results")])
    content = json.loads((tmp_path / "results" / "import.json").read_text())
    page = (tmp_path / "results" / "import.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert str(tmp_path) not in page + json.dumps(content)
    assert content["commands"] == {}
    assert "## Starting" not in page
    results = content["results"]
    assert list(results) == [bench.BASELINE, bench.CONTROL, "heavy"]
    assert [results[name]["modules_added"] for name in (bench.CONTROL, "heavy")] == [0, 2]
    assert results["heavy"]["seconds_added"]["median"] >= 0.5 > results["heavy"]["processor_seconds_added"]["median"]
    assert 80e6 <= results["heavy"]["resident_bytes_added"]["median"] < 82e6
    assert results[bench.CONTROL]["resident_bytes_added"]["median"] < 2e6
    assert results[bench.CONTROL]["seconds_added"]["median"] < results["heavy"]["seconds_added"]["median"]


def test_differences_are_taken_within_a_round(bench):
    def process(seconds, added):
        same = {"processor_seconds_added": 1.0, "resident_bytes_added": 8, "modules_added": 3}
        return {"seconds": seconds, "seconds_added": added, **same}

    measured = {
        bench.BASELINE: [process(second, 0) for second in (2.0, 3.0, 9.0)],
        "new": [process(second, 0.25) for second in (2.5, 3.25, 10.0)],
    }
    results = bench.summarize(measured)
    assert results["new"]["seconds_over_baseline"] == {
        "median": 0.5, "quartiles": [0.375, 0.75], "interval_95": None,
    }  # fmt: skip
    assert results["new"]["seconds_added"]["median"] == 0.25
    assert results[bench.BASELINE]["seconds"]["median"] == 3.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "1"], "--rounds 1 must be at least 2"),
        (["--command_rounds", "-1"], "--command_rounds -1 must be at least 0"),
        (["--labels", "a", "b"], "--labels a b: give one to each of the 1 --package_roots"),
        (["--labels", "baseline"], "all different, and none 'baseline'"),
        (["--package_roots", "nowhere"], r"--package_roots nowhere has no hf_specattn/__init__.py"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, flags, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("work started"))
    with pytest.raises(SystemExit) as error:
        bench.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_every_script_is_a_command_with_its_aim(bench, tmp_path):
    found = bench.commands(str(tmp_path))
    scripts = {file.name for file in (REPOSITORY / "scripts").glob("*.py")}
    assert {name.partition(" ")[0] for name in found} == scripts | {"specattn"}
    with_plan = {
        file.name for file in (REPOSITORY / "scripts").glob("*.py") if "if arguments.show_plan" in file.read_text()
    }
    assert {name.partition(" ")[0] for name in found if name.endswith("--show_plan")} == with_plan
    assert {name for name, (_, aim) in found.items() if aim == 1.0} == {"specattn --help"}


def test_the_time_of_a_command_is_that_of_the_processors(bench):
    sleeping = bench.processor_seconds([sys.executable, "-S", "-c", "import time; time.sleep(0.6)"])
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    working = bench.processor_seconds([sys.executable, "-S", "-c", busy])
    assert sleeping < 0.6 <= working
    with pytest.raises(RuntimeError, match=r"(?s)failed.*ZeroDivisionError"):
        bench.processor_seconds([sys.executable, "-S", "-c", "1 / 0"])


def test_commands_are_a_table(bench, monkeypatch):
    taken = iter([9.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(bench, "commands", lambda folder: {"a --help": (["a"], 6.0)})
    monkeypatch.setattr(bench, "processor_seconds", lambda command: next(taken))
    found = bench.start_commands(3)  # and one before them
    assert found == {"a --help": {"aim": 6.0, "processor_seconds": [1.0, 2.0, 4.0]}}
    assert "| `a --help` | 2.00 | 1.00 to 4.00 | 6 |" in bench.command_lines(found)


@pytest.mark.slow  # starts processes
def test_a_package_from_elsewhere_is_an_error(bench, tmp_path):
    with pytest.raises(RuntimeError, match="imported None and not"):
        bench.measure("pass", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)failed.*no_such_module"):
        bench.measure("import no_such_module", None)
