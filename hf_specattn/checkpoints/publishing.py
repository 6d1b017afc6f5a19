"""Publishing to the Hub in one commit: `specattn push`, and `push_to_hub` of conditioned models.

What a checkpoint lacks for other users (remote code, `auto_map`, a model card) is added to the commit; the folder does
not change. Tokens are left to huggingface_hub (`hf auth login` or HF_TOKEN): nothing here takes one from the command
line, prints or stores one.
"""

import fnmatch
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..diagnostics.spectra import spectra
from ..files import megabytes, write_bytes
from ..preconditioning import preconditioning_reports
from .cards import CARD, card_files, source_card
from .destinations import COMPANIONS, SENTENCE_TRANSFORMERS_MODULES, files_in, module_files, refuse_links_out
from .evaluations_file import EVALUATION_FILES
from .pictures import PICTURE
from .probe import Comparison, make_batch
from .records import RECORD, Record, heads_rows, read_record, spectra_rows
from .remote_code import remote_code, source_files
from .source_checkpoint import CONFIG, SAFETENSORS_INDEX, Source, SourceError, find_source, load_model

# Beside the weights and COMPANIONS. Everything else stays: checkpoints of a run, optimizer states, logs, other people's code.
PUBLISHED = (
    CONFIG,
    "generation_config.json",
    CARD,
    "LICENSE*",
    PICTURE,
    RECORD,
    EVALUATION_FILES,
    # What the experiments under scripts/ record of a run.
    "metrics.json",
    "results.json",
    "loss_curve.png",
)


class PublishingError(ValueError):
    """Something that cannot be published; the message says what to do."""


@dataclass(frozen=True)
class Publication:
    """What goes into the one commit.

    Attributes:
        repo_id: name on the Hub.
        files: name in the repository -> the file, or content that was made for the commit.
        left_out: the folder's files that are not published.
    """

    repo_id: str
    files: dict[str, Path | bytes]
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """The list of files, with their sizes and whether they were generated."""
        lines = [
            f"  {name}  {_size(content):,} bytes{'' if isinstance(content, Path) else '  (generated)'}"
            for name, content in self.files.items()
        ]
        total = megabytes(sum(map(_size, self.files.values())))
        summary = f"{len(self.files)} files, {total}, in one commit to {self.repo_id}:"
        left_out = [f"Left out: {', '.join(self.left_out)}."] if self.left_out else []
        return "\n".join([summary, *lines, *left_out])

    def write_card(self, folder: Path) -> list[str]:
        """Write the model card and its figure into a folder, for review; return the names of the files."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in (CARD, PICTURE) if name in self.files]
        for name in names:
            content = self.files[name]
            write_bytes(folder / name, content if isinstance(content, bytes) else content.read_bytes())
        return names


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def plan(folder: str | Path, repo_id: str, new_card: bool = False) -> Publication:
    """What publishing a checkpoint's folder would upload. Nothing is changed, and the Hub is not asked.

    Args:
        folder: a conditioned, folded, balanced or stock checkpoint; checked like the source of a conversion.
        repo_id: name on the Hub, such as "organization/model".
        new_card: write a new model card even if the folder has a README.md.

    Raises:
        SourceError: if it is not a checkpoint, a damaged one, or pickled.
        PublishingError: for a name that the Hub does not allow.
    """
    _check_repo_id(repo_id)
    if not Path(folder).expanduser().is_dir():
        raise PublishingError(f"SRC {folder} is not a folder; only local folders can be published.")
    found = find_source(str(folder))
    present = files_in(found.folder)
    chosen = [name for name in present if _is_published(name, found)]
    files: dict[str, Path | bytes] = {name: found.folder / name for name in chosen}
    refuse_links_out(found.folder, [found.folder / name for name in chosen])
    for name, content in remote_code(found.config).items():
        if name not in present or (found.folder / name).read_bytes() != content:
            files[name] = content
    if new_card or CARD not in files:
        files.update(card_files(found.folder, _record(found), repo_id))
    left_out = [name for name in present if name not in files and not name.startswith(".")]
    return Publication(repo_id, dict(sorted(files.items())), tuple(left_out))


def publish(
    publication: Publication,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Create the repository if it does not exist, and upload everything in one commit.

    Args:
        private: of a new repository; None for the organization's default.
        revision: branch to commit to; created if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        commit_message, commit_description: of the commit.
        token: for huggingface_hub; None takes the one of `hf auth login`.

    Returns:
        What the Hub answers about the commit.
    """
    api = HfApi()
    repo_id = api.create_repo(publication.repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in publication.files.items()
    ]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] | str | None = None,
) -> str:
    """`push_to_hub` of a conditioned model: as the stock method, with remote code for every head and a generated card.

    An existing README.md in the repository is kept; delete it there to get a new one.

    Returns:
        The address of the commit, as the stock method does.
    """
    _check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        files: dict[str, Path | bytes] = {name: folder / name for name in files_in(folder)} | remote_code(config)
        if not HfApi().file_exists(repo_id, CARD, revision=revision, token=token):
            record = _model_record(model, config, repo_id.rpartition("/")[2])
            more = [tags] if isinstance(tags, str) else list(tags or ())
            record = replace(record, card={**record.card, "tags": [*record.card.get("tags", []), *more]})
            files.update(card_files(folder, record, repo_id))
        return publish(
            Publication(repo_id, dict(sorted(files.items())), ()),
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
        )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishingError(
            f"{repo_id!r} is not a valid name on the Hub: {error} Use one such as 'organization/model'."
        ) from error


def _is_published(name: str, found: Source) -> bool:
    own_code = {file.name for file in source_files(found.model_type)}
    if name in found.shards or name in own_code or (name == SAFETENSORS_INDEX and len(found.shards) > 1):
        return True
    if (found.folder / SENTENCE_TRANSFORMERS_MODULES).is_file() and found.folder / name in set(
        module_files(found.folder)
    ):
        return True
    return any(
        fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in (*PUBLISHED, *COMPANIONS)
    )


def _record(found: Source) -> Record:
    """What the card is about: the record in the folder, or what the weights say."""
    record = read_record(found.folder)
    card = source_card(found.folder)
    if record is not None:
        # A license or a tag that the user added to the README since then counts.
        base = card.pop("base_model", None)
        base = record.base_model or (base if isinstance(base, str) else None)
        return replace(record, card={**record.card, **card}, base_model=base)
    if found.is_stock:
        raise SourceError(
            f"{found.name} has no {CARD}, and is a stock checkpoint that `specattn` did not write, so there is "
            f"nothing to write one from. Add a {CARD}."
        )
    model, _ = load_model(found)
    return replace(_model_record(model, found.config, found.folder.name), card=card)


def _model_record(model: Any, config: Mapping[str, Any], name: str) -> Record:
    """Of a conditioned or preconditioned model of which only the weights are known."""
    spectral, preconditioner = model.config.spectral_config, model.config.preconditioner_config
    return Record(
        command="convert",
        source=name,
        source_revision=None,
        base_model=None,
        spectral=None if spectral is None else spectral.to_dict(),
        init=None,
        comparison=vars(Comparison(0.0, 0.0, None, None)),
        diagonal_loss=None,
        rows=[] if spectral is None else spectra_rows(spectra(model)),
        preconditioner=None if preconditioner is None else preconditioner.to_dict(),
        heads=[] if preconditioner is None else heads_rows(preconditioning_reports(model, make_batch(model))),
    )
