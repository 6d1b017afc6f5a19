"""The console command `specattn`: make, look at and publish conditioned, folded and balanced checkpoints, and reports.

It is not part of the package, because importing that imports torch and transformers, for which neither help nor a wrong
flag should wait. So the commands import what they need.
"""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from hf_specattn.checkpoints.conversion import Options, Result

TRACEBACK = "SPECATTN_TRACEBACK"  # set in the environment: show where an error was raised
# Of the types that this package raises, with a message for users.
OWN_ERRORS = (ValueError, OSError, ImportError)
HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")
# typer brings click along, under a private name in some releases.
UsageError: Any = typer.BadParameter.__base__

DTYPES = ("float32", "float64", "float16", "bfloat16")

app = typer.Typer(
    name="specattn",
    help="Spectral conditioning of attention: make, look at and publish checkpoints.",
    add_completion=False,
    pretty_exceptions_enable=False,
    # `--base_model` and `--lambda_`, too, as the scripts spell them.
    context_settings={"token_normalize_func": lambda name: name.rstrip("_").replace("_", "-")},
)

Src = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder, or the name of a model on the Hub.")]
Dst = Annotated[
    str, typer.Argument(metavar="DST", help="The folder to write; it is written completely or not at all.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of SRC on the Hub.")]
Dtype = Annotated[
    Literal["auto", "float32", "float64", "float16", "bfloat16"],
    typer.Option(help="dtype of the written weights; auto keeps that of SRC."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the whole folder DST if it is not empty.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load weights that exist only as a pickle, with weights_only.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
BaseModel = Annotated[str | None, typer.Option(help="Name of SRC on the Hub, for the model card, if SRC is a folder.")]


@app.command()
def convert(
    src: Src,
    dst: Dst,
    method: Annotated[
        Literal["identity", "svd"] | None,
        typer.Option(
            help="C = lambda * I, or C from the SVD of W. Default: identity; with --preconditioner, no correction."
        ),
    ] = None,
    lambda_: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            metavar="NUMBER",
            help="For identity: a number > 0 (default: 10), or one per target, such as query=1,key=1,value=10.",
        ),
    ] = None,
    init: Annotated[
        Literal["additive", "preserve"] | None,
        typer.Option(
            help="additive (default): W stays, so the function changes. preserve: W becomes W - C, so the function stays."
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="query,key,value,output",
            help="The projections to condition, separated by commas. Default: query,key,value.",
        ),
    ] = None,
    granularity: Annotated[
        Literal["projection", "head"] | None, typer.Option(help="One C per projection (default), or one per head.")
    ] = None,
    preconditioner: Annotated[
        Literal["row", "column"] | None,
        typer.Option(
            help="Divide each head's output by its norms (docs/preconditioning.md), alone or together with --method."
        ),
    ] = None,
    preconditioner_gradient: Annotated[
        Literal["detached", "through"] | None,
        typer.Option(help="Whether gradients flow through the norm. Default: detached."),
    ] = None,
    preconditioner_scale: Annotated[
        Literal["unit", "rms", "match"] | None,
        typer.Option(help="The norm afterward; match keeps the mean norm measured on a probe. Default: unit."),
    ] = None,
    preconditioner_eps: Annotated[
        float | None, typer.Option(help="Smallest norm to divide by. Default: 1e-6.")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Make a conditioned checkpoint from a stock one: each query, key and value projection computes with W + C.

    With --preconditioner, make a preconditioned one.
    """
    options = _options(revision, dtype, overwrite, allow_pickle, base_model)
    from hf_specattn import PreconditionerConfig, SpectralConfig
    from hf_specattn.checkpoints import conversion
    from hf_specattn.config import PROJECTIONS

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
    result = conversion.convert(src, dst, config, init or "additive", options, preconditioner_config)
    _tell(result, json)


@app.command()
def fold(
    src: Src,
    dst: Dst,
    revision: Revision = None,
    dtype: Dtype = "auto",
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a plain checkpoint from a conditioned one: W + C in the weights of the stock architecture."""
    options = _options(revision, dtype, overwrite, base_model=base_model)
    from hf_specattn.checkpoints.conversion import fold_checkpoint

    _tell(fold_checkpoint(src, dst, options), json)


@app.command()
def balance(
    src: Src,
    dst: Dst,
    revision: Revision = None,
    dtype: Dtype = "auto",
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Make the heads of a stock checkpoint better conditioned without changing its outputs."""
    options = _options(revision, dtype, overwrite, allow_pickle, base_model)
    from hf_specattn.checkpoints.conversion import balance_checkpoint

    _tell(balance_checkpoint(src, dst, options), json)


@app.command()
def inspect(src: Src, revision: Revision = None, allow_pickle: AllowPickle = False, json: Json = False) -> None:
    """Show what a checkpoint is, and the condition numbers of its projections."""
    _load_library()
    from hf_specattn.checkpoints.inspection import inspect_checkpoint
    from hf_specattn.machine_output import as_json

    found = inspect_checkpoint(src, revision, allow_pickle)
    _report(as_json(found.as_dict()) if json else found.describe())


@app.command()
def push(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Name on the Hub: organization/model.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files; do not contact the Hub.")] = False,
    card_dir: Annotated[
        Path | None, typer.Option(help="Also write the card and its figure, as published, into this folder.")
    ] = None,
    new_card: Annotated[bool, typer.Option("--new-card", help="Write a new model card even if SRC has one.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    json: Json = False,
) -> None:
    """Publish a checkpoint in one commit, with a model card and remote code. Log in with `hf auth login` first."""
    _load_library()
    from hf_specattn.checkpoints import publishing
    from hf_specattn.files import require_writable
    from hf_specattn.machine_output import as_json

    if card_dir is not None:
        require_writable(card_dir, "--card-dir")
    publication = publishing.plan(src, repo_id, new_card)
    tell = _nothing if json else _report
    tell(publication.describe())
    if card_dir is not None:
        tell(f"Written into {card_dir}: {', '.join(publication.write_card(card_dir))}")
    url = None
    if dry_run:
        tell("Dry run: nothing was uploaded.")
    else:
        commit = publishing.publish(
            publication,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        url = commit.pr_url or commit.commit_url
        tell(f"Published: {url}")
    if json:
        listed = {"files": list(publication.files), "left_out": publication.left_out}
        _report(as_json({"repo_id": publication.repo_id, **listed, "url": url}))


@app.command()
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
    _load_library()
    from hf_specattn.diagnostics import command

    told = command.report(
        model, data, output_dir, sequences, max_length, queries, jacobian_heads, trust_remote_code=trust_remote_code
    )
    if json:
        from hf_specattn.machine_output import as_json

        _report(as_json(told))
    else:
        _report(f"Wrote {told['page']}, with its figures next to it.")


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
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions of this package and of its environment, and exit.")
    ] = False,
    json: Json = False,
) -> None:
    """Spectral conditioning of attention: make, look at and publish checkpoints."""
    if version:
        from hf_specattn.machine_output import as_json, environment

        found = environment()
        lines = (f"{name} {'is not installed' if value is None else value}" for name, value in found.items())
        _report(as_json(found) if json else "\n".join(lines))
        raise typer.Exit
    if json:
        raise typer.BadParameter("--json goes after the name of a command, or with --version.")
    if context.invoked_subcommand is None:
        _report(context.get_help())
        raise typer.Exit(2)


def _report(text: str) -> None:
    typer.echo(text)


def _nothing(text: str) -> None:
    """In place of `_report` where JSON is printed in the end."""


def _load_library() -> None:
    """Import the package, and with it transformers, quietly: the reports say what there is to say."""
    from transformers.utils import logging

    import hf_specattn  # noqa: F401

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _options(
    revision: str | None, dtype: str, overwrite: bool, allow_pickle: bool = False, base_model: str | None = None
) -> "Options":
    _load_library()
    import torch

    from hf_specattn.checkpoints.conversion import Options

    stored = None if dtype == "auto" else getattr(torch, dtype)
    return Options(revision, stored, overwrite, allow_pickle, base_model)


def _tell(result: "Result", json: bool) -> None:
    """What a conversion did: as text, or the record that lies in the new folder, with its path and files."""
    from hf_specattn.checkpoints.records import read_record
    from hf_specattn.machine_output import as_json

    where = {"folder": result.folder, "files": result.files}
    _report(as_json({"record": read_record(result.folder), **where}) if json else result.describe())


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
            f"--lambda {text!r} is not a number; give one > 0, or one per target, such as query=1,key=1,value=10."
        ) from None


def tolerate_output() -> None:
    """Let an output that is not UTF-8 show what it cannot spell as escapes: no table or message ends a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook took its place
            stream.reconfigure(errors="backslashreplace")


def expand_home(words: Sequence[str]) -> list[str]:
    """Put the home folder in place of a leading `~`, as shells do not in `--flag=~/folder` and between quotes."""
    expanded = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{flag}{equals}{os.path.expanduser(value)}" if value.startswith("~") else word)
    return expanded


def check_words(words: Sequence[str]) -> None:
    """Refuse words that are empty, or no UTF-8: safetensors opens no such file, and no record or card can name it.

    Raises:
        UsageError: naming the word.
    """
    if "" in words:
        raise UsageError("an argument is empty (an unset variable of the shell?); the current folder is called '.'.")
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{word!a} is not UTF-8: rename it, or choose another name. If it is, the locale is not: set LC_ALL=C.UTF-8."
            ) from None


def explain(error: Exception) -> str:
    """What the user is told about an error from any source; our own messages already say what to do."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    import hf_specattn

    kind = type(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None or kind is LocalTokenNotFoundError:
        told = f"the Hub refused ({kind.__name__}{'' if status is None else f', status {status}'})"
        return f"{told}: check the name, and that you are logged in with write access (`hf auth login`)."
    if kind.__module__.partition(".")[0].rstrip("0123456789") in HTTP_LIBRARIES:
        return f"the Hub could not be reached ({kind.__name__}): check the connection, and HF_ENDPOINT and HF_HUB_OFFLINE."
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = raised_in == Path(__file__) or raised_in.is_relative_to(Path(hf_specattn.__file__).parent)
    if is_ours and isinstance(error, (*OWN_ERRORS, hf_specattn.OutputChangedError)):
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
        "this package expect it: a file there (config.json, the index, tokenizer_config.json, modules.json, "
        "README.md) was edited or is damaged; restore it from its source. If all are intact, report this with what "
        f"{TRACEBACK}=1 shows."
    )


def main() -> None:
    """Run the command. Like the scripts it ends with status 2 where the command line is wrong, else with 1 and a message."""
    tolerate_output()
    sys.argv[1:] = expand_home(sys.argv[1:])
    try:
        check_words(sys.argv[1:])
        raise SystemExit(app(prog_name="specattn", standalone_mode=False) or 0)
    except UsageError as error:
        usage, program = (error.ctx.get_usage(), error.ctx.command_path) if error.ctx else ("", "specattn")
        typer.echo(f"{usage}\n{program}: error: {error.format_message()}".strip(), err=True)
        raise SystemExit(2) from None
    except typer.Abort:  # Ctrl-C
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.echo(f"error: {explain(error)}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
