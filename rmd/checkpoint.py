"""A checkpoint folder: a diffusers folder with a `cascade.json`, checked before anything of it is loaded.

Only safetensors are read. A pickled weight file anywhere in the folder is refused, since loading one runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rmd.cascade import Cascade
from rmd.fields import field_of, integer, mapping, number, text
from rmd.timesteps import uniform_teacher_timesteps

FORMAT = 1
CASCADE_FILE = "cascade.json"
FULL_DECODER = "full"
"""Chosen as decoder: the checkpoint's own autoencoder."""
DECODER_RECORD = "decoder.json"
"""Beside a distilled decoder's weights: which autoencoder it stands for."""
TEACHER_SCHEDULE = "teacher"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Where diffusers keeps what the backbones call by role.
_FOLDERS_BY_ROLE = {"denoiser": ("transformer", "unet"), "decoder": ("vae",)}
_LONGEST_HEADER = 100_000_000
# What loading reads besides weights: configurations, and every form in which a tokenizer's vocabulary is kept.
_LOADED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_MOST_TEACHER_STEPS = 1000


@dataclass(frozen=True)
class TeacherSpec:
    """How the teacher is sampled, and where it lies (relative to the checkpoint's folder), if it is at hand."""

    steps: int
    guidance_scale: float
    flow_shift: float = 1.0
    folder: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TeacherSpec:
        """Read the "teacher" object of `cascade.json`.

        Raises:
            ValueError: a field is missing or has a wrong value; the message names it.
        """
        return cls(
            steps=field_of(data, "steps", _teacher_steps, "teacher."),
            guidance_scale=field_of(data, "guidance_scale", _not_negative, "teacher."),
            flow_shift=field_of(data, "flow_shift", _positive, "teacher.") if "flow_shift" in data else 1.0,
            folder=None if data.get("folder") is None else field_of(data, "folder", text, "teacher."),
        )


@dataclass(frozen=True)
class CheckpointFolder:
    """A validated checkpoint folder.

    Attributes:
        path: the folder.
        backbone_name: key of the backbone registry.
        cascades: by schedule name.
        default: name of the schedule that is used unless another is asked for.
        teacher: how the teacher is sampled, or None.
        distillation: free-form record of how the checkpoint came about.
        decoder: folder of the small decoder that all schedules are decoded with, relative to `path` (or absolute);
            None for the checkpoint's own autoencoder.
        chosen_decoder: what :meth:`with_decoder` was given in the place of what the checkpoint names, if anything.
    """

    path: Path
    backbone_name: str
    cascades: dict[str, Cascade]
    default: str
    teacher: TeacherSpec | None = None
    distillation: dict[str, Any] = field(default_factory=dict)
    decoder: str | None = None
    chosen_decoder: str | None = None

    @property
    def decoder_path(self) -> Path | None:
        """The small decoder's folder, or None where the checkpoint's own autoencoder decodes."""
        return None if self.decoder is None else self.path / self.decoder

    def with_decoder(self, choice: Path | str | None) -> CheckpointFolder:
        """The same checkpoint with another decoder.

        Args:
            choice: a decoder's folder, "full" for the checkpoint's own autoencoder, or None to leave it as it is.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: its weights are pickled or broken, or there are none.
        """
        if choice is None:
            return self
        if str(choice) == FULL_DECODER:
            return replace(self, decoder=None, chosen_decoder=FULL_DECODER)
        folder = Path(choice).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"the decoder {choice} is not a folder; give one, or '{FULL_DECODER}'")
        check_weights(folder)
        return replace(self, decoder=str(folder), chosen_decoder=str(folder))

    @property
    def default_cascade(self) -> Cascade:
        """The default schedule's cascade."""
        return self.cascades[self.default]

    @property
    def teacher_path(self) -> Path | None:
        """The teacher's folder, or None when the checkpoint names none."""
        if self.teacher is None or self.teacher.folder is None:
            return None
        return self.path / self.teacher.folder

    @property
    def teacher_cascade(self) -> Cascade | None:
        """The teacher's own sampling at the full size, schedule "teacher"; None when no teacher is named."""
        spec = self.teacher
        if spec is None:
            return None
        return Cascade.from_steps(
            f"{self.backbone_name}-teacher",
            uniform_teacher_timesteps(spec.steps, spec.flow_shift),
            [self.default_cascade.full_size] * spec.steps,
            schedule_name=TEACHER_SCHEDULE,
            flow_shift=spec.flow_shift,
            guidance_scale=spec.guidance_scale,
            score_noise_intensity=0.0,
        )

    @classmethod
    def read(cls, folder: Path | str) -> CheckpointFolder:
        """Read and check a folder: `cascade.json`, no pickled weights, every safetensors file complete and unaltered.

        Unaltered: of the sha256 that `cascade.json` records under "weights", where it does. Older ones record the
        safetensors files alone, newer ones configurations and tokenizers too.

        Raises:
            FileNotFoundError: the folder, `cascade.json`, a recorded file or one that an index lists does not exist.
            ValueError: anything else that is wrong; the message names the file and the field.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give the path of a checkpoint folder")
        check_weights(folder)
        path = folder / CASCADE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; distillation writes one, and `rmd cascade write --preset NAME {folder}` does "
                f"for a public few-step student's folder"
            )
        try:
            data = mapping(read_json(path))
            parsed = _parse(data)
            recorded: Mapping[str, Any] = field_of(data, "weights", mapping) if "weights" in data else {}
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
        checkpoint = cls(path=folder, **parsed)
        try:
            _ = checkpoint.teacher_cascade  # so many steps may round to the same timestep
        except ValueError as error:
            raise ValueError(f"{path}: field 'teacher': {error}") from None
        _check_digests(folder, recorded)
        return checkpoint

    def digest(self, component: str) -> str:
        """sha256 of a component's weights: its folder's name, or its role ("denoiser", "decoder").

        One weight file gives that file's own sha256; several give the sha256 over their sorted names and digests.

        Raises:
            FileNotFoundError: the folder has no such component.
        """
        folders = [self.path / name for name in _FOLDERS_BY_ROLE.get(component, (component,))]
        if component == "decoder" and self.decoder_path is not None:
            folders = [self.decoder_path]
        for folder in folders:
            found = folder_digest(folder)
            if found is not None:
                return found
        raise FileNotFoundError(f"{self.path} holds no safetensors weights of component {component!r}")


def folder_digest(folder: Path) -> str | None:
    """sha256 of the weight file in a folder, over names and digests where there are several; None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file.name} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else None


def loaded_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder that loading reads, by its relative path.

    Those are the index and what lies in the components' folders: weights, configurations and tokenizers. A changed
    configuration draws other pictures as surely as changed weights do.
    """
    relative = {path.relative_to(folder): path for path in _files(folder)}
    return {
        name.as_posix(): file_digest(path)
        for name, path in relative.items()
        if path.suffix in _LOADED_SUFFIXES
        and (path.suffix == ".safetensors" or name.name == "model_index.json" or len(name.parts) > 1)
    }


def _check_digests(folder: Path, recorded: Mapping[str, Any]) -> None:
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is recorded in {CASCADE_FILE} and is not there; copy it again")
        if file_digest(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is not the file that {CASCADE_FILE} records (field 'weights'): it was altered or "
                f"damaged; copy it again, or, if you changed it yourself, remove that field"
            )


def _teacher_steps(value: Any) -> int:
    if not 1 <= integer(value) <= _MOST_TEACHER_STEPS:
        raise ValueError(f"must be from 1 to {_MOST_TEACHER_STEPS}, not {value}")
    return int(value)


def _positive(value: Any) -> float:
    if number(value) <= 0:
        raise ValueError(f"must be above 0, not {value}")
    return float(value)


def _not_negative(value: Any) -> float:
    if number(value) < 0:
        raise ValueError(f"must not be negative, but is {value}")
    return float(value)


def _check_schedule_name(name: str) -> None:
    """Names go over the wire and into file names; one is taken."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field 'schedules': the name {name!r} is not valid Unicode; rename it") from None
    if not name or not name.isprintable():
        raise ValueError(f"field 'schedules': the name {name!r} is not printable text; rename it")
    if name == TEACHER_SCHEDULE:
        raise ValueError(f"field 'schedules': {name!r} is what the teacher's own sampling is called; rename it")


def _parse(data: Any) -> dict[str, Any]:
    top = mapping(data)
    if field_of(top, "format", integer) != FORMAT:
        raise ValueError(f"field 'format': must be {FORMAT}, not {top['format']}; use a matching version of rmd")
    schedules: dict[str, Any] = field_of(top, "schedules", mapping)
    if not schedules:
        raise ValueError("field 'schedules': must hold at least one schedule")
    cascades: dict[str, Cascade] = {}
    for name, entry in schedules.items():
        _check_schedule_name(name)
        try:
            cascades[name] = Cascade.from_dict(entry)
        except ValueError as error:
            raise ValueError(f"schedules[{name!r}]: {error}") from None
    default: str = field_of(top, "default", text)
    if default not in cascades:
        raise ValueError(f"field 'default': {default!r} is not one of the schedules {', '.join(cascades)}")
    teacher = top.get("teacher")
    distillation = top.get("distillation")
    return {
        "backbone_name": field_of(top, "backbone", text),
        "cascades": cascades,
        "default": default,
        "teacher": None if teacher is None else TeacherSpec.from_dict(field_of(top, "teacher", mapping)),
        "distillation": {} if distillation is None else field_of(top, "distillation", mapping),
        "decoder": None if top.get("decoder") in (None, FULL_DECODER) else field_of(top, "decoder", text),
    }


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not UTF-8 JSON; the message names the file, line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be read") from None


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Linked folders are followed (teacher and student share components), loops are not."""
    seen: set[str] = set()
    for root, directories, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories.sort()
        for name in sorted(names):
            yield Path(root) / name


def check_weights(folder: Path) -> None:
    """Refuse pickled weights anywhere in the folder; check that every safetensors file is there and complete.

    Raises:
        ValueError: a pickled or broken weight file, or no weights at all.
        FileNotFoundError: an index lists a weight file that is not there.
    """
    found = False
    for path in _files(folder):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ValueError(
                f"{path} is a pickled file, which can run code when it is loaded; only safetensors are read: "
                f"convert it (save_pretrained with safe_serialization=True) or remove it"
            )
        if path.suffix == ".safetensors":
            check_safetensors(path)
            found = True
        elif is_index(path):
            check_index(path)
    if not found:
        raise ValueError(f"{folder} holds no safetensors weights; give a diffusers folder with a {CASCADE_FILE}")


def is_index(path: Path) -> bool:
    """Whether the file lists the parts of a model's weights; its name may hold a variant, such as fp16."""
    return ".safetensors.index." in path.name and path.suffix == ".json"


def check_index(path: Path) -> None:
    """Check that the parts which an index lists are safetensors files beside it: loaders take them as they come.

    Raises:
        ValueError: it lists a file of another kind, or one elsewhere.
        FileNotFoundError: a part is not there.
    """
    for part in sorted({str(name) for name in field_of(mapping(read_json(path)), "weight_map", mapping).values()}):
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise ValueError(f"{path} lists {part!r}; only safetensors files beside it are read")
        if not (path.parent / part).is_file():
            raise FileNotFoundError(f"{path} lists {part}, which is not there; fetch or copy it again")


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is as long as its header says, without reading the weights.

    Raises:
        ValueError: it is cut short or is no safetensors file; the message names the way out.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) == 8 and 8 + length > size and length <= _LONGEST_HEADER:
            raise ValueError(f"{path} is cut short inside its header; fetch or copy it again")
        try:
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            expected = 8 + length + int(end)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError(f"{path} is not a safetensors file; fetch or copy it again") from None
    if size < expected:
        raise ValueError(f"{path} is cut short: {size} of {expected} bytes are there; fetch or copy it again")
    if size > expected:
        raise ValueError(f"{path} has {size - expected} bytes too many; fetch or copy it again")


@lru_cache(maxsize=256)
def _digest_of(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, computed once a process for each (path, size, time of change)."""
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def write_cascade_json(
    folder: Path | str,
    *,
    backbone: str,
    cascades: Mapping[str, Cascade],
    default: str,
    teacher: TeacherSpec | None = None,
    distillation: Mapping[str, Any] | None = None,
    decoder: str | None = None,
) -> Path:
    """Write a folder's `cascade.json` atomically and return its path; every file that loading reads is recorded in it.

    Raises:
        ValueError: the default is not one of the cascades, or there is none.
    """
    if default not in cascades:
        raise ValueError(f"default {default!r} is not one of the schedules {', '.join(cascades) or '(none)'}")
    data: dict[str, Any] = {
        "format": FORMAT,
        "backbone": backbone,
        "default": default,
        "schedules": {name: cascade.to_dict() for name, cascade in cascades.items()},
        "teacher": None if teacher is None else asdict(teacher),
        "distillation": dict(distillation or {}),
        "weights": loaded_digests(Path(folder)),
    }
    if decoder is not None:
        data["decoder"] = decoder
    path = Path(folder) / CASCADE_FILE
    content = json.dumps(data, indent=2, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=".cascade-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private; the checkpoint is meant to be read by the service's own user.
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path
