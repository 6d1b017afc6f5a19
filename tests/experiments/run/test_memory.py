"""The memory estimate against counts by hand, a real optimizer, and the count at the batch that it is continued to."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from hf_specattn import CrammedBertConfig, CrammedBertForMaskedLM, SpectralConfig, condition
from recipes.run.memory import (
    MemoryEstimate,
    estimate_training_memory,
    saved_for_backward,
    storages_of,
    total_bytes,
)
from recipes.text.pretrain_task import MaskingRule, accepts_masked_positions

LENGTH, WIDTH, LAYERS, VOCABULARY = 16, 32, 2, 50
BATCH = 13


def bf16_autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


# --- a network small enough to count by hand -------------------------------------------------------------------------

INPUTS, HIDDEN, OUTPUTS = 6, 10, 4


class Mlp(nn.Module):
    """Two linear layers with tanh between; the second adds a fixed C to its weight, as a conditioned one does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.second = nn.Linear(HIDDEN, OUTPUTS)
        self.register_buffer("correction", torch.randn(OUTPUTS, HIDDEN))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        hidden = torch.tanh(self.first(x)) * self.scale
        return F.linear(hidden, self.second.weight + self.correction, self.second.bias)


def run_mlp(model):
    return lambda rows: F.mse_loss(model(torch.randn(rows, INPUTS)), torch.zeros(rows, OUTPUTS))


def test_a_small_network_by_hand():
    model = Mlp()
    estimate = estimate_training_memory(model, run_mlp(model), BATCH)
    weights = HIDDEN * INPUTS + HIDDEN + OUTPUTS * HIDDEN + OUTPUTS
    assert estimate == MemoryEstimate(
        parameters=4 * weights,
        gradients=4 * weights,
        optimizer=4 * 2 * weights + 4 * 4,  # and the step counts of four tensors
        buffers=4 * (OUTPUTS * HIDDEN + 1),
        # The input, tanh's output, its product with the scale, the outputs and the targets of the loss. The scale is a
        # buffer and the weight of the first layer a parameter, so neither counts.
        activations_per_sequence=4 * (INPUTS + 2 * HIDDEN + 2 * OUTPUTS),
        activations_fixed=4 * OUTPUTS * HIDDEN,  # W + C
        sequences=BATCH,
    )
    assert estimate.activations == 4 * (OUTPUTS * HIDDEN + BATCH * (INPUTS + 2 * HIDDEN + 2 * OUTPUTS))
    assert estimate.total == sum(
        (estimate.parameters, estimate.gradients, estimate.optimizer, estimate.buffers, estimate.activations)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(dtype):
    model = Mlp().to(dtype)
    model.first.bias.requires_grad_(False)

    def run_batch(rows):
        return model(torch.randn(rows, INPUTS, dtype=dtype)).square().mean()

    estimate = estimate_training_memory(model, run_batch, 1)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    run_batch(3).backward()
    optimizer.step()
    assert estimate.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert estimate.optimizer == sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert estimate.parameters == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.parameters == estimate.gradients + model.first.bias.nbytes


# --- Crammed BERT ----------------------------------------------------------------------------------------------------


def crammed_bert(layers=LAYERS, dropout=0.0, **settings):
    return CrammedBertForMaskedLM(
        CrammedBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **settings,
        )
    )


def run_masked_lm(model, sparse=None):
    """The forward pass as pretraining does it."""
    rule = MaskingRule(mask_token_id=1, vocab_size=VOCABULARY)
    sparse = accepts_masked_positions(model) if sparse is None else sparse

    def run_batch(sequences):
        tokens = np.random.default_rng(0).integers(VOCABULARY, size=(sequences, LENGTH))
        batch = rule.apply(tokens, np.arange(sequences), seed=0, epoch=0)
        return model(**batch.model_inputs(torch.device("cpu"), sparse)).loss

    return run_batch


def counted(model, run_batch, sequences, autocast=nullcontext):
    """An independent count: by the address of the data, on the batch itself."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes, kept = {}, []

    def pack(tensor):
        kept.append(tensor.detach())  # so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    model.train()
    with autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_batch(sequences)
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("autocast", [nullcontext, bf16_autocast])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [None, SpectralConfig(lambda_=1.0), SpectralConfig("svd")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_line_through_one_and_two_sequences_meets_the_count_at_the_batch(
    settings, checkpointing, autocast, attention
):
    model = crammed_bert(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    if settings is not None:
        condition(model, settings)
    if checkpointing:
        model.gradient_checkpointing_enable()
    run_batch = run_masked_lm(model)
    estimate = estimate_training_memory(model, run_batch, BATCH, autocast=autocast)
    assert estimate.activations == counted(model, run_batch, BATCH, autocast)


def test_a_conditioned_model_keeps_its_corrections_and_nothing_for_the_backward_pass():
    stock = estimate_training_memory(model := crammed_bert(), run_masked_lm(model), BATCH)
    condition(model := crammed_bert(), SpectralConfig("svd"))
    conditioned = estimate_training_memory(model, run_masked_lm(model), BATCH)
    corrections = 4 * 3 * LAYERS * WIDTH**2
    assert conditioned.activations_fixed == stock.activations_fixed  # W + C is formed again
    assert conditioned.buffers - stock.buffers == corrections  # C
    assert conditioned.activations_per_sequence == stock.activations_per_sequence


def test_sparse_prediction_keeps_fewer_logits():
    """Of three quarters of the positions the hidden state (decoder's input) and log-probabilities are not kept."""
    model = crammed_bert(sparse_prediction=False)
    dense = estimate_training_memory(model, run_masked_lm(model, sparse=False), BATCH)
    sparse = estimate_training_memory(model, run_masked_lm(model, sparse=True), BATCH)
    predicted = LENGTH // 4
    saved = 4 * (LENGTH - predicted) * VOCABULARY + 8 * (LENGTH - predicted)  # log-probabilities and labels
    # Sparse keeps the gathered rows, the index of the gathering, and the labels' own.
    added = 4 * predicted * WIDTH + 8 * predicted
    assert dense.activations_per_sequence - sparse.activations_per_sequence == saved - added


def test_gradient_checkpointing_keeps_one_input_per_layer():
    estimates = {}
    for layers in (2, 3):
        model = crammed_bert(layers)
        plain = estimate_training_memory(model, run_masked_lm(model), BATCH)
        model.gradient_checkpointing_enable()
        estimates[layers] = estimate_training_memory(model, run_masked_lm(model), BATCH)
        assert estimates[layers].activations < plain.activations / 2
    added = estimates[3].activations_per_sequence - estimates[2].activations_per_sequence
    assert added == 4 * LENGTH * WIDTH
    assert estimates[3].activations_fixed == estimates[2].activations_fixed


def test_a_model_on_the_meta_device_is_estimated_without_its_memory():
    on_cpu = crammed_bert()
    with torch.device("meta"):
        on_meta = crammed_bert()

    def run_batch(sequences):
        ids = torch.zeros(sequences, LENGTH, dtype=torch.long, device="meta")
        positions = torch.zeros(sequences, LENGTH // 4, dtype=torch.long, device="meta")
        return on_meta(input_ids=ids, labels=ids.clone(), masked_positions=positions).loss

    estimate = estimate_training_memory(on_meta, run_batch, BATCH)
    real = estimate_training_memory(on_cpu, run_masked_lm(on_cpu), BATCH)
    assert (estimate.parameters, estimate.buffers) == (real.parameters, real.buffers)
    assert estimate.activations_per_sequence > 0


# --- what is left as it was ------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Changes running statistics and draws from every generator."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(INPUTS, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        random.random()
        np.random.random()  # noqa: NPY002
        return self.dropout(self.norm(self.linear(x)))


def drawn():
    return torch.rand(3).tolist(), random.random(), np.random.random()  # noqa: NPY002


def test_model_gradients_modes_and_random_states_are_left_as_they_were():
    model = Noisy().eval()
    model.dropout.train()
    model.linear.weight.grad = torch.full_like(model.linear.weight, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    ran_in_training_mode = []

    def run_batch(rows):
        ran_in_training_mode.append(all(module.training for module in model.modules()))
        return model(torch.randn(3 * rows, INPUTS)).sum()

    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    with torch.no_grad():  # gradients are needed inside, whatever holds outside
        estimate_training_memory(model, run_batch, 4)
    assert drawn() == expected
    assert ran_in_training_mode == [True, True]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert before["norm.num_batches_tracked"] == 0
    assert model.linear.weight.grad.eq(3.0).all()
    assert model.linear.bias.grad is None


def test_everything_is_put_back_after_an_error():
    model = Noisy().eval()

    def run_batch(rows):
        model(torch.randn(3, INPUTS))
        raise KeyError("broken")

    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    with pytest.raises(KeyError, match="broken"):
        estimate_training_memory(model, run_batch, 4)
    assert drawn() == expected
    assert not model.norm.training
    assert model.norm.num_batches_tracked == 0


def test_what_was_saved_is_given_back():
    """Tanh saves its own output: held with its history, it would never be freed."""
    with saved_for_backward() as saved:
        output = torch.tanh(torch.randn(100, requires_grad=True))
    assert total_bytes(saved) == 400
    storage = StorageWeakRef(output.untyped_storage())
    del output
    assert not storage.expired()  # it is still counted
    saved.clear()
    assert storage.expired()


def test_backward_through_what_was_collected():
    x = torch.randn(5, requires_grad=True)
    with saved_for_backward():
        x.tanh().square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.tanh() * (1 - x.tanh() ** 2))


def test_storages_count_once():
    x = torch.zeros(10, 10)
    assert total_bytes(storages_of([x, x.t(), x[3:], x.clone()])) == 800


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refuses_a_forward_pass_that_does_not_grow_with_the_batch():
    model = Mlp()
    with pytest.raises(ValueError, match=r"keeps 296 bytes for the backward pass of 1 sequence and 296 for that of 2"):
        estimate_training_memory(model, lambda _: run_mlp(model)(1), BATCH)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0 for that of 2.*with parameters that require gradients"):
        estimate_training_memory(model, run_mlp(model), BATCH)
