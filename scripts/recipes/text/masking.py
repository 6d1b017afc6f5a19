"""Masked-language-model corruption with an exact count, as a pure function of (seed, epoch, sequence index).

Every sequence gets exactly `round(probability * length)` predicted positions, so that a model may decode just those with
static shapes (sparse prediction). As in cramming, any position may be chosen, [SEP] included, and the random replacement
is any token of the vocabulary: packed sequences carry no padding, and leaving out specials would cost the exact count.
80 % of the chosen positions show [MASK], 10 % a random token, 10 % the token itself (Devlin et al., 2019).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..run.randomness import Purpose, random_words

IGNORED_LABEL = -100  # the ignore_index of torch's and transformers' cross-entropy


@dataclass(frozen=True)
class MaskedBatch:
    """A corrupted batch.

    Attributes:
        input_ids: `(batch, length)`, int64, with the chosen positions corrupted.
        labels: `(batch, length)`, int64: the original token at the chosen positions, -100 elsewhere.
        masked_positions: `(batch, predicted)`, int64, the chosen positions in rising order.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    masked_positions: torch.Tensor

    def model_inputs(self, device: torch.device, sparse: bool) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the model's forward pass on `device`; `sparse` adds `masked_positions`."""
        inputs = {"input_ids": self.input_ids, "labels": self.labels}
        if sparse:
            inputs["masked_positions"] = self.masked_positions
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


@dataclass(frozen=True)
class MaskingRule:
    """How sequences are corrupted.

    Attributes:
        mask_token_id: The id of [MASK].
        vocab_size: Random replacements are drawn from [0, vocab_size).
        probability: The share of positions to predict, in (0, 1].
    """

    mask_token_id: int
    vocab_size: int
    probability: float = 0.25

    def predictions(self, length: int) -> int:
        """Return how many positions of a sequence of `length` tokens are predicted."""
        return round(self.probability * length)

    def apply(self, tokens: NDArray[np.integer], indices: ArrayLike, *, seed: int, epoch: ArrayLike) -> MaskedBatch:
        """Corrupt a batch.

        Args:
            tokens: `(batch, length)`, the rows at `indices` of the packed corpus.
            indices: `(batch,)`, each row's index in the corpus: with seed and epoch it decides the row's corruption,
                whatever else is in the batch.
            seed: The run's seed.
            epoch: How often the corpus has been passed, one number or `(batch,)`; each pass is corrupted anew.

        Raises:
            ValueError: if no position would be predicted.
        """
        length = tokens.shape[1]
        count = self.predictions(length)
        if count < 1:
            raise ValueError(
                f"Masking {self.probability} of {length} tokens predicts none; raise the probability or the length."
            )
        rows = zip(*np.broadcast_arrays(epoch, indices))
        words = np.stack(
            [random_words(seed, int(passed), Purpose.MASKING, int(row), length + 2 * count) for passed, row in rows]
        )
        scores, decisions, replacements = np.split(words, [length, length + count], axis=1)
        # The positions of the smallest scores are a uniform subset; stable, so that even a tie has one outcome.
        positions = np.sort(np.argsort(scores, axis=1, kind="stable")[:, :count], axis=1)
        originals = np.take_along_axis(tokens, positions, axis=1).astype(np.int64)
        shown = np.where(_uniform(decisions) < 0.9, self._random_tokens(replacements), originals)
        shown = np.where(_uniform(decisions) < 0.8, self.mask_token_id, shown)

        input_ids = tokens.astype(np.int64)
        np.put_along_axis(input_ids, positions, shown, axis=1)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        np.put_along_axis(labels, positions, originals, axis=1)
        return MaskedBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions))

    def _random_tokens(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        # The upper 32 bits scaled to the vocabulary: the bias is below vocab_size / 2**32.
        return ((words >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)).astype(np.int64)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map words to [0, 1) by their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
