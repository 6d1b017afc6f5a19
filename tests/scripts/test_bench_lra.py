"""bench_lra.py at its tiny scale: its plain model is ours, its steps are the loop's, its counts those by hand. No times."""

import json
import socket

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from lra_support import registered  # noqa: F401
from scripts_loading import REPOSITORY, load_script

from recipes.run import loop

SCRIPT = REPOSITORY / "benchmarks" / "bench_lra.py"
FLAGS = ["--task", "listops", "--preset", "small", "--max_length", "16", "--listops_min_length", "5"]
FLAGS += ["--hidden_size", "8", "--intermediate_size", "8", "--num_landmarks", "4", "--train_samples", "40"]
FLAGS += ["--validation_samples", "10", "--test_samples", "10", "--per_device_train_batch_size", "3", "--disable_tqdm"]

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as for a program that lies there
        patch.syspath_prepend(str(REPOSITORY / "scripts"))  # it adds this itself, and the context takes it back
        return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.lra.lra_data.HF_HOME", str(tmp_path / "home"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def our_loop(bench, tmp_path):
    def build(*flags):
        given = [*FLAGS, "--output_dir", str(tmp_path / "run"), *flags]
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = bench.runs.build_accelerator(bench.script.parse_arguments(given, "")[0])
        return bench.OurLoop(given, accelerator)

    return build


def test_measures_both_loops_and_both_attentions(bench, tmp_path, capsys):
    argv = ["--tiny", "--rounds", "6", "--batch_size", "2", "--lengths", "8", "16", "--num_landmarks", "4"]
    bench.main([*argv, "--attention_batch_size", "3", "--output_dir", str(tmp_path / "results")])
    content = json.loads((tmp_path / "results" / "bench_lra_cpu.json").read_text())
    page = (tmp_path / "results" / "bench_lra_cpu.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert {case: found["examples_per_step"] for case, found in content["loops"].items()} == {
        "small": 32,
        "published": 2,
    }
    for found in content["loops"].values():
        assert found["padded_length"] == 16
        assert list(found["speed_ratios"]) == list(bench.AGAINST)
        seconds = found["seconds"]
        assert {len(values) for values in seconds.values()} == {6}
        for name, other in bench.AGAINST.items():
            expected = sorted(base / own for own, base in zip(seconds[name], seconds[other]))
            ratio = found["speed_ratios"][name]
            assert ratio["median"] == pytest.approx((expected[2] + expected[3]) / 2, rel=0.01)
            assert ratio["interval_95"] == pytest.approx([expected[0], expected[5]], rel=0.01)
        for name in seconds:
            assert sum(line.startswith(f"| {name} |") for line in page.splitlines()) == 2
    assert [result["length"] for result in content["attention"]] == [8, 16]
    for result in content["attention"]:
        assert set(result["memory"]) == set(bench.ATTENTIONS)
        assert page.count(f"| {result['length']} | ") == len(bench.ATTENTIONS) + 1
    for text in (page, json.dumps(content)):
        assert str(tmp_path) not in text
        assert socket.gethostname() not in text


def test_the_plain_model_gives_the_logits_and_gradients_of_ours(bench, our_loop):
    ours = our_loop()
    plain = bench.PlainLoop(ours)
    ids, labels = (torch.from_numpy(part) for part in ours.task.data.train.batch(torch.arange(5).numpy(), 16))
    for model in (ours.model, plain.model):
        model.eval()
        model.zero_grad()
    torch.nn.functional.cross_entropy(plain.model(ids), labels).backward()
    ours.model(input_ids=ids, labels=labels).loss.backward()
    found = dict(plain.model.named_parameters())
    assert set(found) == {name for name, _ in ours.model.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_another_model_is_not_timed(bench, our_loop):
    ours = our_loop("--mean_over_padding", "False")
    with pytest.raises(RuntimeError, match="it is another model"):
        bench.PlainLoop(ours)


def test_our_step_is_the_loops(bench, our_loop, tmp_path):
    """Three steps give the weights of the run that the script makes, and the learning rate follows its schedule."""
    flags = [
        "--max_steps",
        "3",
        "--warmup_steps",
        "2",
        "--eval_steps",
        "0",
        "--save_steps",
        "3",
        "--learning_rate",
        "0.01",
    ]
    ours = our_loop(*flags)
    for _ in range(3):
        ours.step()
    assert ours.tokens == 3 * 16
    weights = {name: value.clone() for name, value in ours.model.state_dict().items()}
    AcceleratorState._reset_state(reset_partial_state=True)
    bench.script.main([*FLAGS, *flags, "--output_dir", str(tmp_path / "whole")])
    trained = type(ours.model).from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in weights.items())
    assert bench.train_step is loop.train_step


def test_memory_is_what_the_backward_pass_needs(bench):
    """Softmax attention by its definition holds and writes matrices of n x n; Nystrom attention and the fused kernel none."""
    device = torch.device("cpu")

    def saved(name, length):
        arguments = bench.BenchLraArguments(tiny=True, attention_batch_size=2, num_landmarks=4, lengths=[length])
        return bench.attention_memory(name, length, arguments, device)

    quadratic = {}
    for name in bench.ATTENTIONS:
        short, middle, long = (saved(name, length) for length in (64, 128, 256))
        # Of a + b n + c n^2 at n, 2 n and 4 n this is 6 c n^2.
        quadratic[name] = {key: (long[key] - 3 * middle[key] + 2 * short[key]) / (6 * 64**2) for key in short}
    assert quadratic["nystrom"] == quadratic["softmax, sdpa"] == {"bytes": 0, "elements_written": 0}
    # 2 examples, 2 layers, 2 heads: the weights in float32; scaling, mask and softmax write, and two backward.
    assert quadratic["softmax, eager"] == {"bytes": 8 * 4, "elements_written": 8 * 5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--lengths", "1024", "100"], "--lengths 100 must be a multiple of the 64 landmarks"),
    ],
)
def test_refuses_bad_arguments(bench, capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
