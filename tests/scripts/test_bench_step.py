"""bench_step.py at its tiny scale: statistics and counts against numbers worked out by hand. Times are never asserted."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch
from scipy import stats
from scripts_loading import REPOSITORY, load_script

from hf_specattn import fold
from hf_specattn.layers import SpectralLayer
from hf_specattn.projections import find_projections

SCRIPT = REPOSITORY / "benchmarks" / "bench_step.py"
TINY = ["--scale", "tiny", "--device", "cpu", "--rounds", "6", "--batch_size", "2"]
TINY += ["--sequence_length", "8", "--image_size", "32"]
WIDTH, FEED_FORWARD, LAYERS, VOCABULARY = 32, 64, 2, 128  # of bert at that scale
BATCH, LENGTH = 2, 8


@pytest.fixture(scope="module")
def bench():
    return load_script(SCRIPT)


@pytest.fixture
def step_of(bench):
    """A function: variant, dtype -> the tiny step of BERT."""
    arguments = bench.BenchArguments(scale="tiny", batch_size=BATCH, sequence_length=LENGTH, device="cpu")
    return lambda variant=bench.STOCK, dtype="fp32": bench.TrainingStep("bert", variant, dtype, "eager", arguments)


# --- the whole script ------------------------------------------------------------------------------------------------


def test_measures_every_combination(bench, tmp_path, capsys):
    bench.main([*TINY, "--dtypes", "fp32", "bf16", "--variants", *bench.VARIANTS, "--output_dir", str(tmp_path)])
    content = json.loads((tmp_path / "bench_step_cpu.json").read_text())
    page = (tmp_path / "bench_step_cpu.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert [(r["model"], r["dtype"], r["mode"]) for r in content["results"]] == [
        (model, dtype, "eager") for model in ("bert", "vit") for dtype in ("fp32", "bf16")
    ]
    assert content["settings"]["rounds"] == 6
    for result in content["results"]:
        assert list(result["variants"]) == [bench.STOCK, bench.CONTROL, *bench.VARIANTS]
        for name, numbers in result["variants"].items():
            assert len(numbers["seconds"]) == 6
            assert (numbers["ratio"] is None) == (name == bench.STOCK)
            assert numbers["kernels"] is None
            row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
            assert row.count("|") == len(bench.COLUMNS) + 1
        stock, control = (result["variants"][name] for name in (bench.STOCK, bench.CONTROL))
        assert all(stock[key] == control[key] for key in ("memory_bytes", "flops", "elements_written"))


@pytest.mark.parametrize(("name", "attentions"), [("deit", 12), ("swin", 24), ("xcit", 24), ("davit", 24)])
def test_the_papers_families_have_their_attention_found(bench, name, attentions):
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = bench.build_model(name, bench.BenchArguments(device="cpu"))
    found = find_projections(model, bench.TIMM_ATTENTION)
    assert len(found) == model.config.num_hidden_layers == attentions
    for item in found:
        assert item.layout.kind == "qkv_blocked"
        assert item.layout.out_features == item.module.weight.shape[0] == 3 * item.module.weight.shape[1]
    assert 80e6 < model.num_parameters() < 90e6


@pytest.mark.slow
def test_a_model_of_timm_is_conditioned_whole_and_trains(bench):
    pytest.importorskip("timm")
    arguments = bench.BenchArguments(scale="tiny", batch_size=1, device="cpu")
    step = bench.TrainingStep("deit", "svd", "fp32", "eager", arguments)
    layers = [module for module in step.model.modules() if isinstance(module, SpectralLayer)]
    assert len(layers) == 12
    for layer in layers:
        parts = layer.layout.split(layer.effective_weight().detach())
        assert list(parts) == ["query", "key", "value"]
        assert all(torch.linalg.cond(part.double()) <= 2 + 1e-4 for part in parts.values())
    assert step() > 0
    assert all(parameter.grad is not None for parameter in step.model.parameters())
    bench.check_fold(step.model, bench.build_model("deit", arguments))


def test_results_name_no_machine_and_no_path(bench, tmp_path):
    bench.main([*TINY, "--models", "vit", "--variants", "identity", "--output_dir", str(tmp_path)])
    for file in tmp_path.iterdir():
        text = file.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert str(SCRIPT.parents[1]) not in text
        assert socket.gethostname() not in text


def test_runs_as_a_program_without_the_training_extras(tmp_path):
    """`datasets` and `evaluate` are absent on some GPU machines."""
    code = (
        "import runpy, sys, warnings; warnings.simplefilter('error', UserWarning);"
        "sys.modules.update(datasets=None, evaluate=None);"
        f"sys.argv = {[str(SCRIPT), *TINY, '--models', 'bert', '--rounds', '1', '--output_dir', str(tmp_path)]!r};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "too few rounds" in process.stdout
    assert "arning" not in process.stderr


@pytest.mark.slow
def test_lists_the_kernels_of_a_compiled_step(bench, tmp_path):
    bench.main([*TINY, "--models", "bert", "--modes", "compile", "--output_dir", str(tmp_path)])
    variants = json.loads((tmp_path / "bench_step_cpu.json").read_text())["results"][0]["variants"]
    stock = variants[bench.STOCK]["kernels"]
    # Six linear layers a block and two in the head; one product forward, two backward.
    products = sum(calls for name, calls in stock.items() if name.startswith("extern_kernels."))
    assert products == 3 * (6 * LAYERS + 2)
    assert variants[bench.CONTROL]["kernels"] == stock
    assert variants["svd"]["kernels"] != stock


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--refresh_every", "0"], "--refresh_every 0 must be at least 1"),
        (["--num_hidden_layers", "0"], "--num_hidden_layers 0 must be at least 1"),
        (["--sequence_length", "513"], "--sequence_length 513 exceeds the 512 positions"),
        (["--image_size", "40"], "--image_size 40 must be a multiple of the patch size"),
        (
            ["--models", "deit", "swin", "--num_hidden_layers", "2"],
            "--models deit swin have their own number of layers",
        ),
        (["--variants", "other"], "invalid choice: 'other'"),
    ],
)
def test_refuses_bad_arguments(bench, given, message, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main([*TINY, *given])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_a_device_that_is_not_there(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main([*TINY, "--device", "cuda"])
    assert "--device cuda: torch finds no CUDA device here; use --device cpu." in capsys.readouterr().err


# --- its parts -------------------------------------------------------------------------------------------------------


def test_every_round_has_each_step_once_and_the_next_goes_backwards(bench):
    called = []
    steps = {name: lambda name=name: called.append(name) or float(len(called)) for name in "abc"}
    seconds = bench.time_rounds(steps, 5, seed=0)
    rounds = [called[start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert rounds[1] == rounds[0][::-1]
    assert rounds[3] == rounds[2][::-1]
    assert [seconds["a"][i] for i in range(5)] == [3 * i + order.index("a") + 1 for i, order in enumerate(rounds)]
    called.clear()
    bench.time_rounds(steps, 5, seed=0)
    assert [called[start : start + 3] for start in range(0, 15, 3)] == rounds


def test_ratios_are_paired_within_the_round(bench):
    seconds = {bench.STOCK: [1.0, 2.0, 4.0, 8.0, 16.0], "x": [2.0, 2.0, 2.0, 24.0, 64.0]}
    result = bench.ratios(seconds)
    assert result == {"x": {"median": 2.0, "quartiles": [1.0, 3.0], "interval_95": None}}  # of 0.5, 1, 2, 3, 4
    assert bench.ratios({bench.STOCK: [2.0], "x": [1.0]})["x"]["quartiles"] == [0.5, 0.5]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 12, 30, 101])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_median_interval_covers_as_the_sign_test(bench, count, confidence):
    interval = bench.median_interval([float(i) for i in range(count)][::-1], confidence)
    # The greatest rank k with P(Bin(n, 1/2) < k) <= (1 - confidence) / 2; the values are their ranks, from 0.
    ranks = [k for k in range(1, count // 2 + 1) if stats.binom.cdf(k - 1, count, 0.5) <= (1 - confidence) / 2]
    assert interval == ((max(ranks) - 1, count - max(ranks)) if ranks else None)


def test_median_interval_of_known_cases(bench):
    assert bench.median_interval(range(5)) is None
    assert bench.median_interval(range(6)) == (0, 5)
    assert bench.median_interval(range(12)) == (2, 9)


def test_a_dynamic_step_is_a_step_and_its_share_of_a_refresh(bench, step_of, monkeypatch):
    arguments = bench.BenchArguments(scale="tiny", device="cpu", refresh_every=[1, 4], refresh_rounds=6)
    fixed = {bench.STOCK: [2.0] * 6, "svd": [2.2] * 6, "products": [0.4] * 6, "exact": [4.0] * 6}
    calls = []

    def rounds(parts, count, seed):
        for part in parts.values():
            assert part() > 0
        calls.append(count)
        return fixed

    monkeypatch.setattr(bench, "time_rounds", rounds)
    exacts = []
    monkeypatch.setattr(bench, "refresh", lambda model, exact: exacts.append(exact))
    result = bench.refreshing({bench.STOCK: step_of(), "svd": step_of("svd")}, arguments)
    assert calls == [1, 6]
    assert exacts == [False, True] * 2
    medians = {label: ratio["median"] for label, ratio in result.items() if label != "seconds"}
    assert medians == pytest.approx(
        {
            "svd, refresh_every 1, products": 1.3,
            "svd, refresh_every 4, products": 1.15,
            "svd, refresh_every 1, exact": 3.1,
            "svd, refresh_every 4, exact": 1.6,
        }
    )
    lines = bench.refresh_lines({"refreshing": result})[0].splitlines()
    assert lines[2] == "| svd, refresh_every 1, products | 400.0 | 1.300 | 1.300 to 1.300 |"
    assert bench.refresh_lines({"refreshing": None}) == []


def test_the_ratios_of_the_papers_table_7(bench):
    hours = {  # hrs:mins of stock and of Theorem 3.5
        "ViT-B": ("29:29", "41:38"),
        "DeiT-B": ("26:16", "37:54"),
        "Swin-B": ("53:12", "68:32"),
        "XCiT-M": ("91:03", "109:12"),
        "DaViT": ("75:09", "93:12"),
    }

    def minutes(text):
        return 60 * int(text.split(":")[0]) + int(text.split(":")[1])

    page = " ".join(bench.EXPLANATIONS)
    for name, (stock, svd) in hours.items():
        assert f"{minutes(svd) / minutes(stock):.2f} ({name})" in page


def test_flops_by_hand(bench, step_of):
    """2 m k n for each product: a layer's six linear maps and two attention products, the head's two maps."""
    tokens = BATCH * LENGTH
    linear = LAYERS * (4 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD) + WIDTH**2 + WIDTH * VOCABULARY
    attention = LAYERS * 2 * BATCH * LENGTH**2 * WIDTH
    forward = 2 * (tokens * linear + attention)
    assert bench.count_work(step_of())[0] == 3 * forward  # the backward pass has two products for each


@pytest.mark.parametrize("variant", ["identity", "svd"])
def test_conditioning_adds_elements_and_no_product(bench, step_of, variant):
    flops, elements = bench.count_work(step_of())
    conditioned_flops, conditioned_elements = bench.count_work(step_of(variant))
    assert conditioned_flops == flops
    # For three projections a layer W + C, in the forward and in the backward pass; identity: a copy of W, and its diagonal.
    added = {"identity": 2 * (WIDTH**2 + WIDTH), "svd": 2 * WIDTH**2}[variant]
    assert conditioned_elements - elements == 3 * LAYERS * added


def test_identity_under_autocast_adds_in_place(bench, step_of):
    flops, elements = bench.count_work(step_of(dtype="bf16"))
    conditioned_flops, conditioned_elements = bench.count_work(step_of("identity", "bf16"))
    assert conditioned_flops == flops
    # Each output once more in the forward pass; W + lambda I in half precision for the backward pass.
    assert conditioned_elements - elements == 3 * LAYERS * (BATCH * LENGTH * WIDTH + WIDTH**2 + WIDTH)


@pytest.mark.parametrize(("dtype", "writes"), [("fp32", 1), ("bf16", 3)])
def test_what_a_preconditioner_writes_in_each_direction(bench, step_of, dtype, writes):
    """The heads' output; in half precision it is cast to float32 before, and back after."""
    flops, elements = bench.count_work(step_of(dtype=dtype))
    own_flops, own_elements = bench.count_work(step_of("preconditioned", dtype))
    assert own_flops == flops
    tokens, heads = BATCH * LENGTH, 4
    # The norm of each head's row in float32, its bound by eps, and what divides: four numbers a row.
    assert own_elements - elements == LAYERS * (2 * writes * tokens * WIDTH + 4 * tokens * heads)


def test_variants_that_a_model_cannot_be_are_left_out(bench):
    assert bench.variants_of("bert", ["svd", "preconditioned"]) == ["svd", "preconditioned"]
    assert bench.variants_of("xcit", ["svd", "preconditioned"]) == ["svd"]
    assert bench.variants_of("davit", ["preconditioned"]) == []


def test_copies_that_products_make_are_counted(bench):
    a, b, added = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    assert bench.copied_by_products(lambda: a @ b) == 0
    assert bench.copied_by_products(lambda: torch.addmm(added, a, b)) == 15
    assert bench.copied_by_products(lambda: torch.nn.functional.linear(a, b.t(), added[0])) == 15
    assert bench.copied_by_products(lambda: added.addmm_(a, b)) == 0
    assert bench.copied_by_products(lambda: added.clone()) == 0  # no product: the other counter's


def test_elements_written_leave_out_products_views_and_uninitialized_memory(bench):
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with bench.WrittenElements() as written:
        a @ b
        torch.empty(7)
        a.t()[1:].unsqueeze(0).expand(2, -1, -1)
    assert written.count == 0
    with bench.WrittenElements() as written:
        a + a  # 12
        a.mul_(2)  # 12
        a.sum()  # 1
        torch.eye(3)  # 9
    assert written.count == 34


def test_memory_of_a_step(bench, step_of):
    stock = step_of()
    memory = bench.peak_memory(stock, base=0)
    parameters = sum(parameter.numel() for parameter in stock.model.parameters())
    assert memory > 4 * 4 * parameters  # weights, gradients, two moments
    with_correction = bench.peak_memory(step_of("svd"), base=0)
    assert with_correction - memory == 3 * LAYERS * WIDTH**2 * 4  # the stored C
    assert bench.peak_memory(step_of("identity"), base=0) == memory


def test_bf16_runs_under_autocast(bench, step_of):
    step = step_of("identity", "bf16")
    seen = []
    step.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    step()
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}


def test_a_step_trains_all_parameters_from_the_same_start(bench, step_of):
    first, second = step_of(), step_of("identity")
    assert any(isinstance(module, SpectralLayer) for module in second.model.modules())
    before = {name: value.clone() for name, value in first.model.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in second.model.named_parameters())
    assert all(torch.equal(first.batch[key], second.batch[key]) for key in first.batch)
    assert first() > 0
    assert all(p.grad is not None for p in first.model.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in first.model.named_parameters())


def test_fold_is_checked(bench, step_of):
    stock = step_of().model
    bench.check_fold(step_of("svd").model, stock)
    other = step_of("svd").model
    fold(other)
    with pytest.raises(ValueError, match="found no conditioned projection"):
        bench.check_fold(other, stock)
    broken = step_of("identity").model
    broken.cls.predictions.transform.dense = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r"the modules are not those of stock.*predictions\.transform\.dense"):
        bench.check_fold(broken, stock)


WRAPPER = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], r'''
void kernel() {
        cpp_fused_add_0(1);
}
''')
triton_poi_fused_mul_3 = async_compile.triton('triton_poi_fused_mul_3', '''
def triton_poi_fused_mul_3(in_ptr0):
    tmp0 = tl.load(in_ptr0)
''')
def call(args):
    buf0 = empty_strided_cpu((4, 4), (4, 1), torch.float32)
    # Source Nodes: cpp_fused_add_0(
    cpp_fused_add_0(arg0, buf0)
    triton_poi_fused_mul_3.run(buf0, 16, stream=stream0)
    triton_poi_fused_mul_3.run(buf0, 16, stream=stream0)
        extern_kernels.mm(buf0, arg1, out=buf1)
    buf2 = torch.ops.aten._scaled_dot_product_flash_attention.default(buf1)
    del buf0
"""


def test_kernel_calls_of_a_wrapper(bench):
    wrapper = WRAPPER.replace("        cpp_fused_add_0(1);\n", "")
    assert bench.kernel_calls([wrapper, wrapper]) == {
        "cpp_fused_add": 2,
        "triton_poi_fused_mul": 4,
        "extern_kernels.mm": 2,
        "torch.ops.aten._scaled_dot_product_flash_attention.default": 2,
    }


def test_kernel_lines_show_what_a_variant_changes(bench):
    kernels = {bench.STOCK: {"a": 2, "b": 1}, bench.CONTROL: {"a": 2, "b": 1}, "x": {"a": 1, "c": 3, "b": 1}}
    lines = bench.kernel_lines({name: {"kernels": Counter(calls)} for name, calls in kernels.items()})
    assert [line for line in lines if line] == [
        "Kernel calls of stock: +2 x `a`, +1 x `b`.",
        f"{bench.CONTROL}, against those: no difference.",
        "x, against those: -1 x `a`, +3 x `c`.",
    ]
    assert bench.kernel_lines({bench.STOCK: {"kernels": None}}) == []
