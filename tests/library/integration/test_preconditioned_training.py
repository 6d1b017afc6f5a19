"""Preconditioned models under torch.compile, gradient checkpointing, autocast, generation, PEFT, `balance`, diagnostics."""

import copy
import datetime
import os

import pytest
import torch
from models import ARCHITECTURES, assert_bit_equal, each_architecture, outputs_of, relative_difference
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_specattn import PreconditionerConfig, SpectralConfig, balance, condition, fold, precondition
from hf_specattn.balance import PRECONDITIONER
from hf_specattn.diagnostics import attention_entropy, spectra
from hf_specattn.preconditioner import preconditioned_layers

pytestmark = pytest.mark.integration

BERT, GPT2, VIT, LLAMA = (ARCHITECTURES[name] for name in ("bert", "gpt2", "vit", "llama"))
ROW = PreconditionerConfig()
CONFIGS = {
    "row": (BERT, ROW),
    "through": (GPT2, PreconditionerConfig(gradient="through", scale="rms")),
    "match": (LLAMA, PreconditionerConfig(scale="match")),
    "column": (VIT, PreconditionerConfig("column", scale="rms")),
}
each_config = pytest.mark.parametrize(("tiny", "config"), CONFIGS.values(), ids=CONFIGS)


def preconditioned(tiny, config=ROW, auto_name="AutoModel", dtype=torch.float32):
    model = tiny.model(auto_name, dtype)
    precondition(model, config)
    return model


def gradients(model, batch):
    model.zero_grad()
    output = model(**batch).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@each_config
def test_the_graph_is_whole(tiny, config):
    model = preconditioned(tiny, config)
    batch = tiny.batch(dtype=torch.float32)
    expected = model(**batch).last_hidden_state
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        compiled(**batch).last_hidden_state.sum().backward()
    assert counter.frame_count == 1
    assert torch.allclose(compiled(**batch).last_hidden_state, expected, atol=1e-5)


@each_config
def test_gradient_checkpointing_gives_the_same_gradients(tiny, config):
    model = preconditioned(tiny, config, dtype=torch.float64).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = tiny.batch()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert relative_difference(gradients(model, batch), plain) < 1e-12


@each_architecture
def test_autocast_measures_norms_in_float32(tiny):
    model = preconditioned(tiny)
    batch = tiny.batch(dtype=torch.float32)
    expected = outputs_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(model, batch)
    assert relative_difference(outputs, expected) < 0.1


@pytest.mark.parametrize("tiny", [GPT2, LLAMA], ids=str)
def test_generation_with_a_cache_is_that_without(tiny):
    model = preconditioned(tiny, auto_name="AutoModelForCausalLM", dtype=torch.float64)
    tokens = tiny.batch()["input_ids"][:, :4]
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(tokens, **settings, use_cache=False))


def test_columns_refuse_a_mask_in_the_forward_pass():
    model = preconditioned(VIT, PreconditionerConfig("column"))
    batch = VIT.batch(dtype=torch.float32)
    model(**batch)
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    with pytest.raises(ValueError, match=r"ViTModel got attention_mask.*axis='column'.*use axis='row'"):
        model(**batch, attention_mask=mask)
    with pytest.raises(ValueError, match="got attention_mask"):  # a copy refuses too
        copy.deepcopy(model)(**batch, attention_mask=mask)
    whole = preconditioned(VIT, PreconditionerConfig("column"), "AutoModelForImageClassification")
    whole(**batch)
    with pytest.raises(ValueError, match="ViTForImageClassification got attention_mask"):
        whole(**batch, attention_mask=mask)
    with pytest.raises(ValueError, match="ViTModel got attention_mask"):
        whole.vit(**batch, attention_mask=mask)


def test_columns_of_a_timm_model_refuse_masks():
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, embed_dim=32, depth=1, num_heads=4
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    precondition(model, PreconditionerConfig("column"), probe={"x": images})
    model(images)
    for masked in ((images, torch.ones(5, 5, dtype=torch.bool)), (images,)):
        with pytest.raises(ValueError, match=r"VisionTransformer got (a mask|is_causal)"):
            model(*masked, **({} if len(masked) > 1 else {"is_causal": True}))


def step(model, wrapped):
    """One step of SGD on the one batch; the whole weights after it."""
    output = wrapped(**BERT.batch()).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    whole = {name: value.detach() for name, value in model.named_parameters()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in whole.items()}


def train_on_two(rank, kind, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2, timeout=datetime.timedelta(minutes=2)
    )
    model = preconditioned(BERT, PreconditionerConfig(scale="match"), dtype=torch.float64)
    if kind == "fsdp":
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    weights = step(model, wrapped)
    if rank == 0:
        torch.save(weights, folder / f"{kind}.pt")
    torch.distributed.destroy_process_group()
    # Gloo's threads may still hold tensors, and abort an interpreter that is being finalized (pytorch/pytorch#179291).
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind, tmp_path):
    torch.multiprocessing.spawn(train_on_two, args=(kind, tmp_path), nprocs=2)
    model = preconditioned(BERT, PreconditionerConfig(scale="match"), dtype=torch.float64)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = step(model, model)
    found = torch.load(tmp_path / f"{kind}.pt")
    assert relative_difference(found, expected) < 1e-12
    assert relative_difference(start, expected) > 1e-6


# --- PEFT ------------------------------------------------------------------------------------------------------------


def test_no_adapter_on_a_preconditioned_output_projection():
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    model = preconditioned(BERT)
    for targets in (["query", "attention.output.dense"], "all-linear"):
        with pytest.raises(
            ValueError, match=r"layer.0.attention.output.dense, whose input is preconditioned.*'dense'"
        ):
            peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets))
    gpt2 = preconditioned(GPT2)
    with pytest.raises(ValueError, match=r"h.0.attn.c_proj, whose input is preconditioned"):
        peft.get_peft_model(gpt2, peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))


@pytest.mark.parametrize("spectral", [None, SpectralConfig(lambda_=1.0)], ids=["alone", "conditioned"])
def test_adapters_elsewhere_merge(spectral):
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    model = preconditioned(BERT, dtype=torch.float64)
    if spectral:
        condition(model, spectral)
    settings = peft.LoraConfig(target_modules=["query", "value", "intermediate.dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).double().eval()
    expected = outputs_of(adapted, BERT.batch())
    merged = adapted.merge_and_unload()
    assert relative_difference(outputs_of(merged, BERT.batch()), expected) < 1e-12
    assert len(list(preconditioned_layers(merged))) == BERT.layers


def test_a_whole_output_projection_may_be_trained_beside_adapters():
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    model = preconditioned(BERT, dtype=torch.float64)
    expected = outputs_of(model, BERT.batch())
    settings = peft.LoraConfig(target_modules=["query"], modules_to_save=["encoder.layer.0.attention.output.dense"])
    adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).double().eval()
    assert_bit_equal(outputs_of(adapted, BERT.batch()), expected)


def test_a_model_with_an_adapter_is_refused():
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    adapted = peft.get_peft_model(BERT.model(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="has an adapter"):
        precondition(adapted, ROW)


# --- other libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectral", [False, True], ids=["alone", "folded"])
def test_nothing_takes_the_place_of_a_preconditioned_projection(spectral, tmp_path):
    """As quantizers and converters to fp8 do: a module of theirs for each `nn.Linear`, with its weight."""
    model = preconditioned(BERT)
    if spectral:
        condition(model, SpectralConfig(lambda_=1.0))
        fold(model)
    output = model.encoder.layer[1].attention.output
    with pytest.raises(
        ValueError,
        match=r"place of the conditioned projection dense would get its input without preconditioning.*do not quantize",
    ):
        output.dense = torch.nn.Linear(32, 32)
    output.dense = output.dense  # itself is no other
    model.encoder.layer[0].attention.self.query = torch.nn.Linear(32, 32)  # what is stock may be replaced
    # round the guard: found when the model is saved
    dict.__setitem__(model.encoder.layer[0].attention.output._modules, "dense", torch.nn.Linear(32, 32))
    with pytest.raises(
        ValueError, match=r"layer.0.attention.output.dense would get its input without preconditioning"
    ):
        model.save_pretrained(tmp_path)


# --- balance and diagnostics -----------------------------------------------------------------------------------------


def test_balance_leaves_values_and_output_alone():
    model = preconditioned(BERT, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    expected = outputs_of(model, BERT.batch())
    reports = balance(model)
    assert {report.projection: report.left_alone for report in reports} == {
        "query": None, "key": None, "value": PRECONDITIONER,
    }  # fmt: skip
    assert relative_difference(outputs_of(model, BERT.batch()), expected) < 1e-10
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".query." in name or ".key." in name for name in changed)
    with pytest.raises(ValueError, match=rf"No gauge of this model can be used.*rotary.*because of {PRECONDITIONER}"):
        balance(preconditioned(LLAMA, dtype=torch.float64))


def test_diagnostics_see_the_attention_as_it_stands():
    model, stock = preconditioned(BERT, dtype=torch.float64), BERT.model()
    assert spectra(model, output=True) == spectra(stock, output=True)
    # of the first layer; the second has another input
    found, expected = (attention_entropy(each, BERT.batch())[0] for each in (model, stock))
    assert torch.allclose(found, expected)


def test_folding_without_corrections_is_refused():
    with pytest.raises(ValueError, match="no conditioned projection"):
        fold(preconditioned(BERT))
