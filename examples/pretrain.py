"""Pretrain a small Crammed BERT in your own loop, with the SVD corrections refreshed every 20 steps.

    python examples/pretrain.py

It predicts masked characters of the documentation that ships with Python. A static correction goes stale while W moves;
`refresh` after the optimizer step recomputes it. Prints:

    step 0: loss 4.83, largest kappa of W + C 2.00
    step 60: loss 3.23, largest kappa of W + C 2.00
    folded: CrammedBertForMaskedLM, outputs changed by at most 0.0000
"""

from pydoc_data import topics

import torch
from transformers import set_seed

from hf_specattn import CrammedBertConfig, CrammedBertForMaskedLM, SpectralConfig, condition, fold, refresh
from hf_specattn.diagnostics import spectra

STEPS, EVERY, BATCH, LENGTH, MASK = 60, 20, 16, 64, 0

set_seed(0)
text = "".join(topics.topics.values()).encode("ascii", "replace")
tokens = torch.tensor(list(text))  # bytes are the tokens; 0, which no text has, masks
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=128, max_position_embeddings=LENGTH, **sizes))
condition(model, SpectralConfig(method="svd", refresh_every=EVERY))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def masked_batch():
    starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
    clean = tokens[starts + torch.arange(LENGTH)]
    hidden = torch.rand(clean.shape) < 0.25
    return {"input_ids": clean.masked_fill(hidden, MASK), "labels": clean.masked_fill(~hidden, -100)}


for step in range(STEPS + 1):
    loss = model(**masked_batch()).loss
    if step % STEPS == 0:
        worst = max(row.effective.kappa for row in spectra(model))
        print(f"step {step}: loss {loss.item():.2f}, largest kappa of W + C {worst:.2f}")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % EVERY == 0:
        refresh(model)

batch = masked_batch()
with torch.no_grad():
    before = model.eval()(**batch).logits
    after = fold(model)(**batch).logits
print(f"folded: {type(model).__name__}, outputs changed by at most {(after - before).abs().max():.4f}")
