"""Publishing, with a recorded HfApi: the exact files, one commit, no token anywhere."""

import json
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard
from models import ARCHITECTURES
from scripts_loading import REPOSITORY
from transformers import AutoModel

from hf_specattn import CrammedBertConfig, CrammedBertForMaskedLM, SpectralConfig, condition
from hf_specattn.checkpoints import publishing
from hf_specattn.checkpoints.cards import PRECONDITIONER_TEMPLATE, TEMPLATE_OF
from hf_specattn.checkpoints.conversion import Options, convert, fold_checkpoint
from hf_specattn.checkpoints.evaluations_file import write_evaluations
from hf_specattn.checkpoints.publishing import PublishingError, plan, publish
from hf_specattn.checkpoints.remote_code import source_files
from hf_specattn.checkpoints.source_checkpoint import SourceError

BERT = ARCHITECTURES["bert"]
CRAMMED_SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CODE = {file.name for file in source_files("specattn_bert")}  # which these are: test_imports.py
SECRET = "hf_thisIsASecretToken"


@pytest.fixture
def api(monkeypatch):
    """An HfApi that takes what the real one takes, does nothing, and remembers."""
    recorded = create_autospec(HfApi, instance=True)
    recorded.create_repo.side_effect = lambda repo_id, **_: SimpleNamespace(repo_id=repo_id)
    recorded.file_exists.return_value = False
    recorded.uploaded = {}

    def create_commit(repo_id, operations, **_):
        for operation in operations:  # temporary files are gone afterwards
            with operation.as_file() as stream:
                recorded.uploaded[operation.path_in_repo] = stream.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1", pr_url=None)

    recorded.create_commit.side_effect = create_commit
    monkeypatch.setattr(publishing, "HfApi", lambda: recorded)
    return recorded


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    BERT.model("AutoModelForMaskedLM", torch.float32).save_pretrained(folder / "source", max_shard_size="30KB")
    card = "---\nlicense: cc-by-4.0\nlanguage: en\ndatasets: [snli]\ntags: [mine]\n---\n# Source\n"
    (folder / "source" / "README.md").write_text(card)
    options = Options(base_model="someone/tiny-bert")
    convert(str(folder / "source"), folder / "svd", SpectralConfig("svd"), options=options)
    fold_checkpoint(str(folder / "svd"), folder / "folded")
    return folder


def test_push_uploads_exactly_the_checkpoint_in_one_commit(converted, api, tmp_path):
    folder = converted / "svd"
    for name in ("optimizer.pt", "notes.txt", "checkpoint-000010/model.safetensors", ".cache/huggingface/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not to be published")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    publication = plan(folder, "me/tiny-svd")
    publish(publication, private=True, commit_message="First")

    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) >= 3
    expected = (
        {"config.json", "model.safetensors.index.json", "README.md", "kappa.png", "specattn.json"} | CODE | shards
    )
    assert api.uploaded.keys() == expected
    assert all(content == (folder / name).read_bytes() for name, content in api.uploaded.items())
    assert set(publication.left_out) == {"optimizer.pt", "notes.txt", "checkpoint-000010/model.safetensors"}
    api.create_repo.assert_called_once_with("me/tiny-svd", private=True, token=None, exist_ok=True)
    api.create_commit.assert_called_once()
    assert api.create_commit.call_args.kwargs["commit_message"] == "First"
    api.create_branch.assert_not_called()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    text = publication.describe()
    assert all(name in text for name in expected)
    assert "Left out: checkpoint-000010/model.safetensors, notes.txt, optimizer.pt" in text


def test_a_dry_run_asks_nothing_of_the_hub(converted, api):
    plan(converted / "folded", "me/folded").describe()
    assert not api.method_calls


def test_a_branch_and_a_pull_request(converted, api):
    publish(plan(converted / "folded", "me/folded"), revision="v2", create_pr=True)
    api.create_branch.assert_called_once_with("me/folded", branch="v2", token=None, exist_ok=True)
    assert api.create_commit.call_args.kwargs["revision"] == "v2"
    assert api.create_commit.call_args.kwargs["create_pr"] is True
    assert not CODE & api.uploaded.keys()


def test_what_a_folder_lacks_is_made_for_the_commit(api, tmp_path):
    model = BERT.model("AutoModelForMaskedLM", torch.float32)
    condition(model, SpectralConfig("svd"))
    model.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    publication = plan(tmp_path, "me/trained")
    publish(publication)
    assert api.uploaded.keys() == {"config.json", "model.safetensors", "README.md", "kappa.png"} | CODE
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (
        json.loads(api.uploaded["config.json"])["auto_map"]["AutoModelForMaskedLM"] == "modeling.SpecBertForMaskedLM"
    )
    card = ModelCard(api.uploaded["README.md"].decode())
    assert 'AutoModelForMaskedLM.from_pretrained("me/trained", trust_remote_code=True)' in card.content
    assert "outputs differ by" not in card.content  # nobody measured it
    assert "config.json" in publication.describe()


def test_the_card_of_a_user_stays_unless_a_new_one_is_asked_for(converted):
    own = converted / "folded" / "README.md"
    generated = own.read_text()
    own.write_text("---\nlicense: mit\n---\nMine.\n")
    try:
        assert plan(converted / "folded", "me/x").files["README.md"] == own
        content = plan(converted / "folded", "me/x", new_card=True).files["README.md"]
        card = ModelCard(content.decode())
        assert card.data.license == "mit"
        assert 'from_pretrained("me/x")' in card.content
    finally:
        own.write_text(generated)


def test_the_metadata(converted):
    card = ModelCard.load(converted / "svd" / "README.md").data
    assert card.license == "cc-by-4.0"
    assert card.base_model == "someone/tiny-bert"
    assert card.datasets == ["snli"]
    assert {"mine", "spectral-conditioning"} <= set(card.tags)
    assert card.pipeline_tag == "fill-mask"
    assert card.eval_results is None
    assert ModelCard.load(converted / "folded" / "README.md").data.base_model == "someone/tiny-bert"


def test_measurements_beside_the_checkpoint_are_in_the_card(converted):
    folder = converted / "folded"
    books = {"dataset_type": "org/books", "dataset_name": "org/books, 10 documents", "dataset_split": "validation"}
    own = [
        EvalResult("fill-mask", **books, metric_type="perplexity", metric_name="Perplexity", metric_value=7.389),
        EvalResult("fill-mask", **books, metric_type="loss", metric_value=2.0),
    ]
    glue = EvalResult(
        "text-classification", "nyu-mll/glue", "GLUE MRPC", "accuracy", "0.6 ± 0.1", dataset_config="mrpc"
    )
    write_evaluations(folder, "tiny", own)
    write_evaluations(folder, "tiny", [glue], "evaluations_glue-tiny.json")
    for name in ("metrics.json", "results.json"):  # the experiments' records: published, not read
        (folder / name).write_text("{")
    try:
        publication = plan(folder, "me/x", new_card=True)
        card = ModelCard(publication.files["README.md"].decode())
        assert card.data.model_name == "x"
        assert card.data.eval_results == [*own, glue]
        rows = ["| org/books, 10 documents, validation | Perplexity | 7.389 |", "| GLUE MRPC | accuracy | 0.6 ± 0.1 |"]
        assert all(row in card.content for row in [*rows, "| org/books, 10 documents, validation | loss | 2 |"])
        published = {"metrics.json", "results.json", "evaluations.json", "evaluations_glue-tiny.json"}
        assert published <= publication.files.keys()
        (folder / "evaluations.json").write_text("{")
        with pytest.raises(ValueError, match=r"evaluations.json is damaged"):
            plan(folder, "me/x", new_card=True)
    finally:
        for name in published:
            (folder / name).unlink()


def test_push_to_hub_of_a_model(api, tmp_path, stock_checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = stock_checkpoint(BERT)
    model = AutoModel.from_pretrained(path, spectral_conditioning=True, lambda_=2.0)
    address = model.push_to_hub("me/pushed", private=True, token=SECRET, max_shard_size="100KB", tags=["mine"])
    shards = {name for name in api.uploaded if name.endswith(".safetensors")}
    assert len(shards) > 1
    extra = {"config.json", "model.safetensors.index.json", "README.md", "kappa.png"}
    assert api.uploaded.keys() == extra | CODE | shards
    api.create_commit.assert_called_once()
    assert address.commit_url.startswith("https://hub/me/pushed")
    assert api.create_commit.call_args.kwargs["token"] == SECRET
    assert not any(SECRET.encode() in content for content in api.uploaded.values())
    assert {"mine", "spectral-conditioning"} <= set(ModelCard(api.uploaded["README.md"].decode()).data.tags)

    api.uploaded.clear()
    api.file_exists.return_value = True  # a card that somebody wrote there
    model.push_to_hub("me/pushed")
    assert "README.md" not in api.uploaded
    assert api.uploaded.keys() >= CODE


def test_push_to_hub_of_a_preconditioned_model(api, stock_checkpoint):
    model = AutoModel.from_pretrained(stock_checkpoint(BERT), attention_preconditioner="row").train()
    model.push_to_hub("me/pushed")
    assert model.training
    assert api.uploaded.keys() == {"config.json", "model.safetensors", "README.md"} | CODE  # no kappa(W + C) to draw
    card = ModelCard(api.uploaded["README.md"].decode())
    assert "preconditioned-attention" in card.data.tags
    assert "spectral-conditioning" not in card.data.tags
    assert "A BertModel with a **preconditioner of attention**" in card.content
    assert "third-party reading" in card.content


@pytest.mark.parametrize("repo_id", ["a/b/c", "bad name", ""])
def test_a_bad_name_is_refused(repo_id, converted, api):
    with pytest.raises(PublishingError, match="is not a valid name on the Hub"):
        plan(converted / "folded", repo_id)
    assert not api.method_calls


def test_what_cannot_be_published(tmp_path, stock_checkpoint, api):
    with pytest.raises(PublishingError, match="is not a folder; only local folders can be published"):
        plan("someone/model", "me/x")
    with pytest.raises(SourceError, match=r"no config\.json"):
        plan(tmp_path, "me/x")
    with pytest.raises(SourceError, match=r"Add a README\.md"):
        plan(stock_checkpoint(BERT), "me/x")


def test_the_templates_are_declared_as_package_data():
    import tomllib

    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"]["hf_specattn.model_cards"] == "model_cards"
    declared = set(setuptools["package-data"]["hf_specattn.model_cards"])
    assert {*TEMPLATE_OF.values(), PRECONDITIONER_TEMPLATE} == declared
    assert all((REPOSITORY / "model_cards" / name).is_file() for name in declared)


def test_the_card_is_written_to_be_read(converted, tmp_path):
    publication = plan(converted / "folded", "me/x", new_card=True)
    assert publication.write_card(tmp_path / "new" / "folder") == ["README.md", "kappa.png"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert written["README.md"] == publication.files["README.md"]
    assert written["kappa.png"] == (converted / "folded" / "kappa.png").read_bytes()


def test_the_card_of_a_model_that_was_trained_names_no_source(api, tmp_path):
    model = CrammedBertForMaskedLM(CrammedBertConfig(**CRAMMED_SIZES))
    condition(model, SpectralConfig("svd"))
    model.save_pretrained(tmp_path / "svd")
    text = plan(tmp_path / "svd", "me/trained").files["README.md"].decode()
    assert "A CrammedBertForMaskedLM with **spectrally conditioned attention**" in text
    assert "for the weights in this repository" in text
    assert "None is named yet" in text
    assert "The source" not in text
    assert "only transformers' code" not in text
    stock = BERT.model("AutoModelForMaskedLM", torch.float32)
    condition(stock, SpectralConfig("svd"))
    stock.save_pretrained(tmp_path / "bert")
    assert "only transformers' code" in plan(tmp_path / "bert", "me/x").files["README.md"].decode()
