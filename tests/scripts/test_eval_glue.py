"""The script on tiny models and small copies of GLUE's files: its numbers, its records, and everything that it refuses."""

import errno
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import glue_files
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from scripts_loading import load_script
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    get_cosine_schedule_with_warmup,
    pipeline,
)

from hf_specattn import CrammedBertConfig, CrammedBertForMaskedLM, SpectralConfig, condition
from hf_specattn.checkpoints.evaluations_file import read_evaluations
from hf_specattn.files import FolderLock
from hf_specattn.layers import spectral_layers
from recipes.glue import fine_tuning, glue_results
from recipes.glue.fine_tuning import FineTuner
from recipes.glue.glue_batches import epoch_batches
from recipes.glue.glue_report import picture
from recipes.glue.glue_results import Results
from recipes.glue.glue_scores import score
from recipes.glue.tasks import COLUMNS, TASKS
from recipes.text.documents import Document
from recipes.text.tokenization import train_wordpiece

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "eval_glue.py"

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TRAIN, DEV, TEST = 22, 11, 7
SHORT = ["--num_train_epochs", "1", "--train_batch_size", "8", "--max_seq_length", "16", "--learning_rate", "1e-3"]
SVD = ["--spectral_conditioning", "--spectral_method", "svd"]
PRESERVE = ["--spectral_conditioning", "--lambda_", "2.0", "--spectral_init", "preserve"]


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    glue_files.write_all(folder, counts=(TRAIN, DEV, TEST))
    return folder


@pytest.fixture(scope="module")
def tokenizer(data):
    text = "\n".join(path.read_text() for path in sorted(data.glob("*/*.tsv")))
    return train_wordpiece([Document("glue", text)], 400)


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Folders by name: a stock BERT, a stock Crammed BERT, and the latter conditioned, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SIZES))
    crammed = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SIZES))
    bert.save_pretrained(folder / "bert")
    crammed.save_pretrained(folder / "crammed")
    condition(crammed, SpectralConfig("svd"))
    crammed.save_pretrained(folder / "svd")
    for child in folder.iterdir():
        tokenizer.save_pretrained(child)
    return folder


@pytest.fixture
def evaluate(script, checkpoints, data, tmp_path, monkeypatch):
    """A function: run the script in this process on some checkpoints; returns the folder it wrote, without pictures."""
    monkeypatch.setattr(script, "picture", lambda summary: {})

    def run(names, tasks, *flags, name="run", seeds=1, fails=False):
        AcceleratorState._reset_state(reset_partial_state=True)
        paths = [str(checkpoints / each) for each in names.split()]
        folder = tmp_path / name
        common = [
            "--tasks",
            tasks,
            "--data_dir",
            str(data),
            "--seeds",
            *map(str, range(seeds)),
            "--output_dir",
            str(folder),
        ]
        command = ["--model_name_or_path", *paths, *common, *SHORT, *flags]
        if fails:
            with pytest.raises(SystemExit) as ended:
                script.main(command)
            assert ended.value.code == 1
        else:
            script.main(command)
        return folder

    return run


def runs_of(folder):
    return {record.key: record for record in Results(folder).read()}


def only_run_of(folder):
    (record,) = runs_of(folder).values()
    return record


# ------------------------------------------------------------------------------------------------------ the whole thing


def test_the_whole_benchmark(evaluate, script, monkeypatch, capsys):
    monkeypatch.setattr(script, "picture", picture)
    folder = evaluate("svd", "all")
    records = runs_of(folder)
    assert set(records) == {("svd", task, 0) for task in TASKS}
    for (_, name, _), record in records.items():
        task = TASKS[name]
        assert record.status == "finished"
        assert set(record.scores) == {split.name for split in task.splits_of("validation")}
        assert all(set(found) == set(task.metrics) for found in record.scores.values())
        assert record.settings["conditioning"] == "svd()"
        assert (record.settings["protocol"], record.settings["learning_rate"]) == ("crammed", 1e-3)
        assert record.facts["steps"] == 3
        assert record.facts["model_type"] == "specattn_crammed_bert"
        assert record.data["train_examples"] == TRAIN
        assert len(record.epoch_losses) == 1
        assert record.seconds["total"] >= record.seconds["training"] + record.seconds["evaluation"] > 0
        assert record.versions["torch"] == importlib.metadata.version("torch")
    text = (folder / "glue.md").read_text()
    assert text in capsys.readouterr().out
    header = text.splitlines()[0].split(" | ")
    assert header[2:11] == [column.heading for column in COLUMNS]
    assert "(9)" in text
    assert (folder / "glue.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in (folder / "glue.svg").read_bytes()
    assert [path.name for path in folder.glob("evaluations*")] == ["evaluations_glue-svd.json"]
    written = read_evaluations(folder)
    assert {(item.dataset_config, item.dataset_split, item.metric_type): item.metric_value for item in written} == {
        (task, split, metric): value
        for (_, task, _), record in records.items()
        for split, scores in record.scores.items()
        for metric, value in scores.items()
    }


class IndependentRun:
    """The protocol again, written with transformers and torch alone, for a task of pairs."""

    def __init__(self, checkpoint, task, data, seed, epochs=2, batch=8, rate=1e-3):
        self.task, self.seed = task, seed
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=task.num_outputs, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        train, labels = self.read(data / task.title / "train.tsv")
        lengths = np.array([len(ids) for ids in self.encode(train)["input_ids"]])
        steps = epochs * -(-len(train) // batch)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        self.losses = []
        for epoch in range(epochs):
            for indices in epoch_batches(lengths, batch, seed=seed, epoch=epoch):
                inputs = self.tokenizer.pad(self.encode([train[index] for index in indices]), return_tensors="pt")
                logits = self.model(**inputs).logits
                if task.is_regression:
                    loss = ((logits[:, 0] - torch.tensor(labels[indices]).float()) ** 2).mean()
                else:
                    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[indices]))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                self.losses.append((loss.item(), len(indices)))

    def read(self, path):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n")[1:-1]]
        columns = glue_files.columns_of(self.task.title, test=False)
        label, first, second = (
            columns.index(name) for name in (self.task.tsv_label_column, *self.task.tsv_text_columns)
        )
        spelled = [line[label] for line in lines]
        labels = [float(text) if self.task.is_regression else self.task.labels.index(text) for text in spelled]
        return [(line[first], line[second]) for line in lines], np.array(labels)

    def encode(self, pairs):
        return self.tokenizer(*map(list, zip(*pairs)), truncation=True, max_length=16)

    @torch.no_grad()
    def score(self, path):
        self.model.eval()
        texts, labels = self.read(path)
        rows = [self.model(**self.tokenizer.pad(self.encode([pair]), return_tensors="pt")).logits[0] for pair in texts]
        logits = torch.stack(rows).numpy()
        return score(self.task, logits[:, 0] if self.task.is_regression else logits.argmax(1), labels)


@pytest.mark.parametrize("name", ["mrpc", "stsb", "mnli"])
def test_losses_and_scores_as_by_an_independent_loop(evaluate, checkpoints, data, name):
    folder = evaluate("bert", name, "--dropout", "0", "--num_train_epochs", "2", seeds=2)
    record = runs_of(folder)["bert", name, 1]
    task = TASKS[name]
    expected = IndependentRun(checkpoints / "bert", task, data, seed=1)
    assert record.first_loss == pytest.approx(expected.losses[0][0], rel=1e-5)
    epochs = np.array(expected.losses).reshape(2, -1, 2)
    assert record.epoch_losses == pytest.approx(
        [np.average(each[:, 0], weights=each[:, 1]) for each in epochs], rel=1e-4
    )
    for split in task.splits_of("validation"):
        found = expected.score(data / task.title / f"{split.stem}.tsv")
        assert record.scores[split.name] == pytest.approx(found, rel=1e-3, abs=1e-6)


def write_learnable(folder):
    """Labels that a word decides: whether a review is good, and how alike two numbers are."""
    words = ("bad", "good")
    reviews = [((f"a {word} film number {n}",), str(label)) for n in range(40) for label, word in enumerate(words)]
    for stem in ("train", "dev"):
        glue_files.write_split(folder, "SST-2", stem, reviews)
    pairs = [(("one", word), score) for word, score in (("one", "5.0"), ("two", "2.5"), ("ten", "0.0"))] * 20
    for stem in ("train", "dev"):
        glue_files.write_split(folder, "STS-B", stem, pairs)


def test_models_learn(script, checkpoints, tmp_path):
    write_learnable(tmp_path / "data")
    model = ["--model_name_or_path", str(checkpoints / "svd"), "--output_dir", str(tmp_path / "run"), "--seeds", "0"]
    settings = ["--tasks", "sst2,stsb", "--max_seq_length", "32", "--dropout", "0"]
    settings += ["--learning_rate", "1e-2", "--num_train_epochs", "20"]
    script.main([*model, "--data_dir", str(tmp_path / "data"), *settings])
    records = runs_of(tmp_path / "run")
    assert records["svd", "sst2", 0].scores["validation"]["accuracy"] == 1.0
    assert records["svd", "stsb", 0].scores["validation"]["pearson"] > 0.95
    losses = records["svd", "sst2", 0].epoch_losses
    assert losses[-1] < 0.1 < 0.5 < losses[0]


def test_the_protocols_differ_as_they_say(evaluate, monkeypatch):
    seen = []
    original = fine_tuning.train_step

    def spy(accelerator, run, optimizer, batch):
        seen.append((run.tokens["train"].rows([0])["input_ids"][0][-2:], optimizer.param_groups[0], len(batch)))
        return original(accelerator, run, optimizer, batch)

    monkeypatch.setattr(fine_tuning, "train_step", spy)
    evaluate("bert", "cola", name="crammed")
    evaluate("bert", "cola", "--protocol", "bert", name="bert")
    crammed, bert = seen[0], seen[-1]
    assert crammed[0][0] == crammed[0][1]  # [SEP] [SEP]
    assert bert[0][0] != bert[0][1]
    assert crammed[1]["betas"] == (0.9, 0.98)
    assert bert[1]["betas"] == (0.9, 0.999)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(evaluate):
    first, second = (runs_of(evaluate("svd", "rte", name=name, seeds=2)) for name in ("a", "b"))
    for key, record in first.items():
        assert (second[key].epoch_losses, second[key].scores) == (record.epoch_losses, record.scores)
    assert first["svd", "rte", 0].first_loss != first["svd", "rte", 1].first_loss


def test_length_grouping_and_limits_on_samples(evaluate):
    base = only_run_of(evaluate("bert", "rte"))
    ungrouped = only_run_of(evaluate("bert", "rte", "--no_group_by_length", name="ungrouped"))
    assert ungrouped.epoch_losses != base.epoch_losses
    limited = only_run_of(
        evaluate("bert", "rte", "--max_train_samples", "9", "--max_eval_samples", "5", name="limited")
    )
    sizes = (limited.data["train_examples"], limited.data["validation_examples"], limited.facts["steps"])
    assert sizes == (9, 5, 2)


def test_bf16_trains_too(evaluate):
    flags = ["--dropout", "0", "--mixed_precision"]
    full, half = (only_run_of(evaluate("svd", "rte", *flags, kind, name=kind)) for kind in ("no", "bf16"))
    assert half.settings["mixed_precision"] == "bf16"
    assert half.epoch_losses == pytest.approx(full.epoch_losses, rel=0.05)
    assert half.epoch_losses != full.epoch_losses


def test_tokens_are_made_once_for_all_models_and_runs(evaluate, monkeypatch):
    from recipes.glue import features

    calls = []
    original = features.tokenize
    monkeypatch.setattr(features, "tokenize", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    evaluate("crammed svd", "rte", seeds=2)
    assert len(calls) == 2  # the training and the development set
    evaluate("bert", "rte", "--cache_dir", str(evaluate("crammed svd", "rte", seeds=2) / "cache"), name="other")
    assert len(calls) == 2


def test_a_folder_in_the_layout_of_the_hub(script, checkpoints, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    for split in ("train", "validation"):
        columns = {"sentence": ["good", "bad"] * 6, "label": [1, 0] * 6, "idx": list(range(12))}
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["unacceptable", "acceptable"])}
            | {"idx": datasets.Value("int32")}
        )
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "cola" / f"{split}-0.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: cola\n  data_dir: cola\n---\n")
    flags = [
        "--dataset_name",
        str(folder),
        "--tasks",
        "cola",
        "--seeds",
        "0",
        *SHORT,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    script.main(["--model_name_or_path", str(checkpoints / "bert"), *flags])
    assert only_run_of(tmp_path / "run").data["train_examples"] == 12


# ----------------------------------------------------------------------------------------------------------- conditioning


def test_stock_and_preserved_start_equal_and_additive_does_not(evaluate):
    folder = evaluate("bert", "rte,mrpc", "--compare_stock", *PRESERVE, seeds=2)
    records = runs_of(folder)
    preserved = "bert, identity, lambda 2, preserve"
    for task in ("rte", "mrpc"):
        for seed in (0, 1):
            stock, kept = records["bert", task, seed], records[preserved, task, seed]
            assert kept.first_loss == pytest.approx(stock.first_loss, rel=1e-6)
            assert (stock.settings["conditioning"], stock.facts["model_type"]) == (None, "bert")
            assert kept.settings["conditioning"] == "identity, lambda 2, preserve"
            assert kept.facts["model_type"] == "specattn_bert"
    assert "the two differ only by rounding" in (folder / "glue.md").read_text()

    # Without its counterpart in the same command it comes into the same table.
    evaluate("bert", "rte,mrpc", *SVD, seeds=2)
    additive = runs_of(folder)["bert, svd", "rte", 0]
    assert additive.first_loss != pytest.approx(records["bert", "rte", 0].first_loss, rel=1e-6)
    assert "bert, svd minus bert" in (folder / "glue.md").read_text()
    assert "| bert, identity, lambda 2, preserve minus bert |" in (folder / "glue.md").read_text()


def test_a_conditioned_checkpoint_keeps_its_conditioning(evaluate, checkpoints):
    folder = evaluate("svd", "rte", "--save_models")
    saved = AutoModelForSequenceClassification.from_pretrained(folder / "models" / "svd" / "rte" / "seed-0")
    before = AutoModel.from_pretrained(checkpoints / "svd")
    assert saved.config.model_type == "specattn_crammed_bert"
    pairs = list(zip(spectral_layers(saved), spectral_layers(before)))
    assert len(pairs) == 6
    for (_, now), (_, then) in pairs:
        assert torch.equal(now.correction, then.correction)
        assert not torch.equal(now.weight, then.weight)


def test_dynamic_corrections_follow_the_weights(evaluate):
    folder = evaluate("crammed", "rte", *SVD, "--spectral_refresh_every", "3", "--save_models")  # 3 steps
    saved = AutoModelForSequenceClassification.from_pretrained(folder / only_run_of(folder).outputs[0])
    for _, layer in spectral_layers(saved):
        left, values, right = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        expected = values[0] * left @ right
        assert (layer.correction - expected).norm() / expected.norm() < 1e-5


# ------------------------------------------------------------------------------------------------------------- outputs


def test_a_saved_model_has_the_recorded_score(evaluate, data):
    folder = evaluate("bert", "cola", "--protocol", "bert", "--save_models")
    saved = folder / "models" / "bert" / "cola" / "seed-0"
    classify = pipeline("text-classification", model=str(saved))
    rows = [line.split("\t") for line in (data / "CoLA" / "dev.tsv").read_text().split("\n")[:-1]]
    answers = [answer["label"] for answer in classify([row[3] for row in rows])]
    assert set(answers) <= {"unacceptable", "acceptable"}
    predictions = [int(answer == "acceptable") for answer in answers]
    expected = score(TASKS["cola"], predictions, [int(row[1]) for row in rows])
    assert only_run_of(folder).scores["validation"] == pytest.approx(expected)
    assert set(only_run_of(folder).outputs) == {"models/bert/cola/seed-0"}


def test_test_set_predictions_are_those_of_the_model(evaluate, data):
    folder = evaluate("svd", "mnli,stsb,sst2", "--do_predict", "--save_models", seeds=2)
    for title, split, name in (
        ("MNLI-mm", "test_mismatched", "mnli"),
        ("STS-B", "test", "stsb"),
        ("SST-2", "test", "sst2"),
    ):
        task = TASKS[name]
        lines = (folder / "predictions" / "svd" / "seed-1" / f"{title}.tsv").read_text().splitlines()
        saved = folder / "models" / "svd" / name / "seed-1"
        model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
        tokenizer = AutoTokenizer.from_pretrained(saved)
        texts = glue_files.texts_of(task.title, TEST, split)
        pairs = [text if len(text) == 2 else (text[0], "") for text in texts]
        inputs = tokenizer(*map(list, zip(*pairs)), truncation=True, max_length=16, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        expected = [f"{min(5, max(0, value)):.3f}" for value in logits[:, 0].tolist()]
        if task.labels:
            expected = [task.labels[index] for index in logits.argmax(1).tolist()]
        assert lines == ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(expected))]
    assert len(list((folder / "predictions" / "svd" / "seed-0").iterdir())) == 4


def test_outputs_that_are_asked_for_later_are_made(evaluate, monkeypatch):
    folder = evaluate("svd", "rte,cola")
    assert not (folder / "predictions").exists()
    before = runs_of(folder)
    evaluate("svd", "rte", "--do_predict")
    assert (folder / "predictions" / "svd" / "seed-0" / "RTE.tsv").is_file()
    after = runs_of(folder)
    assert after["svd", "rte", 0].scores == before["svd", "rte", 0].scores
    monkeypatch.setattr(FineTuner, "execute", lambda *_: pytest.fail("run again"))
    evaluate("svd", "rte", "--do_predict")


# -------------------------------------------------------------------------------------------------- resuming and adding


def test_finished_runs_are_kept_and_new_ones_added(evaluate, monkeypatch):
    folder = evaluate("crammed", "rte", seeds=1)
    first = (folder / "results.json").read_bytes()
    done = []
    original = FineTuner.execute
    monkeypatch.setattr(FineTuner, "execute", lambda tuner, record: done.append(record.key) or original(tuner, record))
    evaluate("crammed", "rte", seeds=1)
    assert done == []
    assert (folder / "results.json").read_bytes() == first
    evaluate("crammed svd", "rte,cola", seeds=2)
    assert set(done) == {
        (model, task, seed) for model in ("crammed", "svd") for task in ("rte", "cola") for seed in (0, 1)
    } - {("crammed", "rte", 0)}
    assert "svd minus crammed" in (folder / "glue.md").read_text()


def test_a_signal_ends_the_run_and_the_same_command_goes_on(evaluate, monkeypatch, caplog):
    whole = runs_of(evaluate("svd", "rte,cola", name="whole", seeds=2))
    steps = []
    original = fine_tuning.train_step

    def signalled(*args):
        steps.append(1)
        if len(steps) == 5:  # in the middle of the second run
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(fine_tuning, "train_step", signalled)
    folder = evaluate("svd", "rte,cola", seeds=2)
    assert len(steps) == 5
    assert list(runs_of(folder)) == [("svd", "rte", 0)]
    assert (folder / "glue.md").is_file()
    assert any("Stopped by a signal" in record.getMessage() for record in caplog.records)
    evaluate("svd", "rte,cola", seeds=2)
    resumed = runs_of(folder)
    assert set(resumed) == set(whole)
    for key, record in whole.items():
        assert (resumed[key].scores, resumed[key].epoch_losses) == (record.scores, record.epoch_losses)


def refusal(evaluate, *args, **kwargs):
    with pytest.raises(SystemExit) as ended:
        evaluate(*args, **kwargs)
    return str(ended.value)


def test_runs_with_other_settings_do_not_come_into_the_same_table(
    evaluate, checkpoints, data, tmp_path, monkeypatch, script
):
    folder = evaluate("crammed", "rte")
    original = (folder / "results.json").read_bytes()
    message = refusal(evaluate, "crammed", "rte", "--learning_rate", "2e-3", seeds=2)
    assert "crammed: learning_rate was 0.001, and is 0.002" in message
    assert "--overwrite_output_dir" in message
    message = refusal(evaluate, "svd", "rte", "--max_train_samples", "10")
    assert f"RTE: train_examples was {TRAIN}, and is 10" in message
    message = refusal(evaluate, "svd", "rte", "--labels", "crammed")
    assert "crammed: conditioning was None, and is svd()" in message
    assert "crammed: model_fingerprint was" in message
    assert (folder / "results.json").read_bytes() == original
    # another model may be trained in another way, and the table says so
    evaluate("svd", "rte", "--learning_rate", "2e-3")
    assert "learning_rate: 0.001 (crammed), 0.002 (svd)" in (folder / "glue.md").read_text()
    names = ["evaluations_glue-crammed.json", "evaluations_glue-svd.json"]
    assert sorted(path.name for path in folder.glob("evaluations*")) == names
    evaluate("crammed", "rte", "--learning_rate", "2e-3", "--overwrite_output_dir")
    assert [path.name for path in folder.glob("evaluations*")] == names[:1]
    assert only_run_of(folder).settings["learning_rate"] == 2e-3


def test_a_retrained_checkpoint_of_the_same_name_is_another_model(evaluate, checkpoints, tmp_path, script, data):
    model = BertModel.from_pretrained(checkpoints / "bert")
    AutoTokenizer.from_pretrained(checkpoints / "bert").save_pretrained(tmp_path / "mine")
    model.save_pretrained(tmp_path / "mine")
    command = [
        "--model_name_or_path",
        str(tmp_path / "mine"),
        "--tasks",
        "rte",
        "--data_dir",
        str(data),
        "--seeds",
        "0",
    ]
    command += [*SHORT, "--output_dir", str(tmp_path / "run")]
    script.main(command)
    with torch.no_grad():
        model.pooler.dense.bias += 1
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(SystemExit, match="mine: model_fingerprint was"):
        script.main(command)


# --------------------------------------------------------------------------------------------------------------- failures


def test_a_diverging_run_is_a_row_and_the_others_go_on(evaluate, monkeypatch):
    original = fine_tuning.summed_loss

    def spoiled(run, logits, indices):
        loss = original(run, logits, indices)
        return loss * float("nan") if (run.task.name, run.record.seed) == ("cola", 0) else loss

    monkeypatch.setattr(fine_tuning, "summed_loss", spoiled)
    folder = evaluate("svd", "cola,rte", seeds=2, fails=True)
    records = runs_of(folder)
    failed = records["svd", "cola", 0]
    assert (failed.status, failed.failure["kind"], failed.scores) == ("failed", "diverged", {})
    assert "The training loss is nan at step 1." in failed.failure["message"]
    assert sum(record.status == "finished" for record in records.values()) == 3
    text = (folder / "glue.md").read_text()
    assert "| svd | cola | 0 | diverged: The training loss is nan at step 1." in text
    assert "(1 of 2)" in text

    # It stays, unless it is asked for.
    monkeypatch.setattr(fine_tuning, "summed_loss", original)
    evaluate("svd", "cola,rte", seeds=2, fails=True)
    assert runs_of(folder)["svd", "cola", 0].status == "failed"
    evaluate("svd", "cola,rte", "--retry_failed", seeds=2)
    assert runs_of(folder)["svd", "cola", 0].status == "finished"
    assert "diverged" not in (folder / "glue.md").read_text()


def test_the_step_of_a_divergence_is_exact(evaluate):
    """The learning rate is too high; the losses are looked at together, and the first bad one is named."""
    folder = evaluate("bert", "rte", "--learning_rate", "1e8", "--num_train_epochs", "3", fails=True)
    record = only_run_of(folder)
    assert record.failure["kind"] == "diverged"
    step = int(record.failure["message"].partition("at step ")[2].partition(".")[0])
    assert 1 < step <= 4


@pytest.mark.parametrize("where", ["loading", "forward", "optimizer", "evaluation"])
def test_running_out_of_memory_is_a_row_wherever_it_happens(evaluate, monkeypatch, where):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    if where == "loading":
        monkeypatch.setattr(fine_tuning, "load_model", out_of_memory)
    elif where == "forward":
        monkeypatch.setattr(fine_tuning, "summed_loss", out_of_memory)
    elif where == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    else:
        monkeypatch.setattr(fine_tuning, "predictions_from_logits", out_of_memory)
    folder = evaluate("svd", "rte", seeds=2, fails=True)
    assert [record.failure["kind"] for record in runs_of(folder).values()] == ["out of memory"] * 2
    assert "failed (2)" in (folder / "glue.md").read_text()


def test_an_undefined_score_says_why(evaluate, monkeypatch):
    monkeypatch.setattr(fine_tuning, "predictions_from_logits", lambda task, logits: np.full(len(logits), 2.5))
    folder = evaluate("svd", "stsb", fails=True)
    failure = only_run_of(folder).failure
    assert failure["kind"] == "undefined score"
    assert f"STS-B: all {DEV} predictions are 2.5" in failure["message"]
    assert "undefined score: STS-B: all" in (folder / "glue.md").read_text()


# ------------------------------------------------------------------------------------------------------------------ LoRA

LORA = ["--peft", "lora", "--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2"]


@torch.no_grad()
def logits_of(model, tokenizer, task=TASKS["rte"]):
    first, second = map(list, zip(*glue_files.texts_of(task.title, DEV, "dev")))
    inputs = tokenizer(first, second, truncation=True, max_length=16, padding=True, return_tensors="pt")
    return model.eval()(**inputs).logits


def test_lora_trains_adapters_and_the_head_alone(evaluate, monkeypatch):
    pytest.importorskip("peft")
    seen = {}
    original_train = FineTuner._train

    def weights(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def spy(tuner, run):
        before = weights(run.model)
        original_train(tuner, run)
        seen.update({name: not torch.equal(value, before[name]) for name, value in weights(run.model).items()})

    monkeypatch.setattr(FineTuner, "_train", spy)
    record = only_run_of(evaluate("svd", "rte", *LORA))
    changed = {name for name, moved in seen.items() if moved}
    assert changed
    assert all("lora_" in name or ".modules_to_save." in name for name in changed)
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in changed if "lora_" in name}
    assert adapted == {"query", "value"}
    assert any(".dense." in name for name in changed)  # Crammed BERT's head has two layers
    assert any(".classifier." in name for name in changed)
    assert record.settings["lora"] == {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": None}
    assert 0 < record.facts["trainable_parameters"] < record.facts["parameters"]


def test_lora_targets(evaluate):
    pytest.importorskip("peft")
    folder = evaluate("bert", "rte", *LORA, "--lora_targets", "key", "--save_models")
    config = json.loads((folder / "models" / "bert" / "rte" / "seed-0" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (["key"], 4, 8)


@pytest.mark.parametrize(
    ("names", "flags", "label"),
    [("svd", [], "svd"), ("bert", PRESERVE, "bert, identity, lambda 2, preserve"), ("bert", [], "bert")],
    ids=["conditioned checkpoint", "conditioned by flags", "stock"],
)
def test_a_saved_adapter_rebuilds_its_base(evaluate, checkpoints, names, flags, label, warning_log):
    peft = pytest.importorskip("peft")
    folder = evaluate(names, "rte", *LORA, *flags, "--save_models")
    record = runs_of(folder)[label, "rte", 0]
    (saved,) = record.outputs
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder / saved)
    conditioned = [layer for _, layer in spectral_layers(model)]
    assert len(conditioned) == (0 if label == "bert" else 6)
    tokenizer = AutoTokenizer.from_pretrained(folder / saved)
    logits = logits_of(model, tokenizer)
    labels = [TASKS["rte"].labels.index(("not_entailment", "entailment")[number % 2]) for number in range(DEV)]
    assert record.scores["validation"] == score(TASKS["rte"], logits.argmax(1).numpy(), labels)

    model.merge_adapter()
    assert torch.allclose(logits_of(model, tokenizer), logits, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits_of(model, tokenizer), logits, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model, tokenizer), logits, atol=1e-5)
    assert not any("AutoPeftModel cannot rebuild it" in message for message in warning_log.messages)


RELOAD = """
import json, sys
import hf_specattn
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
inputs = AutoTokenizer.from_pretrained(sys.argv[1])(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
with torch.no_grad():
    print(json.dumps([type(model.get_base_model()).__name__, model(**inputs).logits.tolist()]))
"""


@pytest.mark.slow
def test_lora_on_a_pretrained_model_from_training_to_a_plain_bert(script, minilm_path, tmp_path):
    """MiniLM: conditioned, trained with adapters, saved, loaded in another process, merged, folded, saved as a plain BERT."""
    peft = pytest.importorskip("peft")
    from hf_specattn import fold

    write_learnable(tmp_path / "data")
    flags = [
        "--model_name_or_path",
        str(minilm_path),
        "--labels",
        "MiniLM",
        *SVD,
        "--spectral_init",
        "preserve",
        *LORA,
    ]
    flags += ["--tasks", "sst2", "--data_dir", str(tmp_path / "data"), "--seeds", "0", "--save_models"]
    script.main([*flags, "--num_train_epochs", "2", "--max_seq_length", "32", "--output_dir", str(tmp_path / "run")])
    record = only_run_of(tmp_path / "run")
    assert record.scores["validation"]["accuracy"] == 1.0
    saved = tmp_path / "run" / record.outputs[0]

    sentences = ["a good film", "a bad film, and a long one", "neither good nor bad"]
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(saved).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    command = [sys.executable, "-c", RELOAD, str(saved), json.dumps(sentences)]
    name, elsewhere = json.loads(run_process(command, tmp_path).stdout.splitlines()[-1])
    assert name == "SpecBertForSequenceClassification"
    assert torch.equal(torch.tensor(elsewhere), logits)

    plain = model.merge_and_unload()
    fold(plain)
    assert type(plain) is BertForSequenceClassification
    plain.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert not any("spectral" in key for key in config)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert (loaded(**inputs).logits - logits).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------ several processes


def run_process(command, folder, **environment):
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise AssertionError(f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result


def torchrun(script, *flags):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), *flags]


@pytest.mark.slow
def test_two_processes_share_the_runs_and_each_is_what_it_is_on_one(evaluate, checkpoints, data, tmp_path):
    flags = ["--dropout", "0.1", "--train_batch_size", "7", "--per_device_eval_batch_size", "4", "--do_predict"]
    one = evaluate("svd", "mnli,stsb", *flags, name="one", seeds=2)
    command = ["--model_name_or_path", str(checkpoints / "svd"), "--tasks", "mnli,stsb", "--data_dir", str(data)]
    command += ["--seeds", "0", "1", "--output_dir", "two", *SHORT, *flags]
    told = run_process(torchrun(SCRIPT, *command), tmp_path, ACCELERATE_USE_CPU="1")
    assert told.stderr.count("1/2: ") == told.stderr.count("2/2: ") == 2  # each process tells of its own two
    two, expected = runs_of(tmp_path / "two"), runs_of(one)
    assert two.keys() == expected.keys()
    for key, record in expected.items():
        assert (two[key].settings, two[key].scores) == (record.settings, record.scores)
        assert (two[key].first_loss, two[key].epoch_losses) == (record.first_loss, record.epoch_losses)
    for seed in (0, 1):
        for title in ("MNLI-m", "MNLI-mm", "STS-B"):
            file = f"predictions/svd/seed-{seed}/{title}.tsv"
            assert (tmp_path / "two" / file).read_bytes() == (one / file).read_bytes()
    assert (tmp_path / "two" / "glue.md").is_file()


# Runs the script; one process has no room for the run with seed 1, which falls to it.
SABOTAGE = """
import os, sys
sys.path.insert(0, {scripts!r})
import eval_glue
from recipes.glue import fine_tuning

load = fine_tuning.load_model

def load_model(*args):
    if os.environ["RANK"] == "1":
        raise MemoryError("no room")
    return load(*args)

fine_tuning.load_model = load_model
eval_glue.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_fails_on_one_process_disturbs_no_other(checkpoints, data, tmp_path):
    (tmp_path / "sabotage.py").write_text(SABOTAGE.format(scripts=str(SCRIPT.parent)))
    command = ["--model_name_or_path", str(checkpoints / "svd"), "--tasks", "rte", "--data_dir", str(data)]
    command += ["--seeds", "0", "1", "2", "--output_dir", "run", *SHORT]
    with pytest.raises(AssertionError, match="1 runs have failed"):
        run_process(torchrun(tmp_path / "sabotage.py", *command), tmp_path, ACCELERATE_USE_CPU="1")
    records = runs_of(tmp_path / "run")
    assert records["svd", "rte", 1].failure == {"kind": "out of memory", "message": "MemoryError: no room"}
    assert {seed for (_, _, seed), record in records.items() if record.status == "finished"} == {0, 2}
    assert "out of memory" in (tmp_path / "run" / "glue.md").read_text()


@pytest.mark.slow
def test_two_processes_both_end_at_bad_data(checkpoints, tmp_path):
    flags = ["--model_name_or_path", str(checkpoints / "svd"), "--tasks", "rte", "--data_dir", "nowhere", *SHORT]
    command = torchrun(SCRIPT, *flags)
    with pytest.raises(AssertionError, match="--data_dir nowhere is not a folder"):
        run_process(command, tmp_path, ACCELERATE_USE_CPU="1")


# ---------------------------------------------------------------------------------------------------------- few packages

WITHOUT = """
import sys
for name in ("evaluate", "datasets", "matplotlib", "peft", *{without}):
    sys.modules[name] = None
sys.path.insert(0, {scripts!r})
import eval_glue
eval_glue.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_nothing_optional_is_needed(evaluate, checkpoints, data, tmp_path):
    """A GPU machine may have neither `datasets` nor `evaluate`: the scores are the same without."""
    # What computes them must be there, which is said before any work.
    command = [sys.executable, "-c", WITHOUT.format(scripts=str(SCRIPT.parent), without=("sklearn",))]
    done = subprocess.run([*command, "--model_name_or_path", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.strip().endswith(
        "GLUE's scores need sklearn, which is not installed: pip install 'hf_specattn[train]'."
    )
    flags = ["--tasks", "mrpc,stsb", "--seeds", "0", "1", "--data_dir", str(data), *SHORT, "--output_dir", "run"]
    models = ["--model_name_or_path", str(checkpoints / "crammed"), str(checkpoints / "svd")]
    result = run_process(
        [sys.executable, "-c", WITHOUT.format(scripts=str(SCRIPT.parent), without=()), *models, *flags], tmp_path
    )
    assert "glue.png and glue.svg are left out: The figure needs matplotlib" in result.stderr
    assert not (tmp_path / "run" / "glue.png").exists()
    expected = runs_of(evaluate("crammed svd", "mrpc,stsb", seeds=2, name="expected"))
    for key, record in runs_of(tmp_path / "run").items():
        assert record.scores == expected[key].scores


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "imdb"], "--tasks imdb: unknown; choose all, or some of mnli"),
        (["--tasks", "wnli"], "WNLI, which is left out here"),
        (["--seeds", "-1"], "--seeds -1 must be at least 0"),
        (["--seed", "1", "1"], "--seeds 1 1: a seed is named twice"),
        (["--max_train_samples", "0"], "--max_train_samples 0 must be at least 1"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0"),
        (["--learning_rate", "nan"], "--learning_rate nan must be a finite number above 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 must be at least 1"),
        (["--max_seq_length", "4"], "--max_seq_length 4 must be at least 8"),
        (["--protocol", "roberta"], "invalid choice: 'roberta'"),
        (["--labels", "a", "b"], "--labels gives 2 names to 1 checkpoints"),
        (
            ["--compare_stock"],
            "--compare_stock compares with the conditioning of the flags; add --spectral_conditioning",
        ),
        (["--lambda_", "1.0"], "--lambda_ given without --spectral_conditioning"),
        (["--lora_rank", "4"], "--lora_rank given without --peft lora"),
        (["--peft", "lora", "--lora_rank", "0"], "--lora_rank 0 must be at least 1"),
        (["--peft", "lora", "--lora_alpha", "0"], "--lora_alpha 0.0 must be a finite number above 0"),
        (["--peft", "dora"], "invalid choice: 'dora'"),
        (["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        (["--output_dir", __file__], "test_eval_glue.py is a file, not a folder"),
        (["--num_train_epoch", "5"], "did you mean --num_train_epochs?"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_any_work(script, monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.setattr(script, "build_accelerator", lambda *_: pytest.fail("work started"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as error:
        script.main(["--model_name_or_path", "model", *flags])
    assert message in capsys.readouterr().err + str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def odd_checkpoints(checkpoints, tokenizer, tmp_path):
    """A function: name -> folder with a checkpoint that something is wrong with."""

    def make(name):
        folder = tmp_path / name
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        if name == "roberta":
            config = RobertaConfig(vocab_size=400, max_position_embeddings=18, pad_token_id=1, **small)
            RobertaModel(config).save_pretrained(folder)
        elif name == "mpnet":
            config = MPNetConfig(vocab_size=len(tokenizer), **SIZES)
            MPNetModel(config).save_pretrained(folder)
        elif name == "three classes":
            config = BertConfig(vocab_size=len(tokenizer), num_labels=3, **small)
            BertForSequenceClassification(config).save_pretrained(folder)
        else:
            vocabulary = 50 if name == "small vocabulary" else len(tokenizer)
            BertModel(BertConfig(vocab_size=vocabulary, **small)).save_pretrained(folder)
        if name != "no tokenizer":
            tokenizer.save_pretrained(folder)
        if name == "no padding":
            other = AutoTokenizer.from_pretrained(folder)
            other.pad_token = None
            other.save_pretrained(folder)
        if name == "no weights":
            (folder / "model.safetensors").unlink()
        if name == "no config":
            (folder / "config.json").unlink()
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("no tokenizer", [], r"no tokenizer has no tokenizer: .*save the model's tokenizer with it, or name one with"),
        ("no padding", [], "has no padding token, which batches need"),
        ("no config", [], "no config cannot be loaded|no config has no tokenizer"),
        ("small vocabulary", [], r"tokens and the model .*small vocabulary only 50"),
        ("plain", ["--max_seq_length", "1024"], "--max_seq_length 1024 exceeds the 512 positions"),
        ("roberta", ["--max_seq_length", "17"], "--max_seq_length 17 exceeds the 16 positions"),
        ("mpnet", SVD, r"model type 'mpnet'\) has no conditioned class(?s:.*)hf_specattn\.condition\(model"),
        (
            "plain",
            ["--peft", "lora", "--lora_targets", "nothing"],
            "cannot be fine-tuned here with --lora_targets nothing: No modules",
        ),
        ("plain", ["--reference", "other"], "--reference 'other' is not a model; the models are 'plain'"),
        ("plain", ["--data_dir", "/nowhere"], "--data_dir /nowhere is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.partition(" cannot")[0][:24],
)
def test_models_that_cannot_work_are_refused_before_any_training(
    script, odd_checkpoints, data, monkeypatch, tmp_path, name, flags, message
):
    pytest.importorskip("peft")
    monkeypatch.setattr(FineTuner, "execute", lambda *_: pytest.fail("training started"))
    common = ["--tasks", "rte", "--data_dir", str(data), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=f"^error: .*(?:{message})"):
        script.main(["--model_name_or_path", odd_checkpoints(name), *common, *flags])


def test_checkpoints_that_do_not_go_together_are_refused(evaluate, checkpoints, tmp_path):
    message = refusal(evaluate, "svd", "rte", *PRESERVE)
    assert (
        "svd is conditioned already (svd()) and is fine-tuned as it is; leave out --spectral_conditioning" in message
    )
    message = refusal(evaluate, "svd svd", "rte")
    assert "Several models would have the name 'svd'; give each checkpoint another name by --labels" in message
    message = refusal(evaluate, "svd bert", "rte", "--labels", "a b", "a/b")
    assert "Several models would have the folder 'a-b'" in message


def test_a_head_of_another_size_is_replaced_only_on_request(script, odd_checkpoints, data, tmp_path):
    command = ["--model_name_or_path", odd_checkpoints("three classes"), "--tasks", "rte", "--data_dir", str(data)]
    command += ["--seeds", "0", *SHORT, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"^error: .*its classifier was made for another number of outputs than 2"):
        script.main(command)
    assert not (tmp_path / "run").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main([*command, "--ignore_mismatched_sizes"])
    assert only_run_of(tmp_path / "run").status == "finished"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("RTE/dev.tsv", None, r"RTE/dev\.tsv is missing"),
        ("RTE/train.tsv", "index\tpremise\tsentence2\tlabel\n0\ta\tb\tentailment\n", "lacks the column 'sentence1'"),
        (
            "RTE/dev.tsv",
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n",
            "line 2: the label 'maybe' is none of",
        ),
    ],
)
def test_bad_data_is_refused_before_any_training(
    script, checkpoints, data, tmp_path, monkeypatch, file, content, message
):
    monkeypatch.setattr(FineTuner, "execute", lambda *_: pytest.fail("training started"))
    glue_files.write_all(tmp_path / "data", counts=(TRAIN, DEV, TEST))
    if content is None:
        (tmp_path / "data" / file).unlink()
    else:
        (tmp_path / "data" / file).write_text(content)
    common = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    model = ["--model_name_or_path", str(checkpoints / "svd"), "--max_seq_length", "16"]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        script.main([*model, "--tasks", "cola,rte", *common])  # the bad one is the last of them


def test_sharding_is_refused(script, monkeypatch):
    from accelerate.utils import DistributedType

    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(script, "Accelerator", lambda **_: Sharded())
    with pytest.raises(
        SystemExit, match=r"accelerate is configured for FSDP\. Every process here holds the whole model"
    ):
        script.main(["--model_name_or_path", "model"])


# --------------------------------------------------------------------------------------------------------------- writing


def test_a_run_that_another_command_is_at_is_left_to_it(evaluate, script, tmp_path, caplog):
    lock = FolderLock(tmp_path / "run" / script.RUNNING / "svd-rte-0", "--output_dir")
    lock.acquire()
    folder = evaluate("svd", "rte", seeds=2)
    assert [record.seed for record in runs_of(folder).values()] == [1]
    assert "RTE, seed 0, svd is skipped: another command is running it" in caplog.text
    lock.release()
    assert [record.seed for record in runs_of(evaluate("svd", "rte", seeds=2)).values()] == [1, 0]
    assert not (folder / script.RUNNING).exists()


def test_scores_are_told_where_their_file_cannot_be_written(evaluate, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(glue_results, "write_json", full)
    message = refusal(evaluate, "svd", "rte")
    assert "results.json cannot be written: [Errno 28] No space left" in message
    record = json.loads(message[message.index("{") :])
    assert 0 <= record["scores"]["validation"]["accuracy"] <= 1


def test_scores_stand_where_what_was_asked_for_beside_them_is_missing(evaluate, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fine_tuning, "write_submission", full)
    folder = evaluate("svd", "rte", "--do_predict", fails=True)
    record = only_run_of(folder)
    assert record.failure == {"kind": "not written", "message": "OSError: [Errno 28] No space left on device"}
    score = record.scores["validation"]["accuracy"]
    assert f"{100 * score:.1f}" in (folder / "glue.md").read_text()
    monkeypatch.undo()
    again = only_run_of(evaluate("svd", "rte", "--do_predict"))
    assert (again.failure, again.scores["validation"]["accuracy"]) == (None, score)


def test_space_for_models_is_asked_for_first(evaluate, checkpoints, monkeypatch):
    weights = (checkpoints / "svd" / "model.safetensors").stat().st_size
    free = 3 * weights - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=r"^error: --output_dir .* will need about"):
        evaluate("svd", "rte", "--save_models", seeds=3)
    evaluate("svd", "rte", seeds=3)
