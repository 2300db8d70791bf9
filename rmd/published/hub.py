"""Checkpoints on the hub: ``owner/name@revision`` to a folder of this machine, fetched once.

The client's own settings hold: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN. What it fetched whole stays when a
transfer is cut, and a revision that was fetched before needs no network. Nothing here needs torch: the server asks here
before it starts its engines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rmd.checkpoint import CASCADE_FILE
from rmd.fields import mapping, read_json
from rmd.weight_files import PICKLE_SUFFIXES

HUB_PREFIX = "hub:"
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+@[\w./-]+$")
_CHECKPOINT_FILES = (
    "*.json", "*.safetensors", "*/merges.txt", "*/vocab.txt", "*/*.model", "*/*.jinja",
    "README.md", "NOTICE", "NOTICE.md", "LICENSE", "LICENSE.md", "LICENSE.txt",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(ValueError):
    """A repository that cannot be had; the message says why and what helps."""


def is_hub_name(source: Path | str) -> bool:
    """Whether a text names a hub's repository: ``hub:owner/name[@revision]``, or ``owner/name@revision``.

    A plain ``owner/name`` is a path like any other, and so is what exists on this machine.
    """
    text = str(source)
    return text.startswith(HUB_PREFIX) or (bool(_HUB_NAME.match(text)) and not Path(text).exists())


def split_hub_name(source: Path | str) -> tuple[str, str]:
    """``owner/name`` and the revision, which may be empty."""
    name, _, revision = str(source).removeprefix(HUB_PREFIX).partition("@")
    return name, revision


def commit_of(folder: Path) -> str | None:
    """The commit that a fetched folder holds: the client keeps each one in a folder of its name."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def checkpoint_folder(source: Path | str) -> Path:
    """A checkpoint's folder: the path itself, or that of the hub's repository, fetched if it is not here yet.

    Raises:
        HubError: the repository or the revision cannot be had.
        FileNotFoundError: the repository is no checkpoint.
    """
    if not is_hub_name(source):
        return Path(source)
    name, revision = split_hub_name(source)
    folder = fetch_snapshot(name, revision or None, _CHECKPOINT_FILES)
    if not (folder / CASCADE_FILE).is_file():
        raise FileNotFoundError(
            f"{source} holds no {CASCADE_FILE}, so it is no checkpoint of this project; `rmd import --base {name}@"
            f"{revision or 'REVISION'} --preset NAME --out FOLDER` makes one of a public student"
        )
    _refuse_pickles_alone(folder, name, revision)
    return folder


def _refuse_pickles_alone(folder: Path, name: str, revision: str) -> None:
    """Say so where a recorded file is not there because its repository has it pickled: that one is never fetched.

    Raises:
        HubError: that is how it is.
    """
    recorded = mapping(read_json(folder / CASCADE_FILE)).get("weights")
    absent = [each for each in mapping(recorded or {}) if not (folder / each).is_file()]
    if not absent:
        return
    try:
        listed: list[str] = import_module("huggingface_hub").list_repo_files(name, revision=revision or None)
    except Exception:  # then what is absent is told by whoever reads the folder
        return
    pickled = [each for each in listed if each.endswith(PICKLE_SUFFIXES)]
    if pickled and absent[0] not in listed:
        raise HubError(
            f"{name} holds {pickled[0]}, a pickled file, which can run code when it is loaded, and not {absent[0]}; "
            f"only safetensors are read: download it elsewhere and convert it (save_pretrained with "
            f"safe_serialization=True)"
        )


def fetch_snapshot(repository: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder of a hub's repository at a revision, with the files that the patterns name; fetched if not here yet.

    Raises:
        HubError: it cannot be had; the message says whether it is gated, absent, offline or cut, and what helps.
    """
    hub = import_module("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
            )
        )
    except Exception as error:  # the client has many errors, and some come from the layers below it
        raise HubError(_hub_reason(repository, revision, error)) from error


def _hub_reason(repository: str, revision: str | None, error: Exception) -> str:
    errors = import_module("huggingface_hub.errors")
    if isinstance(error, errors.GatedRepoError):  # before its parent class, which means absent
        return (
            f"{repository} is gated: agree to its licence on its page, and give a token that may read it (HF_TOKEN, or "
            f"log in with the hub's client)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repository} is not on the hub, or is private and needs a token (HF_TOKEN); check the name"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}; give a commit, a tag or a branch of it"
    if isinstance(error, errors.IncompleteSnapshotError):
        return (
            f"{repository} was fetched in part only, and the rest could not be fetched from the hub now; run this "
            f"again when the hub can be reached, or download it elsewhere and pass its folder"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    offline = import_module("huggingface_hub.constants").HF_HUB_OFFLINE
    again = "" if offline else "run this again, which goes on with the files that are whole, or "
    return (
        f"{repository} could not be fetched from the hub ({reason}); {again}download it elsewhere and pass its folder"
    )
