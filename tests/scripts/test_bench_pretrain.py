"""bench_pretrain.py on a tiny model: its steps are the script's, its parts make up the whole. Times are never asserted."""

import json
import random

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from scripts_loading import REPOSITORY, load_script

SCRIPT = REPOSITORY / "benchmarks" / "bench_pretrain.py"
FLAGS = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "32"]
FLAGS += ["--vocab_size", "100", "--max_seq_length", "16", "--per_device_train_batch_size", "2", "--max_steps", "9"]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as for a program that lies there
        patch.syspath_prepend(str(REPOSITORY / "scripts"))  # it adds this itself, and the context takes it back
        return load_script(SCRIPT)


@pytest.fixture
def flags(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    words = [f"word{i}" for i in range(60)]
    generator = random.Random(0)
    documents = [" ".join(generator.choices(words, k=200)) for _ in range(30)]
    (tmp_path / "corpus.txt").write_text("\n\n\n".join(documents))
    yield [*FLAGS, "--train_file", str(tmp_path / "corpus.txt"), "--cache_dir", str(tmp_path / "cache")]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_measures_every_variant(bench, flags, tmp_path, capsys):
    bench.main(["--rounds", "2", *flags, "--results_dir", str(tmp_path / "results")])
    content = json.loads((tmp_path / "results" / "bench_pretrain_cpu.json").read_text())
    page = (tmp_path / "results" / "bench_pretrain_cpu.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert list(content["results"]) == list(bench.VARIANTS)
    assert content["rounds"] == 2
    for name, numbers in content["results"].items():
        assert numbers["tokens_per_step"] == 2 * 16
        parts = numbers["parts_seconds"]
        assert list(parts) == [*bench.PARTS, bench.REST]
        # Each of them was met.
        for part in ("data", "to the device", "forward", "backward", "clipping", "optimizer"):
            assert parts[part] > 0, part
        assert (parts["correction"] > 0) == name.startswith("svd")
        assert sum(line.startswith(f"| {name} |") for line in page.splitlines()) == 2


@pytest.mark.parametrize("variant", ["stock", "svd_products"])
def test_a_timed_step_is_the_step_of_the_script(bench, flags, tmp_path, variant):
    """The same weights after the same steps, with and without the clock."""
    trained = []
    for clocked in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = [*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / f"run-{clocked}")]
        given += bench.VARIANTS[variant]
        accelerator = bench.runs.build_accelerator(bench.script.parse_arguments(given, "")[0])
        run = bench.PretrainRun(given, accelerator)
        for group in run.training.optimizer.param_groups:
            group["lr"] = 1e-2
        before = {name: value.clone() for name, value in run.training.model.state_dict().items()}
        clock = bench.Clock(accelerator.device) if clocked else None
        for _ in range(3):
            run.take(clock)
        assert run.position == 3 * 4
        trained.append({name: value.clone() for name, value in run.training.model.state_dict().items()})
        assert any(not torch.equal(value, before[name]) for name, value in trained[-1].items())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_refuses_bad_arguments(bench, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["--rounds", "0"])
    assert exit.value.code == 2
    assert "--rounds 0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        bench.main(["--rounds", "1", "--no_such_flag"])  # it goes to the script, which knows no such flag
    assert exit.value.code == 2
