"""Logits of whole sets in any batch size, and submission files read back."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification

from hf_specattn import CrammedBertConfig, CrammedBertForSequenceClassification
from recipes.glue.features import Collator, tokenize
from recipes.glue.glue_files import Examples
from recipes.glue.prediction import accepted_inputs, predict_logits, write_submission
from recipes.glue.tasks import TASKS
from recipes.run.run_metrics import NonFiniteLossError
from recipes.text.documents import Document
from recipes.text.tokenization import train_wordpiece

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "did", "not", "sit", "there", "at", "all"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("a", " ".join(WORDS))], 100)


@pytest.fixture(scope="module")
def examples(tokenizer):
    texts = [(" ".join(WORDS[: 1 + number % 13]),) for number in range(23)]
    return tokenize(Examples(texts, None, [str(n) for n in range(23)], "here"), tokenizer, 32)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=3, initializer_range=0.5, **SIZES)
    return BertForSequenceClassification(config)


def predict(model, examples, tokenizer, batch_size, num_outputs=3):
    accelerator = Accelerator(cpu=True)
    collate = Collator(tokenizer, accepted_inputs(model), accelerator.device)
    return predict_logits(model, examples, collate, accelerator, num_outputs=num_outputs, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 23, 100])
def test_every_example_has_its_own_logits(model, examples, tokenizer, batch_size):
    model.train()  # with dropout, which must not act
    logits = predict(model, examples, tokenizer, batch_size)
    assert model.training
    model.eval()
    for index in range(len(examples)):
        inputs = {name: torch.tensor(rows) for name, rows in examples.rows([index]).items()}
        with torch.no_grad():
            expected = model(**inputs).logits[0].numpy()
        np.testing.assert_allclose(logits[index], expected, rtol=1e-4, atol=1e-5)
    assert logits.dtype == np.float32


def test_nan_logits_are_a_failure(model, examples, tokenizer):
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    with pytest.raises(NonFiniteLossError, match="The logits of 23 of 23 examples are nan or infinite"):
        predict(model, examples, tokenizer, 7)


def test_the_inputs_that_models_take():
    crammed = CrammedBertForSequenceClassification(CrammedBertConfig(vocab_size=50, **SIZES))
    assert {"input_ids", "attention_mask", "token_type_ids"} <= accepted_inputs(crammed)


# -------------------------------------------------------------------------------------------------------- submissions


@pytest.mark.parametrize(
    ("name", "logits", "expected"),
    [
        (
            "mnli",
            [[0, 1, 2], [3, 1, 2]],
            {"MNLI-m": ["contradiction", "entailment"], "MNLI-mm": ["contradiction", "entailment"]},
        ),
        ("sst2", [[0, 1], [1, 0]], {"SST-2": ["1", "0"]}),
        ("rte", [[0, 1], [1, 0]], {"RTE": ["not_entailment", "entailment"]}),
        ("qnli", [[0, 1], [1, 0]], {"QNLI": ["not_entailment", "entailment"]}),
        ("qqp", [[0, 1], [1, 0]], {"QQP": ["1", "0"]}),
        ("mrpc", [[0, 1], [1, 0]], {"MRPC": ["1", "0"]}),
        ("cola", [[0, 1], [1, 0]], {"CoLA": ["1", "0"]}),
        ("stsb", [[3.14159], [7.0]], {"STS-B": ["3.142", "5.000"]}),
    ],
)
def test_submission_files(name, logits, expected, tmp_path):
    task = TASKS[name]
    for split in task.splits_of("test"):
        write_submission(tmp_path / "new", task, split, ["10", "12"], np.asarray(logits, dtype=np.float32))
    written = {path.stem: path.read_text().splitlines() for path in (tmp_path / "new").iterdir()}
    assert written == {
        title: ["index\tprediction", f"10\t{values[0]}", f"12\t{values[1]}"] for title, values in expected.items()
    }


def test_a_submission_needs_a_prediction_for_every_row(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        write_submission(tmp_path, TASKS["rte"], TASKS["rte"].splits_of("test")[0], ["1"], np.zeros((2, 2)))
