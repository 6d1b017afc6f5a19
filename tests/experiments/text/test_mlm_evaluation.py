import numpy as np
import pytest
import torch
from models import ARCHITECTURES, VOCABULARY

from recipes.text.pretrain_task import (
    EVALUATION_EPOCH,
    EVALUATION_SEED,
    MaskingRule,
    accepts_masked_positions,
    evaluate_mlm,
)

RULE = MaskingRule(mask_token_id=4, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def sequences():
    return np.random.default_rng(0).integers(5, VOCABULARY, size=(23, 16), dtype=np.uint16)


@pytest.fixture(params=["crammed_bert", "bert"])
def model(request):
    return ARCHITECTURES[request.param].model("AutoModelForMaskedLM", torch.float32)


def test_the_loss_is_the_mean_over_all_predictions(model, sequences):
    batch = RULE.apply(sequences, np.arange(23), seed=EVALUATION_SEED, epoch=EVALUATION_EPOCH)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), batch.labels.flatten())
    result = evaluate_mlm(model, sequences, RULE, batch_size=23)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.perplexity == pytest.approx(expected.exp().item(), rel=1e-5)
    assert (result.predicted_tokens, result.sequences) == (23 * 4, 23)


@pytest.mark.parametrize("batch_size", [1, 5, 22, 100])
def test_batch_size_changes_nothing(model, sequences, batch_size):
    whole = evaluate_mlm(model, sequences, RULE, batch_size=23)
    parts = evaluate_mlm(model, sequences, RULE, batch_size=batch_size)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.predicted_tokens == whole.predicted_tokens


class OneOf:
    """Stands for the accelerator of one process among several; the sums of all of them are added by the test."""

    device = torch.device("cpu")

    def __init__(self, process_index: int, num_processes: int) -> None:
        self.process_index, self.num_processes = process_index, num_processes
        self.totals: torch.Tensor | None = None

    def reduce(self, totals: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.totals = totals
        return totals.clamp(min=1)


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 5), (3, 4), (4, 7), (5, 23)])
def test_processes_share_the_sequences_without_loss_or_repetition(model, sequences, processes, batch_size):
    whole = evaluate_mlm(model, sequences, RULE, batch_size=23)
    calls, shares = [], []
    for rank in range(processes):
        counter = []
        handle = model.register_forward_pre_hook(lambda *_, counter=counter: counter.append(1))
        accelerator = OneOf(rank, processes)
        evaluate_mlm(model, sequences, RULE, batch_size=batch_size, accelerator=accelerator)
        handle.remove()
        calls.append(len(counter))
        shares.append(accelerator.totals)
    summed, predicted = torch.stack(shares).sum(dim=0).tolist()
    assert predicted == whole.predicted_tokens
    assert summed / predicted == pytest.approx(whole.loss, rel=1e-6)
    # A sharded model communicates in every forward pass: all processes must make equally many.
    assert len(set(calls)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_left_as_it_was_and_dropout_is_off(model, sequences, training):
    model.train(training)
    losses = {evaluate_mlm(model, sequences, RULE).loss for _ in range(2)}
    assert model.training is training
    assert len(losses) == 1


def test_only_crammed_bert_takes_positions():
    assert accepts_masked_positions(ARCHITECTURES["crammed_bert"].model("AutoModelForMaskedLM"))
    assert not accepts_masked_positions(ARCHITECTURES["bert"].model("AutoModelForMaskedLM"))
