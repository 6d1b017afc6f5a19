"""Dynamic corrections: recomputed on call, and an error where nobody calls."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, each_architecture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_specattn import AttentionSpec, SpectralConfig, condition, fold, refresh, refreshing
from hf_specattn.corrections import svd_correction
from hf_specattn.layers import spectral_layers
from hf_specattn.polar import correction_by_products
from hf_specattn.refreshing import MISSED_INTERVALS, refresh_interval, steps_since_refresh


class TwoProjectionAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads = 2
        self.q = nn.Linear(6, 6, dtype=torch.float64)
        self.k = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, inputs):
        return self.q(inputs) * self.k(inputs)


SPEC = AttentionSpec("TwoProjectionAttention", {"q": "query", "k": "key"})


def dynamic_model(every=2, **settings):
    model = TwoProjectionAttention()
    condition(
        model, SpectralConfig("svd", targets=("query", "key"), refresh_every=every, **settings), architecture=SPEC
    )
    return model


def take_steps(model, count, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def numpy_svd_correction(weight):
    left, sigma, right = np.linalg.svd(weight.detach().numpy())
    return torch.from_numpy(sigma[0] * left @ right)


def test_refresh_follows_the_weight():
    model = dynamic_model()
    before = model.q.correction.clone()
    take_steps(model, 2)
    assert torch.equal(model.q.correction, before)  # nothing moves by itself
    refresh(model)
    for layer in (model.q, model.k):
        torch.testing.assert_close(layer.correction, numpy_svd_correction(layer.weight), rtol=0, atol=1e-12)
        assert np.linalg.cond(layer.effective_weight().detach().numpy()) <= 2 * (1 + 1e-9)
        assert not layer.correction.requires_grad
    assert not torch.equal(model.q.correction, before)


# --- by matrix products ----------------------------------------------------------------------------------------------


class HostWaits(TorchDispatchMode):
    """Counts the operations for which the host waits until a GPU is done, some of which torch hides behind others."""

    # Reading a number, comparing, finding what a mask selects, and decompositions that read an error code.
    WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_linalg_eigh", "_linalg_svd")
    # Of a tensor that is made on the CPU, and brought to the GPU then.
    MADE_ON_THE_HOST = ("randn", "lift_fresh")

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: self.seen.append("tolist") or tolist(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if by_mask or name in (*self.WAITING, *self.MADE_ON_THE_HOST):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_for_all_weights_and_shapes(monkeypatch):
    monkeypatch.setattr(refreshing, "ELEMENTS_AT_ONCE", 2 * 16 * 32)  # several batches
    model = moved(ARCHITECTURES["llama"], dtype=torch.float32)
    refresh(model, exact=False)  # makes what is kept
    with HostWaits(monkeypatch) as waits:
        refresh(model, exact=False)
    assert waits.seen == ["tolist"]
    layer = next(layer for _, layer in spectral_layers(model))
    with torch.no_grad():  # beyond the first composition
        left, sigma, right = torch.linalg.svd(layer.weight)
        sigma[-1] = sigma[0] / 1e6
        layer.weight.copy_(left * sigma @ right)
    waits.seen.clear()
    with waits:
        refresh(model, exact=False)
    assert waits.seen == ["tolist"] * 2
    assert np.linalg.cond(layer.effective_weight().detach().double().numpy()) <= 2.02


def test_the_counter_of_waits_sees_them(monkeypatch):
    matrix = torch.eye(2)
    with HostWaits(monkeypatch) as waits:
        matrix.tolist(), matrix.sum().item(), matrix[matrix > 0], torch.linalg.eigvalsh(matrix), bool(matrix.any())
        torch.randn(2), torch.tensor(1.0), torch.linalg.svdvals(matrix)
        matrix[matrix > 0] = 2
    expected = ["tolist", "_local_scalar_dense", "index", "_linalg_eigh", "_local_scalar_dense"]
    expected += ["randn", "lift_fresh", "_linalg_svd", "lift_fresh", "index_put_"]
    assert [name for name in waits.seen if name in expected] == expected


def test_whole_weights_of_no_more_than_one_batch_are_held(monkeypatch):
    """Sharded weights are gathered: the checks of each batch are looked at before the next one is gathered."""
    monkeypatch.setattr(refreshing, "ELEMENTS_AT_ONCE", 32 * 32)
    model = moved(ARCHITECTURES["bert"], dtype=torch.float32)
    refresh(model, exact=False)
    expected = corrections(model)
    looked = []
    complete = refreshing._complete
    monkeypatch.setattr(refreshing, "_complete", lambda checked: looked.append(len(checked)) or complete(checked))
    layers = [layer for _, layer in spectral_layers(model)]
    for layer in layers:
        layer.correction.zero_()
        # As DTensor has it; refresh() itself would refuse an attribute of the parameter.
        layer.weight.full_tensor = layer.weight.detach
    refreshing.recompute_by_products(layers)
    assert looked == [1] * len(layers) + [0]
    assert all(torch.equal(found, expected[name]) for name, found in corrections(model).items())


def moved(tiny, dtype=torch.float64, **settings):
    """A conditioned tiny model whose weights have moved since its corrections were computed."""
    model = tiny.model(dtype=dtype)
    condition(model, SpectralConfig("svd", refresh_every=1, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def corrections(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("correction")}


@each_architecture
@pytest.mark.parametrize("granularity", ["projection", "head"])
@pytest.mark.parametrize("targets", [("query", "key", "value"), ("key",)])
def test_products_give_the_correction_of_the_svd(tiny, granularity, targets):
    model = moved(tiny, granularity=granularity, targets=targets)
    before = corrections(model)
    refresh(model, exact=True)
    expected = corrections(model)
    for name, buffer in model.named_buffers():
        if name in expected:
            buffer.copy_(before[name])
    refresh(model, exact=False)
    for name, correction in corrections(model).items():
        assert not torch.equal(correction, before[name])
        torch.testing.assert_close(correction, expected[name], rtol=0, atol=1e-8 * expected[name].norm().item())
        # Rows that are no target have no correction, not a tiny one.
        assert torch.equal(correction == 0, expected[name] == 0)


@pytest.mark.parametrize("exact", [True, False])
def test_interleaved_projections(exact):
    class FusedAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 3
            self.qkv = nn.Linear(12, 36, dtype=torch.float64)

    model = FusedAttention()
    spec = AttentionSpec("FusedAttention", {"qkv": ("query", "key", "value")}, interleaved=True, query_heads="heads")
    condition(model, SpectralConfig("svd", refresh_every=1), architecture=spec)
    nn.init.normal_(model.qkv.weight)
    refresh(model, exact=exact)
    rows = np.arange(36).reshape(3, 3, 4)  # head, projection, row
    for projection in range(3):
        own = rows[:, projection].ravel()
        expected = numpy_svd_correction(model.qkv.weight[own])
        torch.testing.assert_close(model.qkv.correction[own], expected, rtol=0, atol=1e-10)


def test_products_meet_the_limit_in_float32_and_count_from_anew():
    model = moved(ARCHITECTURES["bert"], dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(**ARCHITECTURES["bert"].batch()).last_hidden_state.sum().backward()
    optimizer.step()
    assert steps_since_refresh(model) == 1
    refresh(model, exact=False)
    assert steps_since_refresh(model) == 0
    for _, layer in spectral_layers(model):
        assert np.linalg.cond(layer.effective_weight().detach().double().numpy()) <= 2.02
        assert not layer.correction.requires_grad


def test_what_is_computed_together_changes_rounding_only(monkeypatch):
    model = moved(ARCHITECTURES["llama"], dtype=torch.float32)  # key and value are of another shape than query
    shapes = []

    def record(matrices):
        shapes.append(tuple(matrices.shape))
        return correction_by_products(matrices)

    monkeypatch.setattr(refreshing, "correction_by_products", record)
    refresh(model, exact=False)
    together = corrections(model)
    assert shapes == [(2, 32, 32), (4, 16, 32)]
    shapes.clear()
    monkeypatch.setattr(refreshing, "ELEMENTS_AT_ONCE", 2 * 16 * 32)
    refresh(model, exact=False)
    assert shapes == [(1, 32, 32), (2, 16, 32)] * 2
    for name, correction in corrections(model).items():
        torch.testing.assert_close(correction, together[name], rtol=0, atol=1e-5 * together[name].norm().item())


def test_the_device_decides_unless_told(monkeypatch):
    model = moved(ARCHITECTURES["bert"])
    by_products = []
    monkeypatch.setattr(refreshing, "recompute_by_products", lambda layers: by_products.append(len(layers)))
    for exact, count in ((None, 0), (True, 0), (False, 6)):  # on a CPU
        refresh(model, exact=exact)
        assert by_products.pop() == count
    on_gpu = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda", 0)))
    assert [refreshing._takes_svd(on_gpu, exact) for exact in (None, True, False)] == [False, True, False]


def test_what_products_cannot_do_is_left_to_the_svd():
    model = moved(ARCHITECTURES["bert"], dtype=torch.float32)
    layers = [layer for _, layer in spectral_layers(model)]
    with torch.no_grad():
        layers[1].weight[4] = 0
        layers[3].weight.zero_()
    refresh(model, exact=False)
    assert torch.equal(layers[1].correction, svd_correction(layers[1].weight))
    assert np.linalg.cond(layers[1].effective_weight().detach().double().numpy()) <= 2.02
    assert not layers[3].correction.any()
    with torch.no_grad():
        layers[2].weight[0, 0] = float("nan")
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite"):
        refresh(model, exact=False)


def test_static_correction_decays_as_the_method_says():
    """kappa <= (2 s_1 + |D|) / (s_1 + s_k - |D|) for a drift D of the weight."""
    model = TwoProjectionAttention()
    condition(model, SpectralConfig("svd", targets=("query", "key")), architecture=SPEC)
    sigma = torch.linalg.svdvals(model.q.weight.detach())
    drift = torch.randn(6, 6, dtype=torch.float64)
    drift *= 0.5 * sigma[0] / torch.linalg.matrix_norm(drift, 2)
    with torch.no_grad():
        model.q.weight += drift
    kappa = np.linalg.cond(model.q.effective_weight().detach().numpy())
    assert 2.0 < kappa <= (2.5 * sigma[0] / (0.5 * sigma[0] + sigma[-1])).item()


def test_refresh_of_a_model_without_dynamic_corrections_is_refused():
    model = TwoProjectionAttention()
    with pytest.raises(ValueError, match="no dynamic correction"):
        refresh(model)
    condition(model, SpectralConfig("svd", targets=("query", "key")), architecture=SPEC)
    with pytest.raises(ValueError, match="refresh_every"):
        refresh(model)


def test_refresh_interval():
    assert refresh_interval(dynamic_model(every=7)) == 7
    assert refresh_interval(TwoProjectionAttention()) is None


def test_nobody_refreshing_is_an_error():
    model = dynamic_model(every=2)
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, 2 * MISSED_INTERVALS - 1, optimizer)
    assert steps_since_refresh(model) == 2 * MISSED_INTERVALS - 1
    with pytest.raises(RuntimeError, match=r"refresh_every=2 was requested, but 4 optimizer steps.*SpectralCallback"):
        take_steps(model, 1, optimizer)


def test_refreshing_in_time_is_no_error():
    model = dynamic_model(every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3 * MISSED_INTERVALS):
        take_steps(model, 1, optimizer)
        refresh(model)
    assert steps_since_refresh(model) == 0


def test_frozen_weights_need_no_refresh():
    model = dynamic_model(every=1)
    other = nn.Linear(2, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3 * MISSED_INTERVALS):
        optimizer.step()
    assert steps_since_refresh(model) == 0


def masters_of(model):
    return [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]


def take_steps_by_masters(model, masters, optimizer, count, write=torch.Tensor.copy_, refresh_after=None):
    for step in range(1, count + 1):
        model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
        for master, own in zip(masters, model.parameters()):
            master.grad = own.grad
        optimizer.step()
        with torch.no_grad():
            for master, own in zip(masters, model.parameters()):
                write(own, master)
        model.zero_grad()
        if refresh_after is not None and step % refresh_after == 0:
            refresh(model)


def through_data(own, master):
    own.data.copy_(master)  # as DeepSpeed: the parameter's version stays


@pytest.mark.parametrize("write", [torch.Tensor.copy_, through_data])
@pytest.mark.parametrize("every", [1, 3])
def test_master_copies_are_noticed(every, write):
    model = dynamic_model(every=every)
    masters = masters_of(model)
    optimizer = torch.optim.AdamW(masters, lr=0.01)
    take_steps_by_masters(model, masters, optimizer, 2 * every - 1, write)
    with pytest.raises(RuntimeError, match=f"refresh_every={every} was requested, but {2 * every} optimizer steps"):
        take_steps_by_masters(model, masters, optimizer, 1, write)


def test_master_copies_refreshed_in_time():
    model = dynamic_model(every=2)
    masters = masters_of(model)
    take_steps_by_masters(model, masters, torch.optim.SGD(masters, lr=0.01), 20, refresh_after=2)
    assert steps_since_refresh(model) == 0


def test_flat_partitions_whose_gradients_are_taken_away():
    model = dynamic_model(every=1)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer = torch.optim.SGD([flat], lr=0.1)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def step():
        model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
        parts = flat.detach().split([parameter.numel() for parameter in model.parameters()])
        for parameter, part in zip(model.parameters(), parts):
            parameter.data.copy_(part.view_as(parameter))

    step()  # the gradients were gone before anybody asked for them
    step()
    with pytest.raises(RuntimeError, match="but 2 optimizer steps"):
        step()


def test_an_optimizer_per_parameter():
    model = dynamic_model(every=3)
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]

    def step():
        model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(5):
        step()
    assert steps_since_refresh(model) == 5
    with pytest.raises(RuntimeError, match="but 6 optimizer steps"):
        step()


@pytest.mark.parametrize("own_first", [True, False])
def test_another_models_optimizer_counts_nothing(own_first):
    model, other = dynamic_model(every=1), nn.Linear(6, 6, dtype=torch.float64)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.SGD(other.parameters(), lr=0.01)]
    for _ in range(6):
        model(other(torch.ones(1, 6, dtype=torch.float64))).sum().backward()
        for optimizer in optimizers if own_first else optimizers[::-1]:
            optimizer.step()
        refresh(model)
    assert steps_since_refresh(model) == 0


def test_gradients_that_nobody_uses_count_nothing():
    model, head = dynamic_model(every=1), nn.Linear(6, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)  # the model is not frozen, and not trained either
    for _ in range(6):
        head(model(torch.ones(1, 6, dtype=torch.float64))).sum().backward()
        optimizer.step()


def test_averages_of_weights_count_nothing():
    model = dynamic_model(every=4)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(6):
        take_steps(model, 4)
        refresh(model)
        averaged.update_parameters(model)
    assert steps_since_refresh(averaged) == 0


def test_watched_models_are_copied_and_pickled():
    model = dynamic_model(every=3)
    masters = masters_of(model)
    optimizer = torch.optim.SGD(masters, lr=0.1)
    take_steps_by_masters(model, masters, optimizer, 2)
    assert steps_since_refresh(model) == 2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert steps_since_refresh(twin) == 0
        assert torch.equal(twin(torch.ones(1, 6, dtype=torch.float64)), model(torch.ones(1, 6, dtype=torch.float64)))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_too(twin_of):
    twin = twin_of(dynamic_model(every=1))
    with pytest.raises(RuntimeError, match="refresh_every=1"):
        take_steps(twin, MISSED_INTERVALS)


def test_a_folded_model_is_left_in_peace():
    model = fold(dynamic_model(every=1))
    take_steps(model, 2 * MISSED_INTERVALS)
    assert type(model.q) is nn.Linear
