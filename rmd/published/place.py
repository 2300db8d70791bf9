"""A folder that is written beside its place and put there in one rename; an older one stands until then."""

from __future__ import annotations

import fcntl
import filecmp
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rmd.checkpoint import CASCADE_FILE

_MADE_OF = ".made-of"
_TOP = frozenset(
    {CASCADE_FILE, _MADE_OF, "model_index.json", "README.md", "NOTICE", "pytorch_lora_weights.safetensors"}
)
_COMPONENTS = frozenset(
    ["unet", "transformer", "vae", "scheduler"]
    + [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)
_PART_SUFFIXES = (".json", ".safetensors", ".model", ".jinja")
_PART_NAMES = frozenset({"merges.txt", "vocab.txt"})


def check_out(out: Path, *sources: Path) -> None:
    """Refuse to write where something else than a former checkpoint would be lost, or into what is read.

    Raises:
        ValueError: ``out`` is one of ``sources``, holds one or lies in one; it is no checkpoint, or holds other things
            too; the command was started in it.
    """
    place = Path(os.path.realpath(out))
    for source in sources:
        read = source.resolve()
        if place == read or place in read.parents:
            raise ValueError(f"--out {out} would replace {source}, which is read; give another --out")
        if read in place.parents:
            raise ValueError(f"--out {out} lies in {source}, which is read; give another --out")
    if out.is_symlink() and not out.exists():
        raise ValueError(
            f"--out {out} is a link to {out.readlink()}, which is not there: remove it, or give another --out"
        )
    former = (out / CASCADE_FILE).is_file() or (out.is_dir() and not any(out.iterdir()))
    if out.exists() and not former:
        raise ValueError(f"--out {out} exists and is no checkpoint folder: it would be lost; give another --out")
    here = Path(os.path.realpath("."))
    if place == here or place in here.parents:
        raise ValueError(
            f"--out {out} holds the folder that you are in, which would be gone; start the command elsewhere, or give "
            f"another --out"
        )
    for path in _files_in(place):
        if not _is_known(path.relative_to(place)) and not _is_copy(path, path.relative_to(place), sources):
            raise ValueError(
                f"--out {out} holds {path.relative_to(place)} too, which is no part of a checkpoint and would be lost; "
                f"give another --out"
            )


def _files_in(folder: Path) -> Iterator[Path]:
    """Files, and folders without any; not what links lead to, which stays."""
    for path in sorted(folder.glob("*")):
        if path.is_symlink():
            continue
        if path.is_dir() and any(path.iterdir()):
            yield from _files_in(path)
        else:
            yield path


def _is_known(path: Path) -> bool:
    """Whether a checkpoint's writers give a file this place."""
    if len(path.parts) == 1:
        return path.name in _TOP | _COMPONENTS
    folder, *rest = path.parts
    return folder in _COMPONENTS and len(rest) == 1 and (path.suffix in _PART_SUFFIXES or path.name in _PART_NAMES)


def _is_copy(path: Path, name: Path, sources: Sequence[Path]) -> bool:
    """Whether a source has the same file: whole components of a teacher are copied, with whatever lies in them."""
    others = [source / name for source in sources]
    return any(other.is_file() and filecmp.cmp(path, other) for other in others)


@contextmanager
def whole_folder(out: Path, made_of: str = "", say: Callable[[str], None] = lambda _text: None) -> Iterator[Path]:
    """A scratch folder beside ``out`` that becomes ``out`` when the block ends well, and is removed when it fails.

    A run that was killed or interrupted leaves it behind: the next one finds its files there if it is made of the same
    things, and an empty folder otherwise. Two at once are refused. A scratch folder is never a checkpoint to serve
    unless its ``cascade.json``, written last, is there.

    Args:
        out: the folder's place.
        made_of: what tells one run's files from another's; nothing is found again when empty.
        say: told when files are found again, or why they are not.

    Raises:
        ValueError: another run writes to the same place.
    """
    out = Path(os.path.realpath(out))  # of a link, what it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.importing"
    scratch.mkdir(exist_ok=True)
    # The lock dies with its process, so what is unlocked was left by a killed one.
    lock = os.open(scratch, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another import writes to {out}; wait for its end, or give another --out") from None
        if not scratch.is_dir() or os.fstat(lock).st_ino != scratch.stat().st_ino:
            raise ValueError(f"another import has just written {out}; look at it, and import again if need be")
        try:
            if put_back(out):
                say(f"put {out} back, which a stopped run had moved away to replace it")
            _prepare(scratch, made_of, say)
            yield scratch
            replace_folder(scratch, out)
            (out / _MADE_OF).unlink(missing_ok=True)  # not before: a run that is killed in between goes on by it
        except Exception:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        except BaseException:  # interrupted
            if not made_of:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _prepare(scratch: Path, made_of: str, say: Callable[[str], None]) -> None:
    """Keep what a stopped run of the same things left, and clear away anything else."""
    mark = scratch / _MADE_OF
    left = list(scratch.iterdir())
    if made_of and mark.is_file() and mark.read_text(encoding="utf-8") == made_of:
        say("going on with the files that a stopped run has finished")
        for path in list(scratch.rglob("*")):
            half = path.name.startswith((".tmp", ".cascade-")) or path.name.endswith(".partial")
            if half and path.is_file():
                path.unlink()  # half written, under safetensors' name for it, cascade.json's or finished_file's
        return
    if left and made_of:
        say("starting anew: what a stopped run left was made of other files or settings")
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if made_of:
        mark.write_text(made_of, encoding="utf-8")


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its own once it is whole, so that one of that name always is."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def readable(path: Path) -> None:
    """Let every user read a file, or a folder and all in it, as a service under a user of its own must.

    safetensors' files and temporary folders are their maker's alone. Links are left alone with what they lead to.
    """
    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            mode = stat.S_IMODE(each.stat().st_mode)
            wanted = mode | (0o555 if each.is_dir() else 0o444)
            if wanted != mode:
                each.chmod(wanted)


_FORMER, _REPLACED = "former", "replaced"


def replace_folder(scratch: Path, out: Path) -> None:
    """Put a finished folder in its place, for all to read; an older one goes only once the new one stands.

    Raises:
        OSError: it cannot be put there; the older one is back in its place, or the message says where it is.
    """
    readable(scratch)
    put_back(out)
    if not out.exists():
        os.replace(scratch, out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=_aside(out)))
    former = aside / _FORMER
    try:
        os.replace(out, former)
        os.replace(scratch, out)
    except BaseException as error:
        if os.path.lexists(former) and not os.path.lexists(out):
            try:
                os.replace(former, out)
            except OSError:
                raise OSError(f"{out} could not be replaced ({error}); what it was is in {former}") from error
        with suppress(OSError):
            aside.rmdir()
        raise
    os.replace(former, aside / _REPLACED)  # no longer to be put back, however little of it is left
    shutil.rmtree(aside, ignore_errors=True)


def put_back(out: Path) -> bool:
    """Undo what a run that was killed as it replaced a folder has left; whether the folder was away and is back."""
    back = False
    for aside in sorted(out.parent.glob(f"{glob.escape(_aside(out))}*"), key=os.path.getmtime, reverse=True):
        names = set() if aside.is_symlink() or not aside.is_dir() else {path.name for path in aside.iterdir()}
        if not names or names - {_FORMER, _REPLACED}:
            continue  # another's
        if _FORMER in names and not os.path.lexists(out):
            os.replace(aside / _FORMER, out)
            back = True
        shutil.rmtree(aside, ignore_errors=True)
    return back


def _aside(out: Path) -> str:
    """How the names of folders begin that hold what is being replaced."""
    return f".{out.name}-old-"
