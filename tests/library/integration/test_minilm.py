"""A pretrained sentence encoder: what users see of preserve, fold and additive."""

import pytest
import torch
from models import identity_by_numpy
from transformers import AutoModel, AutoTokenizer

from hf_specattn import fold

pytestmark = pytest.mark.integration

SENTENCES = [
    "Spectral conditioning adds a correction to the query, key and value projections.",
    "The cat sat on the mat.",
    "A cat is sitting on a rug, and it does not look as if it were going to get up soon.",
    "Short.",
]
SETTINGS = {"identity": {"lambda_": 10.0}, "svd": {"spectral_method": "svd"}}


@pytest.fixture(scope="module")
def embed(minilm_path):
    batch = AutoTokenizer.from_pretrained(minilm_path)(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)

    @torch.no_grad()
    def mean_pooled_and_normalized(model):
        hidden = model(**batch).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return mean_pooled_and_normalized


@pytest.fixture(scope="module")
def stock_embeddings(minilm_path, embed):
    embeddings = embed(AutoModel.from_pretrained(minilm_path))
    # The model is the one it should be: the two sentences about a cat are the closest.
    similarity = embeddings @ embeddings.T - 2 * torch.eye(len(SENTENCES))
    assert divmod(similarity.argmax().item(), len(SENTENCES)) in ((1, 2), (2, 1))
    return embeddings


@pytest.mark.parametrize("method", ["identity", "svd"])
def test_preserve_and_its_fold_keep_the_embeddings(method, minilm_path, embed, stock_embeddings):
    kwargs = {"spectral_conditioning": True, "spectral_init": "preserve", **SETTINGS[method]}
    model = AutoModel.from_pretrained(minilm_path, **kwargs)
    assert type(model).__name__ == "SpecBertModel"
    assert (embed(model) - stock_embeddings).abs().max() < 1e-5
    fold(model)
    assert type(model).__name__ == "BertModel"
    assert (embed(model) - stock_embeddings).abs().max() < 1e-5


def test_default_lambda_and_additive_equal_numpy(minilm_path, embed, stock_embeddings):
    model = AutoModel.from_pretrained(minilm_path, spectral_conditioning=True, lambda_=10.0)
    expected = AutoModel.from_pretrained(minilm_path)
    changed = 0
    for name, weight in expected.state_dict().items():
        if name.endswith(("self.query.weight", "self.key.weight", "self.value.weight")):
            matrix = weight.numpy()
            matrix += identity_by_numpy(10.0)(matrix, name).astype(matrix.dtype)
            changed += 1
    assert changed == 3 * 6
    embeddings = embed(model)
    assert (embeddings - embed(expected)).abs().max() < 1e-5
    # and it is another function: that is what the warning says
    assert (embeddings - stock_embeddings).abs().max() > 0.01
