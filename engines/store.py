"""The folder of built engines: whole or absent, whoever builds, crashes or runs out of disk.

<root>/<key>/manifest.json and the engine's files
<root>/.locks/<key>.lock      held by the one process that builds <key>
<root>/.locks/<key>.read      times of its files when they were last read against their digests
<root>/.building-<key>/       an unfinished build; renamed to <key> when complete
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from engines.errors import EngineCorrupt, EngineError, EngineMismatch, NotEnoughDisk
from engines.manifest import MANIFEST, FileRecord, Manifest
from engines.spec import KEY_LENGTH, EngineSpec
from engines.target import Target, machine_with, package_version

_BUILDING = ".building-"
# Any other folder beside the engines is not ours to call broken or to remove.
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Problem:
    """A broken or foreign engine in the store."""

    key: str
    message: str
    broken: bool
    """True: damaged. False: sound, but not for this machine."""


class EngineStore:
    """A folder of engines by key. Safe for several processes at once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise EngineError(f"{self.root} is a file; give the folder of built engines")

    def folder(self, key: str) -> Path:
        """Where the engine ``key`` lies, built or not."""
        return self.root / key

    def get(self, key: str) -> Manifest | None:
        """The manifest of ``key``, None when it was not built.

        Raises:
            EngineCorrupt: its manifest cannot be read.
        """
        folder = self.folder(key)
        return Manifest.read(folder) if folder.is_dir() else None

    def check_places(self, keys: Iterable[str]) -> None:
        """Before anything is built: whether engines can be put under these keys.

        Raises:
            EngineError: something else than a folder is there.
        """
        for key in keys:
            place = self.folder(key)
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise EngineError(f"{place} is no folder, and an engine's is to go there; remove it")

    def keys(self) -> builtins.list[str]:
        """Keys of all engines, sound or not."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if _KEY.fullmatch(path.name) and path.is_dir())

    def list(self) -> builtins.list[Manifest]:
        """Manifests of all readable engines, by component, size and batch."""
        found = []
        for key in self.keys():
            try:
                found.append(Manifest.read(self.folder(key)))
            except EngineCorrupt:
                continue  # `verify` tells of these
        return sorted(found, key=lambda m: (m.spec.backend, m.spec.component, m.spec.size or "", m.spec.batch))

    def relatives(self, spec: EngineSpec) -> builtins.list[Manifest]:
        """Sound engines that differ from ``spec`` in the weights inside alone."""
        like = replace(spec, weights=None)
        found = [each for each in self.list() if each.key != spec.key and replace(each.spec, weights=None) == like]
        return [manifest for manifest in found if self.has(manifest.key)]

    def build(self, key: str, builder: Callable[[Path], Manifest]) -> Manifest:
        """The engine ``key``: as it is when it exists, else built by ``builder`` into a folder that is then renamed.

        Of several processes that ask at once one builds and the others wait for it.

        Args:
            key: of the engine.
            builder: writes files into the folder it is given and returns a manifest (its ``files`` are filled in here).

        Raises:
            NotEnoughDisk: the disk is full; nothing is left behind.
            EngineError: the builder's own.
        """
        existing = self._sound(key)
        if existing is not None:
            return existing
        self.check_places([key])
        with self._lock(key):
            existing = self._sound(key)
            if existing is not None:
                return existing
            working = self.root / f"{_BUILDING}{key}"
            shutil.rmtree(working, ignore_errors=True)  # of a builder that died: we hold the lock
            try:
                working.mkdir()
                manifest = builder(working)
                if manifest.key != key:
                    raise EngineError(f"the builder made engine {manifest.key} where {key} was asked for")
                manifest = manifest.updated(files=_records(working))
                _write(working / MANIFEST, manifest.to_json())
                _flush(working)
                broken = self.folder(key)
                if broken.exists():
                    shutil.rmtree(broken)
                working.replace(broken)
                return manifest
            except OSError as error:
                if error.errno in _FULL_DISK:
                    raise NotEnoughDisk(
                        f"no space left in {self.root} while building an engine; free some, or choose another folder "
                        f"(--engines), and build again: what is complete is kept"
                    ) from error
                raise
            finally:
                shutil.rmtree(working, ignore_errors=True)

    def update(self, manifest: Manifest) -> None:
        """Replace the measurements of an engine that exists (its files stay).

        Raises:
            EngineError: the engine is not in the store.
        """
        folder = self.folder(manifest.key)
        with self._lock(manifest.key):
            if not folder.is_dir():
                raise EngineError(f"engine {manifest.key} is not in {self.root}")
            temporary = folder / f".{MANIFEST}-{os.getpid()}"
            try:
                _write(temporary, manifest.to_json())
                temporary.replace(folder / MANIFEST)
            finally:
                temporary.unlink(missing_ok=True)

    def check(self, manifest: Manifest, here: Target, command: str, digests: bool = True) -> None:
        """Refuse an engine that is damaged or not for this machine.

        Args:
            manifest: of the engine.
            here: this machine.
            command: what to run to build it again; part of the message.
            digests: also read every file that has been touched since it was last read; lengths are always compared.
                (:meth:`verify` reads all of them.)

        Raises:
            EngineMismatch: another machine.
            EngineCorrupt: a file is missing, cut short or altered.
        """
        differences = manifest.spec.target.differences(here)
        differences += version_differences(manifest)
        if differences:
            raise EngineMismatch(
                f"engine {manifest.spec.title} was built for {'; '.join(differences)}. "
                f"Build it for this machine: {command}"
            )
        known = self._read_before(manifest.key) if digests else {}
        self._check_files(manifest, command, digests, known)
        if digests:
            self._remember(manifest, known)

    def _check_files(
        self, manifest: Manifest, command: str, digests: bool = True, known: Mapping[str, str] | None = None
    ) -> None:
        for name, record in manifest.files.items():
            path = self.folder(manifest.key) / name
            unread = (known or {}).get(name) != _stamp(path, record)
            problem = _file_problem(path, record, digests and unread)
            if problem:
                raise EngineCorrupt(
                    f"engine {manifest.spec.title}: {path} {problem}. Remove its folder and build it again: "
                    f"rmd engines prune --engines {self.root} --broken && {command}"
                )

    # Plans of large networks have gigabytes, and a server loads them at every start: what was read against its digest
    # once, and has the time and inode that it had, is not read again.

    def _read_before(self, key: str) -> dict[str, str]:
        try:
            known = json.loads((self.root / ".locks" / f"{key}.read").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _remember(self, manifest: Manifest, known: Mapping[str, str]) -> None:
        now = {name: _stamp(self.folder(manifest.key) / name, record) for name, record in manifest.files.items()}
        if now == known:
            return
        place = self.root / ".locks" / f"{manifest.key}.read"
        temporary = place.with_name(f"{place.name}-{os.getpid()}")
        with suppress(OSError):  # a store that cannot be written is read each time
            place.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(now), encoding="utf-8")
            temporary.replace(place)

    def verify(self) -> builtins.list[Problem]:
        """Read every file of every engine and tell what is wrong."""
        found = (self.problem(key) for key in self.keys())
        return [problem for problem in found if problem is not None]

    def problem(self, key: str) -> Problem | None:
        """What is wrong with the engine ``key``, None when it is sound. Reads every file of it.

        It is foreign where this machine lacks its device, or has another one; damage is told before that.
        """
        command = f"rmd build --engines {self.root} --checkpoint FOLDER"
        try:
            manifest = Manifest.read(self.folder(key))
            self._check_files(manifest, command)
            self.check(manifest, machine_with(manifest.spec.target.device), command, digests=False)
        except EngineMismatch as error:
            return Problem(key, str(error), broken=False)
        except EngineCorrupt as error:
            return Problem(key, str(error), broken=True)
        return None

    def prune(self, keys: Iterable[str], unwanted: Callable[[str], bool] | None = None) -> builtins.list[str]:
        """Remove engines and what dead builders left. An engine that another process is building is left alone.

        Args:
            keys: of the engines; other names are passed over.
            unwanted: asked for each key while nobody can build it; None removes all.

        Returns:
            The keys that were removed.
        """
        removed = []
        for key in keys:
            if not _KEY.fullmatch(key) or not self.folder(key).is_dir():
                continue
            try:
                with self._lock(key, timeout=0):
                    # Another prune may have been here since, or a builder may have replaced what was broken.
                    if not self.folder(key).is_dir() or not (unwanted is None or unwanted(key)):
                        continue
                    # Renamed first: no reader ever sees a half-removed engine under its key.
                    doomed = self.root / f"{_BUILDING}{key}"
                    shutil.rmtree(doomed, ignore_errors=True)
                    self.folder(key).replace(doomed)
                    shutil.rmtree(doomed)
                    removed.append(key)
            except TimeoutError:
                continue  # someone builds it right now
        if self.root.is_dir():
            for left in self.root.glob(f"{_BUILDING}*"):
                lock = self._lock(left.name.removeprefix(_BUILDING), timeout=0)
                try:
                    with lock:
                        shutil.rmtree(left, ignore_errors=True)
                except TimeoutError:
                    continue  # someone builds it right now
        return removed

    def has(self, key: str) -> bool:
        """Whether ``key`` is built and its files have their lengths."""
        return self._sound(key) is not None

    def _sound(self, key: str) -> Manifest | None:
        """The manifest of ``key`` if it and the lengths of its files are right; a broken one is built again."""
        try:
            manifest = self.get(key)
        except EngineCorrupt:
            return None
        if manifest is None:
            return None
        if any(_file_problem(self.folder(key) / name, record, False) for name, record in manifest.files.items()):
            return None
        return manifest

    def _lock(self, key: str, timeout: float = -1) -> FileLock:
        locks = self.root / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in _FULL_DISK:
                raise NotEnoughDisk(f"no space left in {self.root}; free some, or choose another folder") from error
            raise
        return FileLock(locks / f"{key}.lock", timeout=timeout)


def version_differences(manifest: Manifest) -> list[str]:
    """Libraries that are not at the version the engine was built with."""
    return [
        f"{name} {version or 'absent'}, here {package_version(name) or 'absent'}"
        for name, version in sorted(manifest.spec.versions.items())
        if package_version(name) != version
    ]


def _stamp(path: Path, record: FileRecord) -> str:
    """What changes when a file does; "" where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{record.sha256} {found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _file_problem(path: Path, record: FileRecord, digests: bool) -> str:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size < record.bytes:
        return f"is cut short ({size} of {record.bytes} bytes)"
    if size > record.bytes:
        return f"has {size - record.bytes} bytes too many"
    if digests and FileRecord.of(path).sha256 != record.sha256:
        return "was altered: its sha256 is not the manifest's"
    return ""


def _records(folder: Path) -> dict[str, FileRecord]:
    return {
        path.relative_to(folder).as_posix(): FileRecord.of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Bring file contents to disk before the rename: a power cut must not leave an empty engine under its key."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
