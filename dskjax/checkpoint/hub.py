"""Models by name: a folder that is here, or `org/name` on the Hugging Face hub, downloaded once.

A download takes what a model needs and no more: the JSON files, tokenizer, templates and licence at
the top of the repository, then the files that the index of the weights names. It lands in the hub's
own cache, where files that are complete stay and are never fetched twice; a connection that breaks
goes on at the byte where it broke. Which server, which cache, offline or not and the access token
are the business of `huggingface_hub` (HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN).
"""

import re
from pathlib import Path
from typing import Any

from dskjax.checkpoint import orbax_index
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.shards import INDEX, SINGLE, read_json

SMALL = ("*.json", "*.jinja", "*.model", "*.md", "*.txt", "LICENSE*", "NOTICE*")
"""What a repository may hold beside weights that belongs to a model; code is left out."""

_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)


def find(
    model: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    progress: bool = False,
) -> Path:
    """The folder of a model, once it is here.

    Args:
        model: a folder, or `org/name` on the hub. What exists here is never looked up there.
        revision: branch, tag or commit on the hub; None: its main branch.
        weights: download weights too; false: the config and tokenizer are enough.
        progress: draw progress bars of a download.

    Raises:
        CheckpointError: neither here nor to be had from the hub; says why and what to do.
        ValueError: a revision of a folder.
    """
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"{revision=} is for models on the hub, but {path} is here; leave it out"
            )
        return path
    if not _ID.fullmatch(str(model)) or ".." in str(model) or "--" in str(model):
        raise CheckpointError(
            f"{model}: no such folder, and not the id of a model on the hub, org/name"
        )
    return _Download(str(model), revision, progress).run(weights)


class _Download:
    """One model from the hub."""

    def __init__(self, name: str, revision: str | None, progress: bool):
        self.name = name
        self.revision = revision
        self.progress = progress
        self.begun = False

    def run(self, weights: bool) -> Path:
        folder = self._fetch(SMALL, self.revision)
        self.begun = True
        if not weights:
            return folder
        # The folder's name is the commit: weights and index are of one state of the repository.
        if (folder / orbax_index.INDEX).is_file():
            return self._fetch(("*",), folder.name, deep=True)
        return self._fetch((*SMALL, *_weights(folder)), folder.name)

    def _fetch(self, patterns: tuple[str, ...], revision: str | None, deep: bool = False) -> Path:
        # Here, not above: it takes most of a second, and a folder needs none of it.
        from huggingface_hub import errors, snapshot_download
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
        from huggingface_hub.utils import tqdm

        class Silent(tqdm):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**kwargs, "disable": True})

        try:
            found = snapshot_download(
                self.name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=None if deep else ["*/*"],
                tqdm_class=None if self.progress else Silent,
            )
        except (HTTPError, OSError, errors.HFValidationError) as error:
            raise CheckpointError(f"{self.name}: {self._reason(error)}") from error
        return Path(found)

    def _reason(self, error: Exception) -> str:
        from huggingface_hub import constants, errors, is_offline_mode

        page = f"{constants.ENDPOINT}/{self.name}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return (
                f"gated: accept its terms at {page}, then log in with `hf auth login` or set "
                "HF_TOKEN"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            return (
                f"no such folder here, and no such model at {page}; for a private one, log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision {self.revision!r}; its branches and tags are at {page}/tree/main"
        if isinstance(error, errors.LocalEntryNotFoundError):
            partly = self.begun or isinstance(error, errors.IncompleteSnapshotError)
            part = "only a part of it is" if partly else "it is not"
            fix = f"{constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__)})"
            if is_offline_mode():
                fix = "HF_HUB_OFFLINE is set: unset it to download"
            return f"no such folder here, {part} in {constants.HF_HUB_CACHE}, and {fix}"
        if status is not None:
            return f"{page} answered with status {status} ({_first_line(error)})"
        return (
            f"the download of {page} broke off ({_first_line(error)}); the same command goes on "
            "with it"
        )


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _weights(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return [SINGLE]
    files = read_json(folder / INDEX).get("weight_map")
    return sorted({str(file) for file in files.values()}) if isinstance(files, dict) else []
