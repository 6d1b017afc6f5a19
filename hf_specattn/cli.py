"""The console command `specattn`: make, look at and publish conditioned, folded and balanced checkpoints, and reports."""

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers.utils import logging

from .balance import OutputChangedError
from .checkpoints.conversion import Options, balance_checkpoint, fold_checkpoint
from .checkpoints.conversion import convert as convert_checkpoint
from .checkpoints.inspection import inspect_checkpoint
from .checkpoints.publishing import plan, publish
from .config import PROJECTIONS, SpectralConfig
from .diagnostics.command import report
from .files import require_writable
from .preconditioner import PreconditionerConfig
from .terminal import expand_home, tolerate_output
from .version import __version__

TRACEBACK = "SPECATTN_TRACEBACK"  # set in the environment: where an error was raised is shown
# Of the types that this package raises, with a message for users.
OWN_ERRORS = (ValueError, OSError, ImportError, OutputChangedError)
HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}

app = typer.Typer(
    name="specattn",
    help="Spectral conditioning of attention: make, look at and publish checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # `--base_model` and `--lambda_`, too, as the scripts spell them.
    context_settings={"token_normalize_func": lambda name: name.rstrip("_").replace("_", "-")},
)

Src = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder, or the name of a model on the Hub.")]
Dst = Annotated[str, typer.Argument(metavar="DST", help="The folder to write; it is there whole or not at all.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of SRC on the Hub.")]
Dtype = Annotated[str, typer.Option(help=f"Of the written weights: auto (that of SRC), {', '.join(DTYPES)}.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a DST that is not empty, as a whole.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load weights that are only there as a pickle, with weights_only.")
]
BaseModel = Annotated[
    str | None, typer.Option(help="Name of SRC on the Hub, for the model card, where SRC is a folder.")
]


@app.command()
def convert(
    src: Src,
    dst: Dst,
    method: Annotated[
        str | None,
        typer.Option(
            help="identity (C = lambda * I) or svd (C from the SVD of W). Left out: identity, or with --preconditioner no "
            "corrections."
        ),
    ] = None,
    lambda_: Annotated[
        str | None,
        typer.Option(
            "--lambda", help="identity: a number > 0 (10 if left out), or one per target: query=1,key=1,value=10."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="additive (the default: W stays, the function changes) or preserve (W becomes W - C, the function stays)."
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="The projections to condition, with commas. Left out: query,key,value.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="One C per projection (the default), or per head.", metavar="projection|head")
    ] = None,
    preconditioner: Annotated[
        str | None,
        typer.Option(
            help="Divide each head's output by its norms, by row or by column (docs/preconditioning.md). Alone, or with "
            "--method."
        ),
    ] = None,
    preconditioner_gradient: Annotated[
        str | None, typer.Option(help="detached (the default) or through: whether the norm is differentiated.")
    ] = None,
    preconditioner_scale: Annotated[
        str | None,
        typer.Option(help="What the norm becomes: unit (the default), rms, or match (as it is on a probe)."),
    ] = None,
    preconditioner_eps: Annotated[float | None, typer.Option(help="Smaller norms count as this one (1e-6).")] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Make a conditioned checkpoint of a stock one: each query, key and value projection computes with W + C.

    With --preconditioner, a preconditioned one.
    """
    options = Options(revision, _dtype(dtype), overwrite, allow_pickle, base_model)
    settings = {"lambda": lambda_, "targets": targets, "granularity": granularity, "init": init}
    config = None
    if preconditioner is None or method is not None:
        named = tuple(PROJECTIONS if targets is None else _split(targets))
        config = SpectralConfig(method or "identity", _lambda(lambda_), named, granularity or "projection")
    elif stray := _given(settings):
        raise ValueError(
            f"--{stray} does nothing with --preconditioner alone, which adds no correction: add --method, or leave it out."
        )
    fields = {"gradient": preconditioner_gradient, "scale": preconditioner_scale, "eps": preconditioner_eps}
    if preconditioner is None and (stray := _given(fields)):
        raise ValueError(f"--preconditioner-{stray} does nothing without --preconditioner row or column.")
    chosen = {name: value for name, value in fields.items() if value is not None}
    preconditioner_config = None if preconditioner is None else PreconditionerConfig(preconditioner, **chosen)  # type: ignore[arg-type]
    result = convert_checkpoint(src, dst, config, init or "additive", options, preconditioner_config)
    _report(result.describe())


@app.command()
def fold(
    src: Src,
    dst: Dst,
    revision: Revision = None,
    dtype: Dtype = "auto",
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a plain checkpoint of a conditioned one: W + C in the weights of the stock architecture."""
    options = Options(revision, _dtype(dtype), overwrite, base_model=base_model)
    _report(fold_checkpoint(src, dst, options).describe())


@app.command()
def balance(
    src: Src,
    dst: Dst,
    revision: Revision = None,
    dtype: Dtype = "auto",
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Make each head of a stock checkpoint better conditioned along its gauge, with its outputs kept."""
    options = Options(revision, _dtype(dtype), overwrite, allow_pickle, base_model)
    _report(balance_checkpoint(src, dst, options).describe())


@app.command()
def inspect(src: Src, revision: Revision = None, allow_pickle: AllowPickle = False) -> None:
    """Say what a checkpoint is, and the condition numbers of its projections."""
    _report(inspect_checkpoint(src, revision, allow_pickle).describe())


@app.command()
def push(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Name on the Hub: organization/model.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and ask nothing of the Hub.")] = False,
    card_dir: Annotated[
        Path | None, typer.Option(help="Also write the card and its picture as they are published into this folder.")
    ] = None,
    new_card: Annotated[bool, typer.Option("--new-card", help="Write a new model card although SRC has one.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created where it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Publish a checkpoint in one commit, with model card and remote code. Log in with `hf auth login` first."""
    if card_dir is not None:
        require_writable(card_dir, "--card-dir")
    publication = plan(src, repo_id, new_card)
    _report(publication.describe())
    if card_dir is not None:
        _report(f"Written into {card_dir}: {', '.join(publication.write_card(card_dir))}")
    if dry_run:
        _report("Dry run: nothing was uploaded.")
        return
    commit = publish(
        publication,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    _report(f"Published: {commit.pr_url or commit.commit_url}")


app.command()(report)


@app.command(
    name="report-training", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def report_training() -> None:
    """Moved to `scripts/compare_runs.py` of the repository."""
    raise ValueError(
        "report-training is a part of scripts/compare_runs.py in the repository now: python scripts/compare_runs.py RUN ... "
        "--output_dir report"
    )


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Spectral conditioning of attention: make, look at and publish checkpoints."""
    if version:
        _report(__version__)
        raise typer.Exit


def _report(text: str) -> None:
    typer.echo(text)


def _given(options: Mapping[str, Any]) -> str | None:
    """The first option that was given."""
    return next((name for name, value in options.items() if value is not None), None)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _lambda(text: str | None) -> Any:
    """A number, or a mapping; what it may be is for SpectralConfig to say."""
    if text is None:
        return None
    if "=" not in text:
        return _number(text)
    pairs = [part.partition("=") for part in _split(text)]
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"--lambda {text} names a projection twice.")
    return {name: _number(number) for name, (_, _, number) in zip(names, pairs)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--lambda {text!r} is no number; give one > 0, or one per target, such as query=1,key=1,value=10."
        ) from None


def _dtype(name: str) -> torch.dtype | None:
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is unknown; choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES.get(name)


def explain(error: Exception) -> str:
    """What a user is told of an error, whatever raised it: in our own messages the way out is said already."""
    kind = type(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None or kind is LocalTokenNotFoundError:
        told = f"the Hub refused ({kind.__name__}{'' if status is None else f', status {status}'})"
        return f"{told}: check the name, and that you are logged in with write access (`hf auth login`)."
    if kind.__module__.partition(".")[0].rstrip("0123456789") in HTTP_LIBRARIES:
        return f"the Hub could not be reached ({kind.__name__}): check the connection, and HF_ENDPOINT and HF_HUB_OFFLINE."
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, OWN_ERRORS) and Path(raised_in).is_relative_to(Path(__file__).parent):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Check that it is there, and that you may read or write it."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OSError):  # transformers and huggingface_hub say in theirs what to do
        return " ".join(lines)
    if isinstance(error, ImportError):
        return f"{error}. Install it: pip install {error.name}."
    return (
        f"{kind.__name__}{f': {lines[0]}' if lines else ''}. Something in the checkpoint is not as transformers and "
        "this package expect it: a file there (config.json, the index, tokenizer_config.json, modules.json, README.md) was "
        "edited, or is damaged, and is to be restored from its source. If all are whole, report this with what "
        f"{TRACEBACK}=1 shows."
    )


def main() -> None:
    """Run the command: whatever it raises is one message and exit status 1."""
    logging.set_verbosity_error()  # the reports say what there is to say
    tolerate_output()
    sys.argv[1:] = expand_home(sys.argv[1:])
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        app()
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.echo(f"error: {explain(error)}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
