"""Put a LoRA adapter on a conditioned model, train it, and ship plain weights.

    python examples/lora.py

The adapter adds B A to a projection that computes with W + C. After merging and folding, everything is in the weights of a
plain ViT, which needs neither PEFT nor this package. Prints:

    trainable parameters: 2,698 of 71,892
    loss 2.51 before, 0.46 after
    plain: ViTForImageClassification, outputs changed by at most 0.0000
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, set_seed

from hf_specattn import SpectralConfig, condition, fold

set_seed(0)
digits = load_digits()
pixels, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
base = ViTForImageClassification(
    ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
)
condition(base, SpectralConfig(method="svd"))  # before the adapter
with (
    tempfile.TemporaryDirectory() as folder
):  # saved and loaded, so that the adapter's configuration can name its base
    base.save_pretrained(folder)
    base = type(base).from_pretrained(folder)

adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
model = get_peft_model(base, adapter)
trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(f"trainable parameters: {trainable:,} of {sum(parameter.numel() for parameter in model.parameters()):,}")

optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-2)
losses = []
for _ in range(60):
    chosen = torch.randint(len(labels), (128,))
    loss = model(pixel_values=pixels[chosen], labels=labels[chosen]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after")

with torch.no_grad():
    before = model.eval()(pixel_values=pixels[:100]).logits
    plain = fold(model.merge_and_unload())
    change = (plain.eval()(pixels[:100]).logits - before).abs().max()
print(f"plain: {type(plain).__name__}, outputs changed by at most {change:.4f}")
