"""The task of the loop: the examples of a step, the evaluation on every example, the best weights, beta1."""

from types import SimpleNamespace

import lra_files
import numpy as np
import pytest
import torch

from recipes.lra.lra_arguments import parse_arguments
from recipes.lra.lra_task import BestWeights, LraTask, check_model, evaluate_split
from recipes.lra.nystromformer import LraNystromformerForSequenceClassification
from recipes.run.usable_model import ModelError


class Processes:
    """As much of an accelerator as the task asks for: one of several processes."""

    def __init__(self, process_index=0, num_processes=1):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process, self.device = process_index == 0, torch.device("cpu")
        self.reduced = []

    def reduce(self, tensor, reduction):
        self.reduced.append(tensor.clone())
        return tensor


@pytest.fixture
def new_task(tmp_path):
    lra_files.imdb_lines(tmp_path / "data")

    def build(processes=None, *flags):
        small = ["--hidden_size", "8", "--intermediate_size", "8", "--max_length", "16", "--num_landmarks", "4"]
        small += ["--max_steps", "20", "--warmup_steps", "5", "--eval_steps", "2", "--validation_samples", "11"]
        data = ["--data_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"), "--test_samples", "20"]
        output = ["--output_dir", str(tmp_path / "run"), "--protocol", "lra", "--per_device_eval_batch_size", "4"]
        argv = ["--task", "text", *small, *data, *output, "--per_device_train_batch_size", "3", *flags]
        return LraTask(*parse_arguments(argv, "A test."), processes or Processes())

    return build


def new_model(task, seed=0):
    torch.manual_seed(seed)
    return LraNystromformerForSequenceClassification(task.arguments.new_model_config())


def test_two_processes_read_what_one_reads(new_task):
    one = list(new_task(None, "--per_device_train_batch_size", "6").micro_batches(12, 2, 3))
    halves = [list(new_task(Processes(rank, 2)).micro_batches(12, 2, 3)) for rank in range(2)]
    for micro_step, (ids, labels) in enumerate(one):
        together = [torch.cat([half[micro_step][part] for half in halves]) for part in range(2)]
        assert torch.equal(together[0], ids)
        assert torch.equal(together[1], labels)


def test_a_pass_reads_every_example_once_and_the_next_in_another_order(new_task):
    task = new_task()
    passes = [torch.cat([ids for ids, _ in task.micro_batches(start, 4, 1)]) for start in (0, 12)]
    stream = torch.cat([*passes, next(iter(task.micro_batches(24, 1, 1)))[0]])
    first = {tuple(row.tolist()) for row in stream[:20]}
    assert first == {tuple(row) for row in task.data.train.batch(np.arange(20), 16)[0].tolist()}


@pytest.mark.parametrize("training", [True, False])
def test_the_evaluation_counts_every_example_once(new_task, training):
    """Batches of 4 of 11; with the pseudo-inverse of a batch, the batches are those of one process on two, too."""
    task = new_task()
    model = new_model(task).train(training)
    split = task.data.validation
    accuracy, loss = evaluate_split(model, split, 16, 4, None)
    assert model.training == training
    model.eval()
    correct, losses = 0, []
    for start in (0, 4, 8):
        ids, labels = (torch.from_numpy(part) for part in split.batch(np.arange(start, min(start + 4, 11)), 16))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        correct += (logits.argmax(-1) == labels).sum().item()
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    assert accuracy == correct / 11
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    ranks = [Processes(rank, 2) for rank in range(2)]
    for rank in ranks:
        evaluate_split(model, split, 16, 4, rank)
    total = sum(rank.reduced[0] for rank in ranks)
    assert total.tolist() == pytest.approx([correct, sum(losses), 11], rel=1e-6)


def test_the_first_of_the_best_weights_is_kept_and_goes_through_a_checkpoint(new_task):
    task = new_task()
    model = new_model(task)
    best = BestWeights(model)
    kept = {}
    for step, accuracy in ((2, 0.3), (4, 0.6), (6, 0.6), (8, 0.5)):
        with torch.no_grad():
            model.classifier[2].bias.fill_(step)
        best.offer(accuracy, step)
        kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
    assert best.step == 4
    restored = BestWeights(new_model(task, seed=1))
    restored.load_state_dict(best.state_dict())
    restored.offer(0.55, 10)  # no better
    restored.restore()
    assert restored.step == 4
    for name, value in restored.model.state_dict().items():
        assert torch.equal(value, kept[4][name]), name


def test_the_evaluation_in_training_offers_the_weights_and_others_do_not(new_task):
    task = new_task()
    model = new_model(task)
    best = task.averaged(model)
    task.evaluate(model, None)
    assert best.best == {}
    list(task.micro_batches(0, 1, 7))
    values = task.evaluate(model, task.accelerator)
    assert best.step == 7
    assert best.best["accuracy"].item() == values["validation_accuracy"]


@pytest.mark.parametrize("cycled", ["True", "False"])
def test_beta1_moves_against_the_learning_rate(new_task, cycled):
    task = new_task(None, "--cycle_beta1", cycled)
    model = new_model(task)
    optimizer = task.optimizer(model)
    seen = []
    for step in (1, 5, 20):
        list(task.micro_batches(0, 1, step))
        optimizer.step()
        seen.append([group["betas"] for group in optimizer.param_groups])
    usual = [0.95, 0.85, 0.95] if cycled == "True" else [0.9, 0.9, 0.9]
    for betas, expected in zip(seen, usual):
        assert betas == [(pytest.approx(expected), 0.999)] * 2
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_what_is_looked_at_is_real_and_fits_the_memory(new_task):
    task = new_task()
    samples = task.samples(8)
    ids = samples["input_ids"]
    assert torch.equal(samples["attention_mask"], (ids > 0).long())
    assert 0 in samples["attention_mask"]
    assert ids.shape == (8, 16)
    assert ids[0].tolist() == task.data.validation.batch(np.array([0]), 16)[0][0].tolist()
    task.length = 4096
    assert task.samples(8)["input_ids"].shape == (1, 4096)


def test_a_model_of_another_task_is_refused(new_task):
    task = new_task()
    check_model(new_model(task), task.arguments)
    config = task.arguments.new_model_config()
    config.num_labels = 10
    with pytest.raises(ModelError, match=r"has num_labels=10, and --task text with --max_length 16 needs 2"):
        check_model(SimpleNamespace(config=config), task.arguments)
