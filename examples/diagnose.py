"""Look at a model's attention, and find a lambda that does not saturate its softmax.

    python examples/diagnose.py

With the paper's lambda of 10 on query and key, each token of this model attends only to itself, so no gradient reaches W_Q
and W_K. `advise` finds the largest lambda at which that does not happen, by trial on a batch. Prints:

    stock: largest kappa 2704.4, entropy of attention 0.94 of uniform
    lambda 10: largest kappa 1.3, entropy of attention 0.01 of uniform
    saturated layers: (0, 1); for query and key take lambda 3.2
    as advised: largest kappa 2.1, entropy of attention 0.12 of uniform
"""

import copy

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, set_seed

from hf_specattn import SpectralConfig, condition
from hf_specattn.diagnostics import advise, saturation, spectra

set_seed(0)
batch = {"pixel_values": torch.tensor(load_digits().images[:16], dtype=torch.float32)[:, None] / 8 - 1}
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
stock = ViTForImageClassification(
    ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
)


def describe(name, model):
    kappa = max(row.effective.kappa for row in spectra(model))
    rows = saturation(model, batch)
    entropy = sum(row.entropy.mean().item() / row.uniform_entropy for row in rows) / len(rows)
    print(f"{name}: largest kappa {kappa:.1f}, entropy of attention {entropy:.2f} of uniform")


describe("stock", stock)
paper = copy.deepcopy(stock)
condition(paper, SpectralConfig(method="identity", lambda_=10.0))
describe("lambda 10", paper)

advice = advise(paper, batch)
print(f"saturated layers: {advice.saturated_layers}; for query and key take lambda {advice.unsaturated_lambda:g}")
chosen = copy.deepcopy(stock)
lambdas = {"query": advice.unsaturated_lambda, "key": advice.unsaturated_lambda, "value": 10.0}
condition(chosen, SpectralConfig(method="identity", lambda_=lambdas))
describe("as advised", chosen)
