"""The published packages that the pictures, labels and licences come from; fetched with the user's own `npm`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MAX_MEMBER_BYTES = 128 * 2**20


class SourceError(ValueError):
    """A package could not be fetched or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One npm package.

    Attributes:
        name, version: as `npm pack NAME@VERSION` wants them.
        sha256: of the tarball.
        licence: SPDX name.
        credit: the line that goes into NOTICE.
        style: caption name of its pictures, empty where it holds none.
        names_from: package whose ``chars.json`` names the pictures; its own when empty. A training-only package whose
            table is empty is joined by its icons' names.
        training_only: its pictures are never test pictures, and change nothing about which others are.
        near: the style family that its drawings resemble so much that they would give away that family's held-out
            ones; what is held out there is left out here too.
    """

    name: str
    version: str
    sha256: str
    licence: str
    credit: str
    style: str = ""
    names_from: str = ""
    training_only: bool = False
    near: str = ""

    @property
    def file_name(self) -> str:
        """The tarball's name as `npm pack` writes it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT",
    "emojibase-data: labels and tags. Copyright Miles Johnson. MIT.",
)  # fmt: skip
NOTO = Package(
    "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0",
    "Noto Emoji. Copyright Google Inc. Apache-2.0.", "noto",
)  # fmt: skip
TWEMOJI = Package(
    "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0",
    "Twemoji graphics. Copyright Twitter, Inc and other contributors. Licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). Rendered, resized and learnt from: changed.", "twemoji",
)  # fmt: skip
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "MIT", "Fluent Emoji (flat and 3D). Copyright Microsoft Corporation. MIT.", "fluent flat",
)  # fmt: skip
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT",
    "Fluent Emoji 3D, packaged by LobeHub. Copyright Microsoft Corporation. MIT.", "fluent 3d",
)  # fmt: skip
FLUENT_GRADIENT = Package(
    "@iconify-json/fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT",
    "Fluent Emoji (gradients). Copyright Microsoft Corporation. MIT.", "fluent gradient", FLUENT_FLAT.name,
)  # fmt: skip
"""The flat set's drawings once more, with gradients; left out by default."""
NOTO_V1 = Package(
    "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0",
    "Noto Emoji, version 1. Copyright Google Inc. Apache-2.0.", "noto blob", training_only=True, near="noto",
)  # fmt: skip
EMOJIONE = Package(
    "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0",
    "Emoji artwork by EmojiOne, version 2.3. Licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). Rendered, resized and learnt from: changed.", "emojione",
    training_only=True,
)  # fmt: skip
FXEMOJI = Package(
    "@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "Apache-2.0",
    "Firefox OS Emoji (FxEmojis). Copyright Mozilla Foundation. Apache-2.0.", "fxemoji", training_only=True,
    near="twemoji",
)  # fmt: skip
STREAMLINE = Package(
    "@iconify-json/streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    "CC-BY-4.0", "Streamline Emojis by Streamline (https://streamlinehq.com). Licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). Rendered, resized and learnt from: changed.", "streamline",
    training_only=True,
)  # fmt: skip
# ``near`` by the median cosine of EfficientNet-Lite0 features over the same concepts: FxEmojis and Twemoji 0.75, Noto's
# blobs and Noto 0.71; any two tested families reach 0.70 at most, EmojiOne and Streamline 0.66 with any of them.
DEFAULT_PACKAGES = (LABELS, NOTO, TWEMOJI, FLUENT_FLAT, FLUENT_3D, NOTO_V1, EMOJIONE, FXEMOJI, STREAMLINE)


def digest_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(package: Package, path: Path) -> None:
    """Compares a tarball with the pinned digest.

    Raises:
        SourceError: they differ.
    """
    found = digest_of(path)
    if found != package.sha256:
        raise SourceError(
            f"{path} has sha256 {found}, but {package.name}@{package.version} is pinned to {package.sha256}: "
            "delete the file and run the command again"
        )


def fetch(package: Package, folder: Path, npm: str = "npm") -> Path:
    """The checked tarball of ``package`` in ``folder``; fetched with ``npm pack`` unless it is there already.

    Raises:
        SourceError: npm is missing or fails, or the digest is not the pinned one.
    """
    target = folder / package.file_name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        executable = shutil.which(npm)
        if executable is None:
            raise SourceError(
                f"{npm!r} is not installed: install Node's npm, or put {package.file_name} into {folder} yourself"
            )
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            result = subprocess.run(
                [executable, "pack", f"{package.name}@{package.version}", "--silent", "--ignore-scripts"],
                cwd=scratch, capture_output=True, text=True, check=False,
            )  # fmt: skip
            fetched = Path(scratch) / package.file_name
            if result.returncode != 0 or not fetched.is_file():
                reason = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no tarball was written"]
                raise SourceError(f"`npm pack {package.name}@{package.version}` failed: {reason[0]}")
            check_digest(package, fetched)
            os.replace(fetched, target)
    check_digest(package, target)
    return target


class Tarball:
    """Reads named regular members of a package's tarball; nothing is ever unpacked to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, bytes] = {}
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if not member.isfile() or ".." in parts or member.name.startswith("/"):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise SourceError(f"{path}: member {member.name} is larger than {MAX_MEMBER_BYTES} bytes")
                file = archive.extractfile(member)
                if file is not None:
                    self._members[str(PurePosixPath(*parts[1:]))] = file.read()

    @property
    def names(self) -> list[str]:
        """Member paths inside the package folder."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """One member's content.

        Raises:
            SourceError: there is none of this name.
        """
        if name not in self._members:
            raise SourceError(f"{self.path} holds no {name}")
        return self._members[name]

    def read_json(self, name: str) -> Any:
        """One member parsed as JSON."""
        return json.loads(self.read(name))


def notice_text(packages: Mapping[str, str] | None = None) -> str:
    """Credits for pictures and text encoder, to be kept beside any weights trained on them.

    Args:
        packages: package name -> credit line; the default packages' when None.
    """
    credits = packages if packages is not None else {p.name: p.credit for p in DEFAULT_PACKAGES}
    lines = [
        "The embedded model's weights were trained from scratch on renderings of these picture sets:",
        "",
        *(f"- {credit} (npm {name})" for name, credit in credits.items()),
        "",
        "Text encoder: all-MiniLM-L6-v2, sentence-transformers. Apache-2.0. Weights rounded to bfloat16.",
    ]
    return "\n".join(lines) + "\n"
