"""transformers' common model tests on stock classes and on conditioned and preconditioned ones (see common_models.sh)."""

import unittest
from typing import Any

import torch
import transformers
from models import ARCHITECTURES
from more_models import FLAGGED
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

import hf_specattn  # noqa: F401  which defines the classes
from hf_specattn import PreconditionerConfig, SpectralConfig, modeling

torch.set_num_threads(1)

VARIANTS: dict[str, tuple[Any, Any]] = {
    "Stock": (None, None),
    "Identity": (SpectralConfig(lambda_=1.0), None),
    "Svd": (SpectralConfig("svd"), None),
    "Row": (None, PreconditionerConfig()),
}
TINY = {
    row.model_type: row
    for row in (*ARCHITECTURES.values(), *FLAGGED)
    if row.model_type in ("bert", "vit", "gpt2", "swin")
}
# Of pictures: their size, the number of patches, and the length of the sequence.
PICTURES = {"vit": (8, 4, 5), "swin": (16, 16, 16)}

# transformers overrides these for such models, too.
OVERRIDDEN = {
    "vit": ["test_model_get_set_embeddings"],
    "swin": ["test_model_get_set_embeddings", "test_attention_outputs", "test_hidden_states_output"],
}
# A correction is a deterministic buffer, computed from the weights beside it: `_init_weights` of its layer alone cannot make
# it, and a checkpoint that lost it is an error, where one that lost its weights gets random ones.
OF_CORRECTIONS = ["test_init_weights_can_init_buffers", "test_model_weights_reload_no_missing_tied_weights"]


class Tester:
    """What the common tests ask of a model: its configuration, its inputs, and its sizes."""

    __test__ = False  # for pytest

    batch_size, is_training, hidden_size, num_hidden_layers, num_attention_heads = 3, True, 32, 2, 4
    intermediate_size, vocab_size, num_labels, num_choices, num_masks = 48, 48, 2, 2, 2
    type_sequence_label_size, mask_ratio, num_channels, patch_size = 2, 0.5, 3, 4

    def __init__(self, parent: Any, model_type: str, variant: str):
        self.parent, self.model_type, self.settings = parent, model_type, VARIANTS[variant]
        self.image_size, self.mask_length, self.seq_length = PICTURES.get(model_type, (0, 7, 7))
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self) -> Any:
        config = TINY[self.model_type].config()
        if self.settings == (None, None):
            return config
        return modeling.conditioned_config_class(self.model_type).from_stock(config, *self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        if self.model_type in PICTURES:
            return self.get_config(), {"pixel_values": floats_tensor([3, 3, self.image_size, self.image_size])}
        shape = [self.batch_size, self.seq_length]
        tokens = ids_tensor(shape, self.vocab_size - 5) + 4  # without those that pad or end a text
        return self.get_config(), {"input_ids": tokens, "attention_mask": random_attention_mask(shape)}


def case(model_type: str, variant: str) -> type:
    """The tests of one model type in one variant."""
    heads = dict.fromkeys(TINY[model_type].classes.values())
    conditioned = {} if variant == "Stock" else modeling.conditioned_models(model_type)
    home, prefix = (modeling, "Spec") if conditioned else (transformers, "")
    skipped = [*OVERRIDDEN.get(model_type, []), *(OF_CORRECTIONS if variant == "Svd" else [])]
    members = {name: unittest.skip("see common_models.py")(lambda self: None) for name in skipped}

    def prepare(self: Any, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = ModelTesterMixin._prepare_for_class(self, inputs, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("BertForPreTraining"):
            inputs |= {
                "labels": torch.zeros((3, 7), dtype=torch.long),
                "next_sentence_label": torch.zeros(3, dtype=torch.long),
            }
        return inputs

    members |= {
        "all_model_classes": tuple(getattr(home, prefix + name) for name in heads),
        "all_generative_model_classes": (),  # the tests of generation are not in the distribution
        "test_resize_embeddings": model_type not in PICTURES,
        "setUp": lambda self: setattr(self, "model_tester", Tester(self, model_type, variant)),
        "_prepare_for_class": prepare,
        "__module__": __name__,
    }
    return type(f"Test{model_type.title()}{variant}", (ModelTesterMixin, unittest.TestCase), members)


for each in (case(model_type, variant) for model_type in TINY for variant in VARIANTS):
    globals()[each.__name__] = each
del each
