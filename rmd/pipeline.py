"""A distilled checkpoint in Python, in the manners of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from threading import RLock
from typing import Any, Literal, Self, get_args

import torch
from PIL import Image
from torch import Tensor

from rmd.backbones.base import Backbone, BackboneError, usable_device
from rmd.backbones.executor import Executor
from rmd.backbones.layout import lay_out
from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade, Step
from rmd.checkpoint import CheckpointFolder
from rmd.dtypes import dtype_name, parse_dtype
from rmd.pipeline_arguments import count_of, latents_of, refuse_others, seeds_of, texts_of
from rmd.pixels import to_pixels
from rmd.published.hub import checkpoint_folder
from rmd.sampler import sample

TEACHER = "teacher"
"""The schedule under which the teacher draws, by its own steps and guidance."""
EXECUTORS = "rmd.executors"
"""Entry points of what runs a checkpoint's components compiled; this package knows of no compiler."""

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["CascadePipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass
class CascadeOutput:
    """What a call returns.

    Attributes:
        images: of a picture model: PIL images, or (B, H, W, 3) floats as numpy, (B, 3, H, W) as torch, or latents.
        frames: of a film model: a list of PIL images a film, (B, T, H, W, 3), (B, T, 3, H, W), or latents.
        seeds: of each; the same seed draws the same again, whatever it is batched with.
    """

    images: Any = None
    frames: Any = None
    seeds: list[int] = field(default_factory=list)


class CascadePipeline:
    """Text to pictures or films by a checkpoint's cascades.

    >>> pipe = CascadePipeline.from_pretrained("models/embedded")
    >>> pipe("red apple, noto style", seed=1).images[0].save("apple.png")

    Attributes:
        checkpoint: the folder that was read.
        backbone: the networks, and what runs them.
    """

    def __init__(self, checkpoint: CheckpointFolder, backbone: Backbone, options: Mapping[str, Any]) -> None:
        self.checkpoint, self.backbone = checkpoint, backbone
        self._options = dict(options)
        self._teacher: Backbone | None = None
        self._offloaded = False
        # One thread at a time: Wan's decoder keeps its frames in itself, and offloading moves networks between calls.
        self._turn = RLock()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: Path | str,
        *,
        torch_dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        engines: Path | str | None = None,
        backend: str = "auto",
        buckets: Sequence[int] | None = None,
        decoder: Path | str | None = None,
    ) -> Self:
        """Reads a checkpoint folder: a diffusers folder with a ``cascade.json``.

        Args:
            checkpoint: the folder, or a hub's repository as ``owner/name@revision``, fetched once.
            torch_dtype: of the networks; "auto" is what the device is fast in.
            device: "cpu", "cuda" or "cuda:N".
            engines: run in the engines of this folder, as ``rmd build`` made them, instead of eagerly.
            backend, buckets: with engines: whose, and the batch sizes that they were built for.
            decoder: a small decoder's folder, or "full"; what the checkpoint names when None.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            ValueError: the checkpoint is damaged, or its backbone unknown; of engines, they are missing or do not fit.
        """
        if engines is None and (backend != "auto" or buckets is not None):
            raise ValueError("backend and buckets say which engines are meant: give engines=FOLDER too")
        if isinstance(buckets, str) or (buckets is not None and not list(buckets)):
            raise ValueError(f"buckets must be batch sizes, such as [1, 2, 4], not {buckets!r}")
        buckets = None if buckets is None else [count_of("buckets", bucket) for bucket in buckets]
        folder = CheckpointFolder.read(checkpoint_folder(checkpoint)).with_decoder(decoder)
        device = str(_place(device))
        dtype = parse_dtype(torch_dtype, device) if isinstance(torch_dtype, str) else torch_dtype
        options = {"dtype": dtype, "device": device, "engines": engines, "backend": backend, "buckets": buckets}
        options["decoder"] = decoder
        return cls(folder, _load(folder, folder.path, options), options)

    # ---- what it can do ---------------------------------------------------------------------------------------------

    @property
    def schedules(self) -> tuple[str, ...]:
        """What ``schedule=`` may be, the default first; "teacher" where the teacher is at hand."""
        names = dict.fromkeys([self.checkpoint.default, *self.checkpoint.cascades])
        folder = self.checkpoint.teacher_path
        return (*names, TEACHER) if folder is not None and folder.is_dir() else tuple(names)

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which they run."""
        return self.backbone.dtype

    def cascade(self, schedule: str | None = None) -> Cascade:
        """The steps of a schedule, the default one when None.

        Raises:
            ValueError: there is no such schedule.
        """
        name = schedule or self.checkpoint.default
        if name not in self.schedules:
            raise ValueError(f"schedule {name!r} is not in {self.checkpoint.path}: {', '.join(self.schedules)}")
        own = self.checkpoint.teacher_cascade if name == TEACHER else self.checkpoint.cascades[name]
        assert own is not None
        return own

    # ---- where it runs ----------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Moves the networks.

        Raises:
            TypeError: a dtype was given; networks are read in one.
            ValueError: there is no such device, or engines are of the one that they were built on.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"the networks are read in one dtype: from_pretrained(..., torch_dtype={device})")
        if self._options["engines"] is not None:
            raise ValueError("engines run on the device that they were built for: from_pretrained(..., device=...)")
        place = _place(device)
        with self._turn:
            for backbone in filter(None, (self.backbone, self._teacher)):
                if self._offloaded:
                    _forget_offload(backbone)
                backbone.to(place)
            self._options["device"], self._offloaded = str(place), False
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keeps the networks in main memory; each comes to ``device`` when it is called, and leaves for the next one.

        Raises:
            ValueError: engines hold their weights where they run.
        """
        if self._options["engines"] is not None:
            raise ValueError("engines hold their weights where they run: leave engines out to offload")
        place = _place(device)
        with self._turn:
            for backbone in filter(None, (self.backbone, self._teacher)):
                if self._offloaded:
                    _forget_offload(backbone)
                _offload(backbone, place)
            self._options["device"], self._offloaded = str(place), True

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        schedule: str | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> CascadeOutput | tuple[Any, ...]:
        """Draws.

        Args:
            prompt: one text or several, none empty.
            schedule: one of :attr:`schedules`; the checkpoint's default when None.
            seed: of the first picture, the next ones count up; or one a picture. Random when None.
            generator: instead of seeds: each picture's seed is drawn from it (or from its own, of a list).
            num_images_per_prompt: pictures, or films, of each prompt.
            output_type: see :class:`CascadeOutput`.
            batch_size: how many are drawn together; all when None.
            callback_on_step_end: called after each step with this pipeline, the step's index, its timestep of 1000 and
                ``{"latents": the state that follows, "pred_original_sample": the step's prediction}``. It may return a
                mapping with other "latents" to go on with; the prediction is for looking at.
            return_dict: False for a tuple of the output's fields.

        Returns:
            ``images`` or ``frames``, and the seeds.

        Raises:
            ValueError: an empty prompt, no such schedule, counts that do not match, or a callback that changed what it
                may not.
            TypeError: an argument that a cascade does not have; the message says where it went.
        """
        refuse_others(type(self).__name__, others)
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type {output_type!r} is not pil, np, pt or latent")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, not {type(callback_on_step_end).__name__}")
        each = count_of("num_images_per_prompt", num_images_per_prompt)
        texts = [text for text in texts_of(prompt) for _ in range(each)]
        seeds = seeds_of(len(texts), seed, generator)
        cascade = self.cascade(schedule)
        size = len(texts) if batch_size is None else count_of("batch_size", batch_size)
        drawn: list[Any] = []
        with self._turn:
            backbone = self._load_teacher() if schedule == TEACHER else self.backbone
            for at in range(0, len(texts), size):
                part = slice(at, at + size)
                drawn += self._draw(backbone, cascade, texts[part], seeds[part], output_type, callback_on_step_end)
        result: Any = drawn if output_type == "pil" else torch.stack(drawn)
        if output_type == "np":
            result = result.numpy()
        films = self.backbone.media == "video"
        output = CascadeOutput(None if films else result, result if films else None, seeds)
        return output if return_dict else tuple(value for value in astuple(output) if value is not None)

    def _draw(
        self,
        backbone: Backbone,
        cascade: Cascade,
        texts: list[str],
        seeds: list[int],
        output_type: OutputType,
        callback: StepCallback | None,
    ) -> list[Any]:
        predictions: list[Tensor] = []

        def keep(_index: int, _step: Step, x0_hat: Tensor) -> None:
            predictions[:] = [x0_hat.clone()]  # the last step's is the state itself

        def tell(index: int, step: Step, latents: Tensor) -> Tensor | None:
            assert callback is not None
            state = {"latents": latents, "pred_original_sample": predictions[0].clone()}
            answer = callback(self, index, float(step.timestep), state)
            return latents_of(answer, state, latents, predictions[0])

        hooks = {} if callback is None else {"on_step": keep, "on_state": tell}
        with torch.inference_mode():
            conditioning = backbone.encode_prompts(texts)
            uncond = None if cascade.guidance_scale == 1.0 else backbone.encode_unconditional(len(texts))
            latents = sample(backbone, cascade, conditioning, seeds, uncond, **hooks)  # type: ignore[arg-type]
            if output_type == "latent":
                return list(latents.cpu())
            decoded = backbone.decode(latents, cascade.full_size)
        if output_type == "pil":
            return [_images(pixels) for pixels in to_pixels(decoded)]
        if output_type == "np":
            return list(decoded.movedim(1, -1).cpu())
        return list((decoded if decoded.ndim == 4 else decoded.transpose(1, 2)).cpu())

    def _load_teacher(self) -> Backbone:
        if self._teacher is None:
            folder = self.checkpoint.teacher_path
            assert folder is not None
            self.checkpoint.check_teacher()
            if self._offloaded:  # it is never whole on the device
                self._teacher = _load(self.checkpoint, folder, {**self._options, "device": "cpu"})
                _offload(self._teacher, torch.device(self._options["device"]))
            else:
                self._teacher = _load(self.checkpoint, folder, self._options)
        return self._teacher


def _load(checkpoint: CheckpointFolder, weights: Path, options: Mapping[str, Any]) -> Backbone:
    """The backbone with a folder's weights: the checkpoint's own or its teacher's, which runs in the same engines."""
    store = options["engines"]
    backbone = get_backbone(checkpoint.backbone_name).load(
        weights,
        dtype=options["dtype"],
        device=options["device"],
        weights=store is None,
        decoder=checkpoint.decoder_path,
    )
    if store is not None:
        backbone.executor = _open_engines(
            checkpoint.path,
            store,
            options["backend"],
            options["device"],
            dtype=dtype_name(options["dtype"]),
            buckets=options["buckets"],
            weights_from=None if weights == checkpoint.path else weights,
            decoder=options["decoder"],
        )
    return backbone


def _open_engines(*arguments: Any, **named: Any) -> Executor:
    found = next(iter(entry_points(group=EXECUTORS, name="engines")), None)
    if found is None:
        raise BackboneError(f"engines=...: no installed package offers them (entry point 'engines' of {EXECUTORS!r})")
    executor: Executor = found.load()(*arguments, **named)
    return executor


def _images(pixels: Any) -> Image.Image | list[Image.Image]:
    """A picture (H, W, 3), or a film's frames (T, H, W, 3)."""
    return Image.fromarray(pixels) if pixels.ndim == 3 else [Image.fromarray(frame) for frame in pixels]


def _place(device: torch.device | str) -> torch.device:
    """The device, if networks can run there.

    Raises:
        BackboneError: it is none, or holds shapes alone.
    """
    place = usable_device(device)
    if place.type == "meta":
        raise BackboneError("device 'meta' holds no weights; use cpu or cuda")
    return place


def _offload(backbone: Backbone, place: torch.device) -> None:
    from accelerate import cpu_offload_with_hook

    hook = None
    for module in backbone.component_modules().values():
        _, hook = cpu_offload_with_hook(module, place, prev_module_hook=hook)
    backbone.device = place
    lay_out(backbone.component_modules().get("decoder"), place)


def _forget_offload(backbone: Backbone) -> None:
    from accelerate.hooks import remove_hook_from_module

    for module in backbone.component_modules().values():
        remove_hook_from_module(module)
