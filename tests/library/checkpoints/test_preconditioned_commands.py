"""`specattn` on preconditioned checkpoints: each command against the model that it should give, in float64."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from models import (
    ARCHITECTURES,
    CORRECTIONS,
    HEADS,
    add_correction,
    assert_bit_equal,
    outputs_of,
    relative_difference,
)
from transformers import AutoModel

import specattn as cli
from hf_specattn import PreconditionerConfig, SpectralConfig
from hf_specattn.checkpoints.conversion import balance_checkpoint, convert, fold_checkpoint
from hf_specattn.checkpoints.inspection import inspect_checkpoint
from hf_specattn.checkpoints.publishing import plan
from hf_specattn.checkpoints.source_checkpoint import SourceError
from hf_specattn.layers import spectral_layers
from hf_specattn.preconditioning import find_output_projections, preconditioning_reports

BERT, GPT2, VIT, LLAMA = (ARCHITECTURES[name] for name in ("bert", "gpt2", "vit", "llama"))
ROW = PreconditionerConfig()
each_kind = pytest.mark.parametrize("spectral", [None, SpectralConfig("svd"), SpectralConfig(lambda_=10.0)], ids=str)


def load(folder):
    return AutoModel.from_pretrained(folder, dtype="auto")


def normalized(model, norms=None):
    """A stock model whose output projections see each head's rows with norm 1, or the norm of their attention."""
    for index, item in enumerate(find_output_projections(model)):

        def scale(module, args, norm=1.0 if norms is None else norms[index]):
            parts = [part / part.square().sum(-1, keepdim=True).sqrt() for part in args[0].chunk(HEADS, dim=-1)]
            return (norm * torch.cat(parts, dim=-1),)

        item.module.register_forward_pre_hook(scale)
    return model


@pytest.fixture(scope="module")
def both(stock_checkpoint, tmp_path_factory):
    """BERT, preconditioned and with svd corrections."""
    folder = tmp_path_factory.mktemp("both") / "both"
    convert(str(stock_checkpoint(BERT)), folder, SpectralConfig("svd"), preconditioner=ROW)
    return folder


@pytest.fixture(scope="module")
def alone(stock_checkpoint, tmp_path_factory):
    """BERT, preconditioned alone."""
    folder = tmp_path_factory.mktemp("alone") / "alone"
    convert(str(stock_checkpoint(BERT)), folder, None, preconditioner=ROW)
    return folder


@pytest.mark.parametrize("tiny", [BERT, GPT2, VIT, LLAMA], ids=str)
@each_kind
def test_convert_is_normalized_heads_and_w_plus_c(tiny, spectral, stock_checkpoint, tmp_path):
    source = stock_checkpoint(tiny)
    result = convert(str(source), tmp_path / "new", spectral, preconditioner=ROW)
    expected = tiny.model()
    if spectral is not None:
        add_correction(tiny, expected, CORRECTIONS[spectral.method])
    loaded = load(tmp_path / "new")
    batch = tiny.batch()
    assert relative_difference(outputs_of(loaded, batch), outputs_of(normalized(expected), batch)) < 1e-11
    assert loaded.config.spectral_config == spectral
    assert loaded.config.preconditioner_config == ROW
    assert "third-party reading of arXiv 2603.27153" in result.describe()
    assert "The function has changed: train the model before use." in result.describe()
    record = json.loads((tmp_path / "new" / "specattn.json").read_text())
    assert record["preconditioner"] == ROW.to_dict()
    assert record["spectral"] == (None if spectral is None else spectral.to_dict())
    assert [row["heads"] for row in record["heads"]] == [HEADS] * tiny.layers
    assert bool(record["rows"]) == (spectral is not None)


def test_preserved_weights_are_preconditioned_with_the_norms_of_the_probe(stock_checkpoint, tmp_path):
    match = PreconditionerConfig(scale="match", gradient="through", eps=1e-9)
    convert(str(stock_checkpoint(BERT)), tmp_path / "new", SpectralConfig("svd"), "preserve", preconditioner=match)
    loaded = load(tmp_path / "new")
    assert loaded.config.preconditioner_config == match
    norms = loaded.config.preconditioner_norms
    assert len(norms) == BERT.layers
    expected = normalized(BERT.model(), norms)  # W - C + C
    assert relative_difference(outputs_of(loaded, BERT.batch()), outputs_of(expected, BERT.batch())) < 1e-11


def test_fold_takes_the_corrections_and_leaves_the_preconditioner(both, tmp_path):
    result = fold_checkpoint(str(both), tmp_path / "folded")
    assert "The preconditioner stays" in result.describe()
    loaded = load(tmp_path / "folded")
    assert not list(spectral_layers(loaded))
    assert loaded.config.preconditioner_config == ROW
    assert loaded.config.spectral_config is None
    assert_bit_equal(outputs_of(loaded, BERT.batch()), outputs_of(load(both), BERT.batch()))
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "with only a preconditioner of attention, which no weight can hold" in card
    assert 'condition(model, SpectralConfig("svd"), init="preserve")' in card
    assert "trust_remote_code=True" in card


def test_there_is_nothing_to_fold_in_a_preconditioner_alone(alone, tmp_path):
    with pytest.raises(SourceError, match=r"alone is preconditioned .*nothing to fold.*it stays"):
        fold_checkpoint(str(alone), tmp_path / "folded")


def test_balance_keeps_function_and_preconditioner_and_leaves_values_alone(alone, both, tmp_path):
    balance_checkpoint(str(alone), tmp_path / "balanced")
    loaded, before = load(tmp_path / "balanced"), load(alone)
    assert relative_difference(outputs_of(loaded, BERT.batch()), outputs_of(before, BERT.batch())) < 1e-11
    assert loaded.config.preconditioner_config == ROW
    state = before.state_dict()
    changed = {name for name, value in loaded.state_dict().items() if not torch.equal(value, state[name])}
    assert {name.rpartition("self.")[2].partition(".")[0] for name in changed} == {"query", "key"}
    card = (tmp_path / "balanced" / "README.md").read_text()
    assert "value and output are left alone" in card
    assert "spectral_init" not in card  # which a preconditioned checkpoint does not take
    with pytest.raises(SourceError, match="both is conditioned; balancing W would change W"):
        balance_checkpoint(str(both), tmp_path / "twice")


def test_convert_refuses_what_is_preconditioned_already(alone, both, tmp_path):
    with pytest.raises(SourceError, match=r"alone is already preconditioned.*load it, condition\(model"):
        convert(str(alone), tmp_path / "new", SpectralConfig())
    with pytest.raises(SourceError, match="both is already conditioned"):
        convert(str(both), tmp_path / "new", None, preconditioner=ROW)
    with pytest.raises(ValueError, match="nothing to convert to"):
        convert(str(alone), tmp_path / "new", None)


@pytest.mark.parametrize("name", ["alone", "both"])
def test_inspect_measures_the_heads(name, request):
    folder = request.getfixturevalue(name)
    found = inspect_checkpoint(str(folder))
    assert found.facts["preconditioned"].startswith("row(unit, detached): a third-party reading")
    assert found.facts["conditioned"].startswith("svd()" if name == "both" else "no")
    assert found.facts["loads without the package"] == "with trust_remote_code=True"
    assert len(found.heads) == BERT.layers
    assert "kappa(C A)" in found.describe()


def test_the_reports_are_of_the_layers_as_they_stand(alone, both):
    model = load(alone)
    probe = {"input_ids": BERT.batch()["input_ids"][:1]}  # padding would make heads singular
    reports = preconditioning_reports(model, probe)
    seen = []
    for item in find_output_projections(model):
        item.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**probe)
    for report, heads in zip(reports, seen, strict=True):
        a = heads.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        kappa = torch.linalg.cond(a).log().mean(0).exp()
        assert report.kappa_before == pytest.approx(kappa.tolist(), rel=1e-6)
        after = torch.linalg.cond(a / a.norm(dim=-1, keepdim=True)).log().mean(0).exp()
        assert report.kappa_after == pytest.approx(after.tolist(), rel=1e-6)
        assert report.mean_kappa == pytest.approx((kappa.log().mean().exp().item(), after.log().mean().exp().item()))
    with pytest.raises(ValueError, match="BertModel has no preconditioner"):
        preconditioning_reports(BERT.model())


@pytest.mark.parametrize("name", ["alone", "both"])
@pytest.mark.parametrize("with_record", [True, False])
def test_push_brings_code_and_a_card_that_says_so(name, with_record, request, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(name), folder)
    for file in ("README.md", "kappa.png", *([] if with_record else ["specattn.json"])):
        (folder / file).unlink(missing_ok=True)
    publication = plan(folder, "me/tiny")
    assert {"README.md", "modeling.py", "preconditioner.py", "model.safetensors"} <= publication.files.keys()
    card = ModelCard(publication.files["README.md"].decode())
    assert ("spectral-conditioning" in card.data.tags) == (name == "both")
    assert "preconditioned-attention" in card.data.tags
    assert "third-party reading of *Preconditioned Attention*" in card.content
    assert "| kappa | 2 |" in card.content
    assert ("| kappa(query) | 2 |" in card.content) == (name == "both")
    assert "as a plain" not in card.content.lower()
    assert ("A BertModel with" in card.content) == (not with_record)
    assert "\n\n\n" not in card.content


def test_the_flags_of_the_command(stock_checkpoint, tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr(
            "sys.argv", ["specattn", "convert", str(stock_checkpoint(BERT)), str(tmp_path / "x"), *flags]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().err

    flags = ("--preconditioner-scale", "rms", "--preconditioner-gradient", "through", "--preconditioner-eps", "1e-4")
    assert run("--preconditioner", "row", *flags) == (0, "")
    config = load(tmp_path / "x").config
    assert config.preconditioner_config == PreconditionerConfig("row", "through", "rms", 1e-4)
    assert config.spectral_config is None
    assert run("--preconditioner", "row", "--method", "identity", "--lambda", "2", "--overwrite") == (0, "")
    assert load(tmp_path / "x").config.spectral_config == SpectralConfig(lambda_=2.0)
    for flags, message in {
        ("--preconditioner", "row", "--lambda", "1"): "--lambda does nothing with --preconditioner alone",
        ("--preconditioner", "row", "--init", "preserve"): "--init does nothing with --preconditioner alone",
        ("--preconditioner-scale", "rms"): "--preconditioner-scale does nothing without --preconditioner",
        ("--preconditioner", "column"): "it reads texts, whose batches are padded. Use axis='row'",
        ("--preconditioner", "row", "--preconditioner-eps", "0"): "eps=0.0 is not allowed",
    }.items():
        code, error = run(*flags, "--overwrite")
        assert (code, error.count("\n")) == (1, 1)
        assert message in error
    code, error = run("--preconditioner", "diagonal", "--overwrite")
    assert code == 2
    assert "'diagonal' is not one of 'row', 'column'" in error
