"""The record beside an engine's files: what it is, what it was checked against, and how fast it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.errors import EngineCorrupt
from engines.spec import EngineSpec, TensorSpec, WeightsMode

FORMAT = 5
MANIFEST = "manifest.json"


def _digest(data: Mapping[str, Any]) -> str:
    """sha256 of a record's fields, however they are written."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file of an engine."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read a file and record it."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """One engine's record.

    Attributes:
        spec: the key's parts.
        files: by name inside the engine's folder.
        inputs: named inputs, in the order in which the engine takes them.
        output: the one output.
        weights_mode: how it holds its weights.
        constants: constant's name -> how it is made from the network's parameters; where those lie inside the engine
            only those whose values fit one parameter alone.
        embedded_bytes: weights inside the engine.
        streams: in how many equal parts it runs its rows, side by side.
        relative_l2: against eager in the same dtype, on the checkpoint it was built from, the worst of its batches;
            None when not measured.
        tolerance: what relative_l2 had to stay under.
        build_seconds, load_seconds: wall-clock.
        latency_seconds: by batch: median over warm runs; empty when not measured.
        note: one sentence when the build differs from what was asked for.
    """

    spec: EngineSpec
    files: Mapping[str, FileRecord]
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    weights_mode: WeightsMode
    constants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    embedded_bytes: int = 0
    streams: int = 1
    relative_l2: float | None = None
    tolerance: float | None = None
    build_seconds: float = 0.0
    load_seconds: float = 0.0
    latency_seconds: Mapping[int, float] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        """The engine's key."""
        return self.spec.key

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.files.values())

    @property
    def milliseconds(self) -> str:
        """The latencies for people, one a batch: "1.20, 2.05"; "-" when not measured."""
        return ", ".join(f"{1000 * seconds:.2f}" for _, seconds in sorted(self.latency_seconds.items())) or "-"

    def updated(self, **changes: Any) -> Manifest:
        """A copy with other measurements."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """The content of ``manifest.json``; its last field is the digest of the others."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "key": self.key,
            "spec": self.spec.to_dict(),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
            "inputs": [spec.to_dict() for spec in self.inputs],
            "output": self.output.to_dict(),
            # A guided request takes two rows of one batch, the unconditional and the conditional one.
            "profiles": [{"batch": batch, "guided_requests": batch // 2} for batch in self.spec.batches],
            "weights_mode": self.weights_mode,
            "constants": {name: dict(recipe) for name, recipe in sorted(self.constants.items())},
            "embedded_bytes": self.embedded_bytes,
            "streams": self.streams,
            "relative_l2": self.relative_l2,
            "tolerance": self.tolerance,
            "build_seconds": self.build_seconds,
            "load_seconds": self.load_seconds,
            "latency_seconds": {str(batch): seconds for batch, seconds in sorted(self.latency_seconds.items())},
            "note": self.note,
        }
        return json.dumps({**data, "digest": _digest(data)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``manifest.json`` of an engine's folder.

        Raises:
            EngineCorrupt: missing, unreadable, altered, of another format, or not the folder's own key.
        """
        path = folder / MANIFEST
        advice = "remove the folder and build it again (rmd engines prune --broken, then rmd build)"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EngineCorrupt(f"{path} is missing; {advice}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EngineCorrupt(f"{path} is not JSON ({error}); {advice}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise EngineCorrupt(f"{path}: field 'format' is not {FORMAT}; {advice}")
        if data.pop("digest", None) != _digest(data):
            raise EngineCorrupt(f"{path} was altered: it is not what its field 'digest' says; {advice}")
        try:
            manifest = cls(
                spec=EngineSpec.from_dict(data["spec"]),
                files={name: FileRecord(**record) for name, record in data["files"].items()},
                inputs=tuple(TensorSpec.from_dict(entry) for entry in data["inputs"]),
                output=TensorSpec.from_dict(data["output"]),
                weights_mode=WeightsMode(data["weights_mode"]),
                constants=data["constants"],
                embedded_bytes=int(data["embedded_bytes"]),
                streams=int(data.get("streams", 1)),
                relative_l2=data["relative_l2"],
                tolerance=data["tolerance"],
                build_seconds=float(data["build_seconds"]),
                load_seconds=float(data["load_seconds"]),
                latency_seconds={int(batch): float(value) for batch, value in data["latency_seconds"].items()},
                note=str(data["note"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineCorrupt(f"{path}: a field is missing or wrong ({error}); {advice}") from None
        if not manifest.key == data.get("key") == folder.name:
            raise EngineCorrupt(f"{path}: the key does not match its parts or its folder; {advice}")
        return manifest
