"""`specattn report`, for the command line to register."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from ..balance import probe_batch
from ..files import require_writable
from ..machine_output import as_json

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of text.")]

# What a text model is looked at on where no data are given.
DEFAULT_TEXT = (
    "The condition number of a matrix is its largest singular value divided by its smallest. Where it is large, some "
    "directions of the input hardly reach the output, and small changes of the weights along them are lost.",
    "A cat sat in the shade of the old wall and watched the road, on which nothing had moved since the morning.",
)


def report(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, or the name of a model on the Hub; stock or conditioned.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Text file whose first lines the model reads. Default: two sentences."),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for report.html and its figures.")] = Path("report"),
    sequences: Annotated[int, typer.Option(min=1, help="Number of lines to read.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens to keep of each line.")] = 128,
    queries: Annotated[int, typer.Option(min=1, help="Tokens of the first line to compute the Jacobian at.")] = 16,
    jacobian_heads: Annotated[
        int | None, typer.Option(min=0, help="Heads per layer to compute the Jacobian of. Default: all.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
    json: Json = False,
) -> None:
    """Show how well conditioned a model's attention is: one HTML page, and its figures as PNG and SVG."""
    # It imports the Trainer's callbacks, which the other commands should not wait for.
    from .attention_report import diagnose, write_diagnosis

    require_writable(output_dir, "--output-dir")
    loaded = AutoModel.from_pretrained(model, trust_remote_code=trust_remote_code)
    batch = _batch(loaded, model, data, sequences, max_length, trust_remote_code)
    diagnosis = diagnose(loaded, batch, queries=queries, jacobian_heads=jacobian_heads)
    page = write_diagnosis(diagnosis, output_dir, title=model)
    told = {"page": page, **diagnosis.as_dict()}
    typer.echo(as_json(told) if json else f"Wrote {page}, with its figures beside it.")


def _batch(
    model: PreTrainedModel, path: str, data: Path | None, sequences: int, max_length: int, trust_remote_code: bool
) -> dict[str, Any]:
    if model.main_input_name != "input_ids":
        if data is not None:
            raise ValueError(f"--data {data} is text, but {type(model).__name__} takes {model.main_input_name}.")
        typer.echo("Looking at random input: its entropies and Jacobians say little about real ones.", err=True)
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
        raise ValueError(f"--data {data} is not UTF-8 text: save it as UTF-8, or give another file.")
    return lines
