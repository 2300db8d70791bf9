"""A checkpoint folder: a diffusers folder with a `cascade.json`, checked before anything of it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rmd.cascade import Cascade
from rmd.fields import GUIDANCE_RULE, LARGEST_FACTOR, SHIFT_RULE, field_of, integer, mapping, number, read_json, text
from rmd.timesteps import uniform_teacher_timesteps
from rmd.weight_files import check_weights, decoder_digests, file_digest, folder_digest, loaded_digests

FORMAT = 1
CASCADE_FILE = "cascade.json"
FULL_DECODER = "full"
"""Chosen as decoder: the checkpoint's own autoencoder."""
DECODER_RECORD = "decoder.json"
"""Beside a distilled decoder's weights: which autoencoder it stands for."""
TEACHER_SCHEDULE = "teacher"
# Where diffusers keeps what the backbones call by role.
_FOLDERS_BY_ROLE = {"denoiser": ("transformer", "unet"), "decoder": ("vae",)}
_MOST_TEACHER_STEPS = 1000
_LONGEST_NAME = 200


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
            guidance_scale=field_of(data, "guidance_scale", _guidance, "teacher."),
            flow_shift=field_of(data, "flow_shift", _shift, "teacher.") if "flow_shift" in data else 1.0,
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
        decoder_weights: sha256 of the small decoder's files, by name, where they are recorded.
    """

    path: Path
    backbone_name: str
    cascades: dict[str, Cascade]
    default: str
    teacher: TeacherSpec | None = None
    distillation: dict[str, Any] = field(default_factory=dict)
    decoder: str | None = None
    chosen_decoder: str | None = None
    decoder_weights: dict[str, str] = field(default_factory=dict)

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
            ValueError: its weights are pickled or broken, or there are none; or, where it is left as it is, they are
                not those that are recorded.
        """
        if choice is None:
            if self.decoder_path is not None and self.decoder_path.is_dir():
                _check_digests(self.decoder_path, self.decoder_weights, "decoder_weights")
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

    def check_teacher(self) -> None:
        """Check that the teacher's files are those that its own `cascade.json` records, where it has one.

        Raises:
            FileNotFoundError, ValueError: as :meth:`read`.
        """
        path = self.teacher_path
        if path is not None and (path / CASCADE_FILE).is_file():
            CheckpointFolder.read(path)

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
            raise FileNotFoundError(
                f"{folder} is not a folder; give the path of a checkpoint folder, or owner/name@revision of the hub"
            )
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
        _check_digests(folder, recorded, "weights")
        _check_nothing_added(folder, recorded)
        return checkpoint

    def fingerprint(self) -> str:
        """sha256 over what decides a picture: `cascade.json`, and what loading reads, of its small decoder too.

        Its teacher is left out: few read it.
        """
        decoder = {} if self.decoder_path is None else decoder_digests(self.decoder_path)
        read = {CASCADE_FILE: file_digest(self.path / CASCADE_FILE), **loaded_digests(self.path)}
        lines = [f"{name} {digest}\n" for name, digest in sorted(read.items())]
        lines += [f"decoder/{name} {digest}\n" for name, digest in sorted(decoder.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

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


def _check_digests(folder: Path, recorded: Mapping[str, Any], where: str) -> None:
    for name, digest in recorded.items():
        try:
            there = (folder / name).is_file()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            shown = folder / name if len(name) < _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
            raise FileNotFoundError(f"{shown} is recorded in {CASCADE_FILE} and is not there; copy it again")
        if file_digest(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is not the file that {CASCADE_FILE} records (field '{where}'): it was altered or "
                f"damaged; copy it again, or, if you changed it yourself, remove that field"
            )


def _check_nothing_added(folder: Path, recorded: Mapping[str, Any]) -> None:
    """Refuse a file beside recorded ones that loading would read too: a tokenizer's settings, say."""
    if all(name.endswith(".safetensors") for name in recorded):  # as older versions recorded
        return
    places = {Path(name).parent for name in recorded}
    added = [name for name in loaded_digests(folder) if name not in recorded and Path(name).parent in places]
    if added:
        raise ValueError(
            f"{folder / added[0]} is not recorded in {CASCADE_FILE} (field 'weights') and would be read with the files "
            f"that are; remove it, or, if you added it yourself, remove that field"
        )


def _teacher_steps(value: Any) -> int:
    if not 1 <= integer(value) <= _MOST_TEACHER_STEPS:
        raise ValueError(f"must be from 1 to {_MOST_TEACHER_STEPS}, not {value}")
    return int(value)


def _shift(value: Any) -> float:
    if not 1 / LARGEST_FACTOR <= number(value) <= LARGEST_FACTOR:
        raise ValueError(f"{SHIFT_RULE}, not {value}")
    return float(value)


def _guidance(value: Any) -> float:
    if not 0 <= number(value) <= LARGEST_FACTOR:
        raise ValueError(f"{GUIDANCE_RULE}, but is {value}")
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
        "decoder_weights": field_of(top, "decoder_weights", mapping) if "decoder_weights" in top else {},
    }
