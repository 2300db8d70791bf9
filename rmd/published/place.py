"""A folder that is written beside its place and put there in one rename; an older one stands until then."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
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


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A scratch folder beside ``out`` that becomes ``out`` when the block ends well, and is removed when it does not.

    What a killed run left is removed by the next one; two at once are refused. A scratch folder is never a checkpoint
    to serve unless its ``cascade.json``, written last, is there.

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
            for left in scratch.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield scratch
            replace_folder(scratch, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def replace_folder(scratch: Path, out: Path) -> None:
    """Put a finished folder in its place; an older one goes only once the new one stands."""
    if not out.exists():
        os.replace(scratch, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
    os.replace(out, old / "x")
    os.replace(scratch, out)
    shutil.rmtree(old, ignore_errors=True)
