"""A folder that is written beside its place and put there in one rename; an older one stands until then."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rmd.checkpoint import CASCADE_FILE


def check_out(out: Path, *sources: Path) -> None:
    """Refuse to write where something else than a former checkpoint would be lost.

    Raises:
        ValueError: ``out`` is one of ``sources``, holds one, or is something that is no checkpoint.
    """
    for source in sources:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise ValueError(f"--out {out} would replace {source}, which is read; give another --out")
    former = (out / CASCADE_FILE).is_file() or (out.is_dir() and not any(out.iterdir()))
    if (out.exists() or out.is_symlink()) and not former:
        raise ValueError(f"--out {out} exists and is no checkpoint folder: it would be lost; give another --out")


_MADE_OF = ".made-of"


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
    out = out.parent.resolve() / out.name
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
            _prepare(scratch, made_of, say)
            yield scratch
            (scratch / _MADE_OF).unlink(missing_ok=True)
            replace_folder(scratch, out)
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


def replace_folder(scratch: Path, out: Path) -> None:
    """Put a finished folder in its place, for all to read; an older one goes only once the new one stands."""
    readable(scratch)
    if not out.exists():
        os.replace(scratch, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
    os.replace(out, old / "x")
    os.replace(scratch, out)
    shutil.rmtree(old, ignore_errors=True)
