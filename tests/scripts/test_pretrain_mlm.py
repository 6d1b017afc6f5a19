import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from models import ARCHITECTURES
from scripts_loading import REPOSITORY, load_script
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, pipeline

from hf_specattn.training.evaluation import evaluate_mlm
from hf_specattn.training.masking import MaskingRule
from hf_specattn.training.mlm_data import MlmDataSettings, prepare_mlm_data

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

    def run(*flags: str, name: str = "run", new_model: bool = True) -> pathlib.Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / name
        model = [*MODEL, "--vocab_size", "100"] if new_model else []
        common = ["--train_file", corpus, "--max_seq_length", "16", *STEPS, "--output_dir", str(folder)]
        script.main([*common, *model, *flags])
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
    settings = MlmDataSettings(corpus, tokenizer_name=str(folder), max_seq_length=16)
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
    assert metrics["final"] == metrics["validation"][-1] | {"seconds": metrics["final"]["seconds"]}
    facts = metrics["facts"]
    assert facts["global_batch_size"] == 8
    assert facts["tokens_per_step"] == 8 * 16
    assert facts["train_tokens"] == facts["train_sequences"] * 16
    assert facts["epochs"] == round(6 / (facts["train_sequences"] // 8), 3)
    assert metrics["arguments"]["lambda_"] == "1.0"
    assert metrics["arguments"]["seed"] == 0
    assert (folder / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert facts["parameters"] == AutoModelForMaskedLM.from_pretrained(folder).num_parameters()


def test_training_lowers_the_loss(pretrain):
    losses = losses_of(pretrain("--max_steps", "60", "--learning_rate", "1e-2"))
    assert losses[0] > 4
    assert sum(losses[-10:]) / 10 < losses[0] - 1


def test_the_saved_config_has_the_dropout_of_fine_tuning_and_training_had_none(pretrain, script, monkeypatch):
    seen = []
    original = script.train

    def spy(arguments, accelerator, model, *rest):
        seen.append((model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob))
        seen.append({module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)})
        return original(arguments, accelerator, model, *rest)

    monkeypatch.setattr(script, "train", spy)
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


def test_a_non_finite_loss_stops_the_run_and_names_the_step(pretrain, script, monkeypatch, tmp_path):
    forward, calls = script.CrammedBertForMaskedLM.forward, []

    def breaks_at_the_fourth(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
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
        (["--warmup_steps", "10", "--max_steps", "5"], "--warmup_steps 10 must lie between 0 and --max_steps 5"),
        (["--mlm_probability", "1.5"], "--mlm_probability 1.5 must be above 0 and at most 1"),
        (["--max_seq_length", "1"], "predicts no token"),
        (["--hidden_size", "30"], "must be a multiple of --num_attention_heads"),
        (["--validation_fraction", "1"], "--validation_fraction 1.0 must lie between 0 and 1"),
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
    monkeypatch.setattr(script, "build_accelerator", lambda *_: pytest.fail("work started"))
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
        (b"some\n\n\nwords\n\n\nonly\n", [], r"corpus\.txt is too short: it has 0 tokens .* one batch of 4 sequences"),
    ],
    ids=["empty", "undecodable", "single", "short"],
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


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(pretrain, corpus, tmp_path):
    flags = ["--train_file", corpus, *MODEL, *LENGTH, *STEPS, *DYNAMIC, "--per_device_eval_batch_size", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    run_process([*torchrun, *flags, "--output_dir", "two"], tmp_path, ACCELERATE_USE_CPU="1")
    one = pretrain(*DYNAMIC, "--per_device_train_batch_size", "8", name="one")
    two = tmp_path / "two"
    assert metrics_of(two)["facts"]["processes"] == 2
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    for left, right in zip(metrics_of(two)["validation"], metrics_of(one)["validation"]):
        assert left["validation_loss"] == pytest.approx(right["validation_loss"], rel=1e-5)


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
