"""`pipeline("fill-mask")` on conditioned checkpoints, and image classification."""

import pytest
import torch
from models import ARCHITECTURES, VOCABULARY, add_correction, each_method, identity_by_numpy, svd_by_numpy
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    pipeline,
)

pytestmark = pytest.mark.integration

SETTINGS = {"identity": {"lambda_": 1.0}, "svd": {"spectral_method": "svd"}}
CORRECTIONS = {"identity": identity_by_numpy(1.0), "svd": svd_by_numpy}
MASKED_LM = [tiny for tiny in ARCHITECTURES.values() if "AutoModelForMaskedLM" in tiny.classes]


def word_piece_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *"abcdefghijklmnopqrstuvwxyz.", "##s", "##ing", "the", "layer", "norm"]
    pieces += [f"[unused{index}]" for index in range(VOCABULARY - len(pieces))]
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=24, **names)


@pytest.mark.parametrize("tiny", MASKED_LM, ids=str)
@each_method
def test_fill_mask(tiny, method, stock_checkpoint, tmp_path, warning_log):
    path = stock_checkpoint(tiny, "AutoModelForMaskedLM")
    model = AutoModelForMaskedLM.from_pretrained(path, spectral_conditioning=True, **SETTINGS[method])
    model.save_pretrained(tmp_path)
    tokenizer = word_piece_tokenizer()
    tokenizer.save_pretrained(tmp_path)

    warning_log.messages.clear()
    fill = pipeline("fill-mask", model=str(tmp_path), device="cpu")
    texts = ["The layers [MASK] norm.", "[MASK] norming"]
    answers = fill(texts, top_k=3)
    # transformers logs an error for a model class that it does not take for a masked language model
    assert not [message for message in warning_log.messages if "not supported" in message]

    expected_model = add_correction(tiny, tiny.model("AutoModelForMaskedLM"), CORRECTIONS[method])
    for text, answer in zip(texts, answers):
        encoded = tokenizer(text, return_tensors="pt")
        position = encoded["input_ids"][0].tolist().index(4)
        with torch.no_grad():
            probabilities = expected_model(**encoded).logits[0, position].softmax(-1)
        scores, tokens = probabilities.topk(3)
        assert [entry["token"] for entry in answer] == tokens.tolist()
        assert [entry["score"] for entry in answer] == pytest.approx(scores.tolist(), rel=1e-5)


@each_method
def test_image_classification(method, stock_checkpoint, tmp_path):
    tiny = ARCHITECTURES["vit"]
    path = stock_checkpoint(tiny, "AutoModelForImageClassification")
    model = AutoModelForImageClassification.from_pretrained(path, spectral_conditioning=True, **SETTINGS[method])
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    image = Image.frombytes("RGB", (12, 9), bytes(range(256)) + bytes(68))
    # The checkpoint is in float64 and pixels are not.
    answer = pipeline("image-classification", model=str(tmp_path), dtype=torch.float32, device="cpu")(image)
    expected = add_correction(tiny, tiny.model("AutoModelForImageClassification", torch.float32), CORRECTIONS[method])
    with torch.no_grad():
        probabilities = expected(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    scores = {entry["label"]: entry["score"] for entry in answer}
    assert scores == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(probabilities.tolist())}, rel=1e-4)
