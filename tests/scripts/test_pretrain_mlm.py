import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from models import ARCHITECTURES
from scripts_loading import REPOSITORY, load_script
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, pipeline

from hf_specattn.checkpoints.evaluations_file import read_evaluations
from recipes.run import loop, runs
from recipes.run.batching import BatchOrder
from recipes.text.mlm_data import MlmDataSettings, prepare_mlm_data
from recipes.text.pretrain_task import MaskingRule, MlmTask, evaluate_mlm

SCRIPT = REPOSITORY / "scripts" / "pretrain_mlm.py"

MODEL = ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--intermediate_size", "32"]
LENGTH = ["--vocab_size", "100", "--max_seq_length", "16"]
STEPS = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--eval_steps", "3"]
SVD = ["--spectral_conditioning", "--spectral_method", "svd"]
DYNAMIC = [*SVD, "--spectral_refresh_every", "2"]
IDENTITY = ["--spectral_conditioning", "--lambda_", "1.0"]


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = ["the", "model", "reads", "some", "words", "and", "predicts", "those", "that", "a", "mask", "hides", "it"]
    choose = random.Random(0)
    documents = [" ".join(choose.choices(words, k=choose.randint(5, 60))) for _ in range(80)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n\n".join(documents))
    return str(path)


@pytest.fixture
def pretrain(script, corpus, tmp_path):
    """A function: run the script in this process with a tiny model; returns the folder it wrote."""

    def run(
        *flags: str, name: str = "run", new_model: bool = True, corpus_flags: Sequence[str] = ("--train_file", corpus)
    ) -> pathlib.Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / name
        model = [*MODEL, "--vocab_size", "100"] if new_model else []
        script.main([*corpus_flags, "--max_seq_length", "16", *STEPS, "--output_dir", str(folder), *model, *flags])
        return folder

    return run


def metrics_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def losses_of(folder: pathlib.Path) -> list[float]:
    return [record["train_loss"] for record in metrics_of(folder)["history"]]


def weights_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return AutoModelForMaskedLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("flags", "model_type"),
    [
        ([], "crammed_bert"),
        (SVD, "specattn_crammed_bert"),
        (DYNAMIC, "specattn_crammed_bert"),
        (IDENTITY, "specattn_crammed_bert"),
    ],
    ids=["stock", "svd", "dynamic", "identity"],
)
def test_what_is_saved_has_the_logged_validation_loss(pretrain, script, corpus, capsys, flags, model_type):
    folder = pretrain(*flags)
    metrics = metrics_of(folder)
    logged = metrics["final"]["validation_loss"]
    model = AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == model_type == metrics["facts"]["model_type"]
    settings = MlmDataSettings([corpus], tokenizer_name=str(folder), max_seq_length=16)
    data = prepare_mlm_data(settings, training_sequences=0)
    rule = MaskingRule(tokenizer.mask_token_id, len(tokenizer))
    assert evaluate_mlm(model, data.validation, rule, batch_size=7).loss == pytest.approx(logged, rel=1e-6)

    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(["--eval_only", "--model_name_or_path", str(folder)])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed["validation_loss"] == pytest.approx(logged, rel=1e-7)


def test_the_record_is_complete(pretrain):
    folder = pretrain("--gradient_accumulation_steps", "2", *IDENTITY)
    metrics = metrics_of(folder)
    assert [record["step"] for record in metrics["history"]] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in metrics["validation"]] == [3, 6]
    rates = [record["learning_rate"] for record in metrics["history"]]
    assert rates == pytest.approx([1e-3 * factor / 6 for factor in (6, 5, 4, 3, 2, 1)])  # 6 // 10 steps of warmup
    timing = {"seconds": metrics["final"]["seconds"]}
    assert metrics["final"] == metrics["validation"][-1] | {"train_tokens_seen": 6 * 8 * 16} | timing
    assert [record["train_tokens_seen"] for record in metrics["history"]] == [step * 8 * 16 for step in range(1, 7)]
    sequences = metrics["facts"]["train_sequences"]
    assert [record["epoch"] for record in metrics["history"]] == [
        round(step * 8 / sequences, 4) for step in range(1, 7)
    ]
    facts = metrics["facts"]
    assert facts["global_batch_size"] == 8
    assert facts["tokens_per_step"] == 8 * 16
    assert facts["train_tokens"] == facts["train_sequences"] * 16
    assert facts["planned_tokens"] == 6 * 8 * 16
    assert facts["epochs"] == round(6 * 8 / facts["train_sequences"], 3)
    perplexity, loss = read_evaluations(folder)
    assert (perplexity.metric_type, perplexity.metric_value) == (
        "perplexity",
        metrics["final"]["validation_perplexity"],
    )
    assert (loss.metric_type, loss.metric_value) == ("loss", metrics["final"]["validation_loss"])
    assert (loss.task_type, loss.dataset_type, loss.dataset_split) == ("fill-mask", facts["corpus"], "validation")
    assert metrics["arguments"]["lambda_"] == "1.0"
    assert metrics["arguments"]["seed"] == 0
    assert (folder / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert facts["parameters"] == AutoModelForMaskedLM.from_pretrained(folder).num_parameters()


def test_training_lowers_the_loss(pretrain):
    losses = losses_of(pretrain("--max_steps", "60", "--learning_rate", "1e-2"))
    assert losses[0] > 4
    assert sum(losses[-10:]) / 10 < losses[0] - 1


def test_the_saved_config_has_the_dropout_of_fine_tuning_and_training_had_none(pretrain, monkeypatch):
    seen = []
    original = runs.train

    def spy(task, training, *rest):
        config = training.model.config
        seen.append((config.hidden_dropout_prob, config.attention_probs_dropout_prob))
        seen.append({module.p for module in training.model.modules() if isinstance(module, torch.nn.Dropout)})
        return original(task, training, *rest)

    monkeypatch.setattr(runs, "train", spy)
    folder = pretrain()
    assert seen == [(0.0, 0.0), {0.0}]
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == (0.1, 0.1)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(pretrain):
    first, second = weights_of(pretrain(*DYNAMIC, name="a")), weights_of(pretrain(*DYNAMIC, name="b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights_of(pretrain(*DYNAMIC, "--seed", "1", name="c"))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_stock_and_conditioned_runs_start_from_the_same_weights_and_see_the_same_batches(
    pretrain, script, monkeypatch
):
    starts, batches = [], []
    build, apply = script.build_model, MaskingRule.apply

    def spy_on_start(*args):
        model = build(*args)
        starts.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        batches.append([])
        return model

    def spy_on_batches(self, *args, **kwargs):
        batch = apply(self, *args, **kwargs)
        if batches:
            batches[-1].append(batch)
        return batch

    monkeypatch.setattr(script, "build_model", spy_on_start)
    monkeypatch.setattr(MaskingRule, "apply", spy_on_batches)
    losses = [losses_of(pretrain(*flags, name=name)) for name, flags in (("a", []), ("b", SVD), ("c", IDENTITY))]
    for other in (1, 2):
        assert starts[other].keys() == starts[0].keys()
        assert all(torch.equal(starts[other][name], starts[0][name]) for name in starts[0])
        assert len(batches[other]) == len(batches[0]) > 6
        for left, right in zip(batches[other], batches[0]):
            assert torch.equal(left.input_ids, right.input_ids)
            assert torch.equal(left.labels, right.labels)
        assert losses[other] != losses[0]


def test_accumulation_equals_one_larger_batch(pretrain):
    whole = pretrain("--per_device_train_batch_size", "8", *SVD, name="whole")
    parts = pretrain("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", *SVD, name="parts")
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-5)


def test_dynamic_corrections_belong_to_the_last_refresh(pretrain):
    def mismatch(folder):
        weights = weights_of(folder)
        name = next(name for name in weights if name.endswith("query.weight"))
        left, values, right = torch.linalg.svd(weights[name].double(), full_matrices=False)
        expected = values[0] * left @ right
        stored = weights[name.replace("query.weight", "query.correction")]
        return ((stored - expected).norm() / expected.norm()).item()

    assert mismatch(pretrain(*DYNAMIC, "--learning_rate", "1e-2", name="even")) < 1e-4
    assert mismatch(pretrain(*DYNAMIC, "--learning_rate", "1e-2", "--max_steps", "5", name="odd")) > 1e-3
    assert mismatch(pretrain(*SVD, "--learning_rate", "1e-2", name="static")) > 1e-2


def test_refreshing_by_products_trains_as_by_the_svd(pretrain):
    moving = ["--spectral_refresh_every", "1", "--learning_rate", "1e-2"]
    runs = {
        value: pretrain(*SVD, *moving, "--spectral_exact_refresh", value, name=value) for value in ("True", "False")
    }
    assert losses_of(runs["False"]) == pytest.approx(losses_of(runs["True"]), rel=1e-3)
    assert losses_of(runs["False"]) != losses_of(runs["True"])  # they differ in rounding, so the flag arrived
    assert metrics_of(runs["False"])["arguments"]["spectral_exact_refresh"] is False
    (runs["True"] / "metrics.json").unlink()  # as if it had been stopped
    other = ["--spectral_exact_refresh", "False", "--resume_from_checkpoint"]
    with pytest.raises(SystemExit, match="spectral_exact_refresh"):
        pretrain(*SVD, *moving, *other, name="True")


def test_the_projections_begin_as_the_flags_say(pretrain, script, monkeypatch):
    started = {}

    def spy(model, *rest):
        initialize(model, *rest)
        started.update({name: value.clone() for name, value in model.state_dict().items()})

    initialize = script.initialize_projections
    monkeypatch.setattr(script, "initialize_projections", spy)
    stock, conditioned = (
        pretrain(*flags, name=str(len(flags))) for flags in ([], ["--projection_init", "conditioned"])
    )
    value = started["crammed_bert.layers.0.attention.value.weight"]
    assert torch.equal(value, torch.eye(*value.shape))
    assert losses_of(conditioned) != losses_of(stock)
    assert metrics_of(conditioned)["arguments"]["projection_init"] == "conditioned"
    (conditioned / "metrics.json").unlink()  # as if it had been stopped
    with pytest.raises(SystemExit, match=r'projection_init: "conditioned" -> "\(not recorded\)"'):
        pretrain("--resume_from_checkpoint", name=conditioned.name)
    with pytest.raises(SystemExit, match=r'initialization_scale: "1" -> "2"'):
        pretrain(
            "--projection_init", "conditioned", "--initialization_scale", "2", "--resume_from_checkpoint",
            name=conditioned.name,
        )  # fmt: skip


def test_a_checkpoint_is_continued(pretrain):
    first = pretrain(*SVD, name="first")
    more = ["--model_name_or_path", str(first), "--learning_rate", "1e-12"]
    second = pretrain(*more, name="second", new_model=False)
    before, after = metrics_of(first)["final"], metrics_of(second)["final"]
    assert after["validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-5)
    config = json.loads((second / "config.json").read_text())
    assert (config["model_type"], config["hidden_dropout_prob"]) == ("specattn_crammed_bert", 0.1)


def test_a_stock_checkpoint_is_conditioned_while_loading(pretrain):
    first = pretrain(name="first")
    flags = [*IDENTITY, "--spectral_init", "preserve", "--learning_rate", "1e-12", "--weight_decay", "0"]
    second = pretrain("--model_name_or_path", str(first), *flags, name="second", new_model=False)
    before, after = metrics_of(first)["final"], metrics_of(second)["final"]
    assert metrics_of(second)["facts"]["model_type"] == "specattn_crammed_bert"
    assert after["validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-5)


def test_the_lambda_that_is_found_is_that_of_the_checkpoint_it_goes_on_from(pretrain):
    first = pretrain("--spectral_conditioning", "--max_steps", "1", name="first")
    found = metrics_of(first)["arguments"]["found_lambda"]
    assert json.loads((first / "config.json").read_text())["lambda_"] == found
    flags = ["--spectral_conditioning", "--lambda_", "auto", "--max_steps", "1"]
    second = pretrain("--model_name_or_path", str(first), *flags, name="second", new_model=False)
    assert metrics_of(second)["arguments"]["found_lambda"] == found
    assert json.loads((second / "config.json").read_text())["lambda_"] == found


def test_other_architectures_train_too(pretrain, tmp_path):
    first = pretrain(name="tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(first)
    config = ARCHITECTURES["bert"].config(vocab_size=len(tokenizer))
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    folder = pretrain("--model_name_or_path", str(tmp_path / "bert"), *SVD, name="second", new_model=False)
    assert metrics_of(folder)["facts"]["model_type"] == "specattn_bert"
    fill = pipeline("fill-mask", model=str(folder))
    assert len(fill("the model [MASK] words")) == 5


def test_bf16_trains_and_the_saved_float32_model_has_the_logged_loss(pretrain):
    folder = pretrain("--mixed_precision", "bf16", *IDENTITY)
    metrics = metrics_of(folder)
    assert metrics["facts"]["mixed_precision"] == "bf16"
    assert {weight.dtype for weight in weights_of(folder).values()} == {torch.float32}
    reference = pretrain("--mixed_precision", "no", *IDENTITY, name="reference")
    assert losses_of(folder) == pytest.approx(losses_of(reference), rel=0.02)
    assert losses_of(folder) != losses_of(reference)


# --- budgets, ramp, corpora -------------------------------------------------------------------------------------------


@pytest.fixture
def ten_seconds_a_step(monkeypatch):
    """Each step takes ten seconds by the clock of the training, in a resumed run, too."""
    clock = {}

    def common_seconds(accelerator, budget, started):
        clock.setdefault(started, round(time.perf_counter() - started, -1))
        clock[started] += 10.0
        return clock[started]

    monkeypatch.setattr(loop, "common_seconds", common_seconds)


RAMPED = ["--gradient_accumulation_steps", "4", "--batch_size_ramp", "0.6", "--per_device_train_batch_size", "2"]


def test_a_budget_of_time_decides_schedule_batch_and_end(pretrain, script, ten_seconds_a_step, caplog, monkeypatch):
    new_arguments = script.PretrainArguments.__post_init__
    # STEPS gives --max_steps, which a budget of time excludes.
    monkeypatch.setattr(
        script.PretrainArguments,
        "__post_init__",
        lambda self: (setattr(self, "max_steps", None), new_arguments(self))[1],
    )
    folder = pretrain("--max_train_hours", str(100 / 3600), *RAMPED)
    metrics = metrics_of(folder)
    history = metrics["history"]
    assert [record["step"] for record in history] == list(range(1, 11))
    shares = [step / 10 for step in range(10)]
    assert [record["learning_rate"] for record in history] == pytest.approx(
        [1e-3 * min(0.25 + share, 4 * (1 - share)) for share in shares]
    )
    batches = [2, 2, 4, 6, 6, 8, 8, 8, 8, 8]
    assert [record["batch_size"] for record in history] == batches
    seen = [16 * sum(batches[: index + 1]) for index in range(10)]
    assert [record["train_tokens_seen"] for record in history] == seen
    assert metrics["final"]["train_tokens_seen"] == seen[-1]
    assert metrics["final"]["seconds"] == 100
    assert metrics["facts"]["planned_tokens"] is None
    assert "hours are" in caplog.text  # the estimate of all tokens


def test_a_ramp_over_steps_reads_each_sequence_once_in_order(pretrain, monkeypatch):
    read, taken, apply, step = [], [], MaskingRule.apply, loop.train_step

    def spy_on_rows(self, sequences, indices, *, seed, epoch):
        if seed == 0:  # validation has a seed of its own
            read.extend(indices.tolist())
        return apply(self, sequences, indices, seed=seed, epoch=epoch)

    def spy_on_steps(task, training, accelerator, batches, micro_steps, *rest):
        taken.append(micro_steps)
        return step(task, training, accelerator, batches, micro_steps, *rest)

    monkeypatch.setattr(MaskingRule, "apply", spy_on_rows)
    monkeypatch.setattr(loop, "train_step", spy_on_steps)
    folder = pretrain("--max_steps", "10", *RAMPED)
    order = BatchOrder(metrics_of(folder)["facts"]["train_sequences"], seed=0)
    assert taken == [1, 1, 2, 3, 3, 4, 4, 4, 4, 4]
    assert read == order.batch(0, 2 * 30).indices.tolist()
    assert metrics_of(folder)["facts"]["planned_tokens"] == 2 * 30 * 16


def test_a_repeated_corpus_is_announced(pretrain, caplog):
    folder = pretrain("--per_device_train_batch_size", "16", "--max_steps", "10")
    sequences = metrics_of(folder)["facts"]["train_sequences"]
    repeated_from = sequences // 16 + 1
    announced = [record.getMessage() for record in caplog.records if "have been read" in record.getMessage()]
    assert len(announced) == 160 // sequences == 1
    assert announced[0].startswith(
        f"step {repeated_from}: the training data ({sequences} sequences) have been read 1 time"
    )
    assert metrics_of(folder)["history"][-1]["epoch"] == round(160 / sequences, 4)


def test_several_files_and_a_dataset_folder_give_the_same_run(pretrain, corpus, tmp_path):
    pytest.importorskip("datasets")
    documents = pathlib.Path(corpus).read_text().split("\n\n\n")
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (data / "train.jsonl").write_text("".join(lines))
    halves = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    halves[0].write_text("".join(lines[:33]))
    halves[1].write_text("".join(lines[33:]))
    held_out = ["--validation_documents", "9"]
    whole = pretrain("--train_file", str(data / "train.jsonl"), *held_out, name="whole")
    several = pretrain("--train_file", *map(str, halves), *held_out, name="several")
    preset = ["--preset", "demo", "--dataset_name", str(data), *held_out]
    runs = [whole, several]
    for name, flags in (("hub", []), ("streamed", ["--streaming"])):
        runs.append(pretrain(*preset, *flags, name=name, corpus_flags=[]))
    assert len({metrics_of(run)["facts"]["validation_fingerprint"] for run in runs}) == 1
    assert losses_of(runs[0]) == losses_of(runs[1]) == losses_of(runs[2]) == losses_of(runs[3])
    assert metrics_of(whole)["facts"]["corpus"].endswith("its first 9 documents held out")


def test_the_published_order_and_cleaning(pretrain, tmp_path, monkeypatch):
    texts = ["Caf\u00e9 " + "word " * (5 + index % 7) + ". " * (index % 5) for index in range(60)]
    path = tmp_path / "periods.txt"
    path.write_text("\n\n\n".join(texts))
    tasks, train = [], runs.train
    monkeypatch.setattr(runs, "train", lambda task, *rest: (tasks.append(task), train(task, *rest))[1])
    flags = ["--normalize_text", "--max_tokens_per_character", "2", "--sequence_order", "published"]
    folder = pretrain("--train_file", str(path), *flags)
    tokenizer, packed = tasks[0].data.tokenizer, tasks[0].data.train
    indices = tasks[0].order.batch(0, len(packed)).indices
    periods = (packed[indices] == tokenizer.convert_tokens_to_ids(".")).sum(axis=1)
    assert periods[0] > periods[-1]
    assert (np.diff(periods.astype(int)) <= 0).all()
    assert "cafe" in tokenizer.decode(packed[indices].flatten())
    assert metrics_of(folder)["arguments"]["sequence_order"] == "published"


def test_the_plan_is_said_before_anything_is_read_or_written(pretrain, caplog, monkeypatch, script):
    monkeypatch.setattr("recipes.text.pretrain_task.prepare_mlm_data", lambda *_, **__: pytest.fail("data were read"))
    folder = pretrain("--show_plan", *SVD, *RAMPED)
    assert not folder.exists()
    assert (
        "Steps: 6 of 32 tokens a step (2 sequences) at first, growing to 128 tokens a step (8 sequences of 16)"
        in caplog.text
    )
    assert "Deviations" not in caplog.text


def test_gradient_checkpointing_changes_no_loss(pretrain):
    expected = losses_of(pretrain(*SVD, name="a"))
    assert losses_of(pretrain(*SVD, "--gradient_checkpointing", name="b")) == pytest.approx(expected, rel=1e-6)


def test_fp16_without_a_gpu_ends_with_one_clear_line(pretrain):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match=r"error: --mixed_precision fp16 needs a GPU"):
        pretrain("--mixed_precision", "fp16")


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(pretrain, monkeypatch):
    expected = losses_of(pretrain(*SVD, name="a"))
    trained, loss = [], MlmTask.loss
    monkeypatch.setattr(MlmTask, "loss", lambda task, *rest: trained.append(task.sparse) or loss(task, *rest))
    folder = pretrain(*SVD, "--torch_compile", name="b")
    assert losses_of(folder) == pytest.approx(expected, rel=1e-4)
    assert len(trained) > 1
    assert all(trained)  # it decodes the masked positions alone, as the eager one does
    assert not any("_orig_mod" in name for name in weights_of(folder))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run_and_names_the_step(pretrain, script, monkeypatch, tmp_path):
    forward, calls = script.CrammedBertForMaskedLM.forward, []

    def breaks_at_the_fourth(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if len(kwargs["input_ids"]) == 4:  # training's; the plan looks at one and two sequences
            calls.append(1)
        if len(calls) == 4:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(script.CrammedBertForMaskedLM, "forward", breaks_at_the_fourth)
    with pytest.raises(SystemExit, match="training loss is nan at step 4"):
        pretrain("--eval_steps", "0")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("max_grad_norm", ["0", "0.5"])
def test_a_non_finite_gradient_stops_the_run_before_the_weights_take_it(pretrain, script, monkeypatch, max_grad_norm):
    """The loss is finite, and one entry of a gradient is not, from the third backward pass on."""
    build_model, passes = script.build_model, []

    def spoiled(gradient):
        passes.append(1)
        if len(passes) < 3:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = float("nan")
        return gradient

    def build_spoiled(*arguments):
        model = build_model(*arguments)
        next(model.parameters()).register_hook(spoiled)
        return model

    monkeypatch.setattr(script, "build_model", build_spoiled)
    with pytest.raises(SystemExit, match="The gradient's norm is nan at step 3"):
        pretrain("--max_grad_norm", max_grad_norm)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (["--max_steps", "-5"], "--max_steps -5 must be at least 1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate nan must be a finite number above 0"),
        (["--learning_rate", "-1"], "--learning_rate"),
        (["--weight_decay", "inf"], "--weight_decay inf"),
        (["--warmup_steps", "10", "--max_steps", "5"], "--warmup_steps 10 must be between 0 and --max_steps 5"),
        (["--mlm_probability", "1.5"], "--mlm_probability 1.5 must be above 0 and at most 1"),
        (["--max_seq_length", "1"], "predicts no token"),
        (["--hidden_size", "30"], "must be a multiple of --num_attention_heads"),
        (["--validation_fraction", "1"], "--validation_fraction 1.0 must be between 0 and 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--save_steps", "-1"], "--save_steps -1 must be at least 0"),
        (["--save_total_limit", "0"], "--save_total_limit 0 must be at least 1"),
        (["--resume_from_checkpoint", "--overwrite_output_dir"], "give one"),
        (["--lambda_", "1.0"], "--lambda_ given without --spectral_conditioning"),
        ([*SVD, "--lambda_", "1.0"], "means nothing to method='svd'"),
        (["--spectral_conditioning", "--lambda_", "big"], "neither a number"),
        (["--spectral_conditioning", "--spectral_method", "qr"], "invalid choice: 'qr'"),
        (["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        (["--report_to", "nothing"], "--report_to nothing: unknown or not installed"),
        (["--eval_only"], "name it with --model_name_or_path"),
        (["--model_name_or_path", "/no/such/folder"], "/no/such/folder"),
        (["--tokenizer_name", "x", "--vocab_size", "100"], "--vocab_size: for a trained tokenizer only"),
        (["--steps", "5"], "--steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(script, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(script, "started", lambda *_: pytest.fail("work started"))
    with pytest.raises((SystemExit, ValueError)) as error:
        script.main(["--output_dir", str(tmp_path / "run"), *flags])
    assert message in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_files_is_refused_unless_told(pretrain, script, monkeypatch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        pretrain()
    assert "is not empty" in capsys.readouterr().err
    folder = pretrain("--overwrite_output_dir")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "config.json").exists()


def test_a_checkpoint_excludes_the_flags_of_a_new_model_and_another_conditioning(pretrain, capsys):
    first = pretrain(*SVD, name="first")
    for flags, message in (
        (["--hidden_size", "256"], "--hidden_size: for a new model only"),
        (IDENTITY, "lambda_"),
        (["--max_seq_length", "64"], "--max_seq_length 64 exceeds the 16 positions"),
    ):
        with pytest.raises(SystemExit):
            pretrain("--model_name_or_path", str(first), *flags, name="second", new_model=False)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", [], r"corpus\.txt is empty"),
        (b"caf\xe9\n", [], r"corpus\.txt is not UTF-8: byte 0xe9 at byte offset 3"),
        (b"one document\n", [], r"corpus\.txt is a single document"),
        (b"some\n\n\nwords\n\n\nonly\n", [], r"corpus\.txt is too short: 4 tokens in 2 documents"),
        (b"a few words\n\n\n" * 12, [], r"corpus\.txt is too short: it has \d+ tokens .* one batch of 4 sequences"),
    ],
    ids=["empty", "undecodable", "single", "short", "below one batch"],
)
def test_bad_corpora_end_with_one_clear_line(pretrain, tmp_path, content, flags, message):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        pretrain("--train_file", str(path), *flags)


def test_evaluation_warns_where_the_data_are_others(pretrain, script, corpus, tmp_path, caplog, capsys):
    folder = pretrain()
    other = tmp_path / "other.txt"
    other.write_text(pathlib.Path(corpus).read_text()[::-1])
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(["--eval_only", "--model_name_or_path", str(folder), "--train_file", str(other)])
    assert any("not the validation data" in record.getMessage() for record in caplog.records)


def test_trackers_get_the_names_of_the_metrics(pretrain):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = pretrain("--report_to", "tensorboard")
    events = EventAccumulator(str(folder / "pretrain_mlm"))
    events.Reload()
    names = {"train_loss", "learning_rate", "tokens_per_second", "validation_loss", "validation_perplexity"}
    assert names <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(losses_of(folder), rel=1e-6)
    assert [event.step for event in events.Scalars("validation_loss")] == [3, 6]


def run_process(command: list[str], folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["DDP", "FSDP2"])
def test_two_processes_equal_one_with_the_same_global_batch(pretrain, corpus, tmp_path, environment):
    long = ["--max_steps", "20", "--gradient_accumulation_steps", "2", *DYNAMIC]
    flags = ["--train_file", corpus, *MODEL, *LENGTH, *STEPS, *long, "--per_device_eval_batch_size", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    result = run_process([*torchrun, *flags, "--output_dir", "two"], tmp_path, ACCELERATE_USE_CPU="1", **environment)
    one = pretrain(*long, "--per_device_train_batch_size", "8", name="one")
    two = tmp_path / "two"
    facts = metrics_of(two)["facts"]
    assert (facts["processes"], facts["distributed_type"]) == (2, "FSDP" if environment else "MULTI_CPU")
    assert ("FSDP2 shards by CrammedBertLayer" in result.stderr) == bool(environment)
    assert len(losses_of(two)) == 20
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    for left, right in zip(metrics_of(two)["validation"], metrics_of(one)["validation"]):
        assert left["validation_loss"] == pytest.approx(right["validation_loss"], rel=1e-5)
    # The corrections, refreshed on both ranks, among them.
    expected = weights_of(one)
    for name, weight in weights_of(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=name)


STOPS = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import pretrain_mlm
from recipes.run import loop
step_of = loop.train_step

def stop_in_between(*arguments):
    if arguments[-2] == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return step_of(*arguments)

loop.train_step = stop_in_between
pretrain_mlm.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed, "set_timeout"), reason="this torch cannot change a timeout")
def test_a_process_that_hangs_ends_the_others(corpus, tmp_path):
    script = tmp_path / "stops.py"
    script.write_text(STOPS.format(scripts=str(SCRIPT.parent)))
    flags = ["--train_file", corpus, *MODEL, *LENGTH, *STEPS, "--ddp_timeout", "3", "--output_dir", "two"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *flags],
            cwd=tmp_path,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode not in (0, None)
    assert "3000" in errors or "imed out" in errors, errors[-2000:]
    assert processes[1].returncode == -9  # it hung until now


@pytest.mark.slow
def test_two_processes_both_end_at_a_bad_corpus(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_process([*torchrun, "--train_file", "empty.txt"], tmp_path, ACCELERATE_USE_CPU="1")
    assert "empty.txt is empty (0 bytes)" in error.value.stderr


@pytest.mark.slow
def test_the_demonstration_runs_through_the_launcher_on_the_embedded_corpus(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT)]
    result = run_process([*launch, "--max_steps", "3", *SVD], tmp_path)
    assert "step 3/3: loss" in result.stderr  # no terminal, so lines instead of a bar
    folder = tmp_path / "runs" / "pretrain_mlm"
    assert metrics_of(folder)["facts"]["parameters"] == 3_675_137
    assert AutoModelForMaskedLM.from_pretrained(folder).config.model_type == "specattn_crammed_bert"


# --- the monitor of attention ---


def test_spectral_monitor_changes_no_weight_and_reaches_trackers(pretrain, monkeypatch, caplog):
    plain = pretrain(*IDENTITY, name="plain")
    logged = {}

    def log(accelerator, values, step=None, **kwargs):
        logged.setdefault(step, {}).update(values)

    monkeypatch.setattr("accelerate.Accelerator.log", log)
    with caplog.at_level("INFO", logger="hf_specattn"):
        seen = pretrain(*IDENTITY, "--spectral_monitor_every", "3", name="seen")
    assert (seen / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    records = json.loads((seen / "spectral_monitor.json").read_text())["records"]
    assert [record["step"] for record in records] == [0, 3, 6]
    assert [step for step in logged if "spectral/kappa_jacobian" in logged[step]] == [0, 3, 6]
    assert all(logged[step]["spectral/grad_norm_query"] > 0 for step in (3, 6))
    assert any("3 measurements took" in record.getMessage() for record in caplog.records)
    assert not (plain / "spectral_monitor.json").exists()


def test_spectral_monitor_refuses_sharded_weights(pretrain, monkeypatch, script):
    monkeypatch.setattr(script, "will_shard", lambda accelerator: True)
    with pytest.raises(SystemExit, match="--spectral_monitor_every needs whole weights"):
        pretrain("--spectral_monitor_every", "3")
