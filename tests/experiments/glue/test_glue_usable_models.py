"""Which checkpoints GLUE can be fine-tuned on, found before the data are read; how padding and token types reach them."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    NystromformerConfig,
    NystromformerModel,
    RobertaConfig,
    RobertaModel,
)

from recipes.glue.features import Collator, tokenize
from recipes.glue.glue_arguments import GlueArguments
from recipes.glue.glue_files import Examples
from recipes.glue.glue_models import check_models, load_model, plan_variants
from recipes.glue.prediction import accepted_inputs
from recipes.glue.tasks import TASKS
from recipes.run.spectral_arguments import SpectralArguments
from recipes.run.usable_model import ModelError
from recipes.text.documents import Document
from recipes.text.tokenization import train_wordpiece

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = [("one two", "three"), ("one two three four one two three", "four one two"), ("two", "one two three four")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("d", "one two three four a b")], 60)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A function: save a model with the tokenizer beside it."""

    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def planned(folder, length=32, **changes):
    arguments = GlueArguments([str(folder)], max_seq_length=length, output_dir=str(folder / "run"), **changes)
    return plan_variants(arguments, SpectralArguments()), arguments.resolved_protocol


def check(folder, tasks=("rte", "cola"), **options):
    variants, protocol = planned(folder, **options)
    check_models(variants, [TASKS[name] for name in tasks], protocol)
    return variants[0], protocol


@torch.no_grad()
def logits_of(folder, rows=None, **options):
    """The logits of three pairs, in one batch, or each by itself."""
    variant, protocol = check(folder, **options)
    torch.manual_seed(0)
    model = load_model(variant, TASKS["rte"], protocol).eval()
    tokens = tokenize(Examples(TEXTS, None, ["0", "1", "2"], "texts"), variant.tokenizer, protocol.max_seq_length)
    collate = Collator(variant.tokenizer, accepted_inputs(model), torch.device("cpu"))
    if rows is None:
        return model(**collate(tokens, [0, 1, 2])).logits
    return torch.cat([model(**collate(tokens, [row])).logits for row in rows])


@pytest.mark.parametrize("pad_token_id", [None, 7])
def test_a_causal_model_classifies_by_the_last_token_of_the_text(saved, tokenizer, pad_token_id):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=2,
                        eos_token_id=3, pad_token_id=pad_token_id)  # fmt: skip
    folder = saved(GPT2LMHeadModel(config))
    together, alone = logits_of(folder), logits_of(folder, rows=[0, 1, 2])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together - together[0]).abs().max() > 1e-4  # and not by a token that they share


def test_token_types_are_left_out_where_the_model_has_one(saved, tokenizer):
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 0, **SIZES}
    folder = saved(RobertaModel(RobertaConfig(type_vocab_size=1, **settings)))
    assert logits_of(folder).shape == (3, 2)
    two = saved(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)), "two")
    model = load_model(check(two)[0], TASKS["rte"], check(two)[1])
    assert "token_type_ids" in accepted_inputs(model)


def test_a_model_that_cannot_read_a_batch_is_refused(saved, tokenizer):
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), "num_landmarks": 8, "segment_means_seq_len": 32, **SIZES}
    folder = saved(NystromformerModel(NystromformerConfig(max_position_embeddings=64, **settings)))
    with pytest.raises(ModelError, match=r"cannot read a batch of .*input_ids \(1, \d+\).*--max_seq_length") as caught:
        check(folder)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_weights(saved, tokenizer):
    torch.manual_seed(0)
    folder = saved(BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES)))
    check(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:1000], content[:-10], b"", b"no weights"):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match="cannot be loaded as a model for SequenceClassification") as caught:
            check(folder)
        assert "\n" not in str(caught.value)
    other = saved(GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)), "other")
    weights.write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(
        ModelError, match=r"lacks \d+ weights of a BertForSequenceClassification \(.*which would be random"
    ):
        check(folder)


def test_a_classifier_of_another_size_and_what_reads_no_text(saved, tokenizer):
    from transformers import BertForSequenceClassification, ViTConfig, ViTModel

    torch.manual_seed(0)
    folder = saved(BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=3, **SIZES)))
    with pytest.raises(ModelError, match="another number of outputs than 2"):
        check(folder)
    check(folder, tasks=("mnli",))
    check(folder, ignore_mismatched_sizes=True)
    folder = saved(ViTModel(ViTConfig(**SIZES)), "vit")
    with pytest.raises(ModelError, match="vit"):
        check(folder)


def test_the_check_draws_nothing_from_the_generator(saved, tokenizer):
    folder = saved(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check(folder)
    assert torch.equal(torch.rand(2), expected)
