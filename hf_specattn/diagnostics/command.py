"""What `specattn report` does."""

from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from ..files import require_writable
from ..model_outputs import probe_batch

# What a text model reads if no data are given.
DEFAULT_TEXT = (
    "The condition number of a matrix is its largest singular value divided by its smallest. If it is large, some "
    "directions of the input hardly reach the output, and small changes of the weights along them are lost.",
    "A cat sat in the shade of the old wall and watched the road, on which nothing had moved since the morning.",
)


def report(
    model: str,
    data: Path | None,
    output_dir: Path,
    sequences: int = 4,
    max_length: int = 128,
    queries: int = 16,
    jacobian_heads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the report of a checkpoint, as `specattn report` does; its flags are the arguments.

    Returns:
        What `--json` prints: the path of the page, and the numbers on it.
    """
    # It imports the Trainer's callbacks, which the other commands should not wait for.
    from .attention_report import diagnose, write_diagnosis

    require_writable(output_dir, "--output-dir")
    loaded = AutoModel.from_pretrained(model, trust_remote_code=trust_remote_code)
    batch = _batch(loaded, model, data, sequences, max_length, trust_remote_code)
    diagnosis = diagnose(loaded, batch, queries=queries, jacobian_heads=jacobian_heads)
    page = write_diagnosis(diagnosis, output_dir, title=model)
    return {"page": page, **diagnosis.as_dict()}


def _batch(
    model: PreTrainedModel, path: str, data: Path | None, sequences: int, max_length: int, trust_remote_code: bool
) -> dict[str, Any]:
    if model.main_input_name != "input_ids":
        if data is not None:
            raise ValueError(f"--data {data} is text, but {type(model).__name__} takes {model.main_input_name}.")
        typer.echo("The input is random: its entropies and Jacobians say little about real data.", err=True)
        return probe_batch(model)
    lines = list(DEFAULT_TEXT) if data is None else _first_lines(data, sequences)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    positions = getattr(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code),
                        "max_position_embeddings", max_length)  # fmt: skip
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Some models count positions from an offset of two.
    length = max(2, min(max_length, positions - 2))
    encoded = tokenizer(lines, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def _first_lines(data: Path, count: int) -> list[str]:
    with data.open(encoding="utf-8", errors="surrogateescape") as stream:
        lines = [line.strip() for line, _ in zip((line for line in stream if line.strip()), range(count))]
    if not lines:
        raise ValueError(f"--data {data} has no line of text.")
    if any(character == "\0" or "\udc80" <= character <= "\udcff" for line in lines for character in line):
        raise ValueError(f"--data {data} is not UTF-8 text: save it as UTF-8, or pass another file.")
    return lines
