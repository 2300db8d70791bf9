"""What every backbone offers: prompts in, an x0 prediction at a size and a time, pictures or films out.

The samplers, the losses, the engines and the server only ever speak to :class:`Backbone`; which network stands behind
it, and whether that network predicts noise or velocity, stays inside the adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from rmd.backbones.executor import EagerExecutor, Executor
from rmd.backbones.layout import lay_out
from rmd.noise_schedule import NoiseSchedule, VariancePreserving
from rmd.size import Size

if TYPE_CHECKING:
    from rmd.cascade import Cascade

Conditioning = dict[str, Tensor]
"""Named text conditions, batch first. The names are arguments of the denoiser's ``forward``."""

ComponentConfigs = Mapping[str, Mapping[str, Any]]
"""Component name as in ``model_index.json`` -> the content of its ``config.json``."""


class BackboneError(ValueError):
    """A folder, size or request that a backbone cannot serve; the message says which and what to do."""


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if this torch can use it.

    Raises:
        BackboneError: an unknown device, or CUDA where torch sees none.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise BackboneError(f"unknown device {str(device)!r}; use cpu or cuda, or cuda:N of several") from None
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {str(device)!r}: torch sees no CUDA device; use --device cpu")
    return parsed


def weights_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: its `compute_dtype` where it has one (weights that are gathered in another
    dtype than they are kept in), else its largest parameter's: small ones may stay float32 (Wan's modulation tables).

    Raises:
        ValueError: it has no parameters.
    """
    if (own := getattr(module, "compute_dtype", None)) is not None:
        dtype: torch.dtype = own
        return dtype
    return max(module.parameters(), key=Tensor.numel).dtype


class Backbone(ABC):
    """A text-to-image or text-to-video diffusion model behind one interface.

    Subclasses set the class attributes, implement the abstract methods and leave the arithmetic between network output
    and x0 to this class. Components are flat modules (:meth:`component_modules`): named tensors in, one tensor out, so
    that each can be exported and compiled alone.

    Attributes:
        schedule: noise schedule; all conversions run in float32 or better.
        dtype: the dtype in which the networks run.
        device: where inputs are made and networks run.
        executor: what runs the components; replace it to use compiled engines.
    """

    name: ClassVar[str]
    profile: ClassVar[str]
    """Key in :data:`rmd.profiles.PROFILES`: the teacher's schedule, guidance and sizes."""
    prediction: ClassVar[Literal["epsilon", "velocity"]]
    media: ClassVar[Literal["image", "video"]] = "image"
    size_multiple: ClassVar[int]
    """Width and height in pixels must be multiples of this."""
    latent_channels: ClassVar[int]
    spatial_compression: ClassVar[int] = 8
    frames_per_second: ClassVar[int] = 16
    predicts_x0: bool = False  # the network gives x0 itself, whatever its family predicts (a few public students)
    takes_frame_numbers: ClassVar[bool] = False  # whether the denoiser can be told which frames of a film it sees

    teacher_steps: int
    teacher_guidance: float
    flow_shift: float = 1.0
    sizes: tuple[Size, ...]
    """The sizes its cascades use, ascending; the teacher works at the largest."""

    schedule: NoiseSchedule
    dtype: torch.dtype
    device: torch.device
    executor: Executor

    def __init__(
        self,
        *,
        schedule: NoiseSchedule,
        modules: Mapping[str, nn.Module],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.schedule = schedule
        self.dtype = dtype
        self.device = torch.device(device)
        self._modules = {name: _on_one_device(module.eval()) for name, module in modules.items()}
        lay_out(self._modules.get("decoder"), self.device)
        self.executor = EagerExecutor(self._modules)

    # ---- construction -------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def load(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        weights: bool | Collection[str] = True,
        decoder: Path | str | None = None,
    ) -> Self:
        """Reads a diffusers folder (safetensors only).

        ``weights=False`` builds the networks on the meta device: tokenizers, schedules and shapes work, and an executor
        with engines of its own must do the rest, so that no second copy of the weights is held. So with those that
        ``weights`` leaves out where it names some: ``text_encoder`` (all of them), ``denoiser``, ``decoder``.

        ``decoder`` is the folder of a small decoder (:mod:`rmd.backbones.decoders`) that takes the place of the
        folder's own autoencoder, whose weights are not loaded then; None keeps the autoencoder.

        Raises:
            BackboneError: not a diffusers folder, a component is missing, its weights are not safetensors, or the
                decoder does not fit.
        """

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        config: ComponentConfigs,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The same networks with random weights; on the ``meta`` device no memory is taken. Has no tokenizer."""

    def to(self, device: torch.device | str) -> Self:
        """Moves the networks.

        Raises:
            BackboneError: this torch cannot use the device.
        """
        self.device = usable_device(device)
        for module in self._modules.values():
            module.to(self.device)
        lay_out(self._modules.get("decoder"), self.device)
        return self

    # ---- what a family defines ----------------------------------------------------------------------------------

    @abstractmethod
    def example_inputs(self, component: str, size: Size | None, batch: int) -> dict[str, Tensor]:
        """Inputs of ``component`` in their exact names, shapes and dtypes, with harmless values, for export."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditions of ``prompts``; every tensor has ``len(prompts)`` rows and a fixed text length."""

    @abstractmethod
    def random_conditioning(self, batch: int) -> Conditioning:
        """Conditions of the right names, shapes and dtypes with random values: for benches and export."""

    @abstractmethod
    def tokens(self, size: Size) -> int:
        """Picture tokens in the denoiser's (largest) attention at ``size``."""

    @abstractmethod
    def default_cascade(self) -> Cascade:
        """The preset cascade of this backbone."""

    # ---- shapes -------------------------------------------------------------------------------------------------

    def component_modules(self) -> dict[str, nn.Module]:
        """The exportable components: ``forward(**named tensors)`` -> one tensor, the raw output of the network."""
        return dict(self._modules)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent without batch: (C, H, W), or (C, T, H, W) for films."""
        self.validate_size(size)
        return (self.latent_channels, size.height // self.spatial_compression, size.width // self.spatial_compression)

    def validate_size(self, size: Size) -> None:
        """Raises :class:`BackboneError` when the backbone cannot do ``size``."""
        if size.width < self.size_multiple or size.height < self.size_multiple:
            raise BackboneError(
                f"size {size} is too small for {self.name}: at least {self.size_multiple} pixels a side"
            )
        if size.width % self.size_multiple or size.height % self.size_multiple:
            raise BackboneError(
                f"size {size} does not fit {self.name}: width and height must be multiples of {self.size_multiple}"
            )
        if self.media == "image" and size.num_frames != 1:
            raise BackboneError(f"size {size} asks for {size.num_frames} frames, and {self.name} makes single pictures")

    def tokens_per_stage(self, cascade: Cascade) -> tuple[int, ...]:
        """Picture tokens of each stage of ``cascade``."""
        return tuple(self.tokens(stage.size) for stage in cascade.stages)

    def denoiser_parameters(self) -> int:
        """Number of parameters of the denoiser."""
        return sum(p.numel() for p in self._modules["denoiser"].parameters())

    @property
    def full_size(self) -> Size:
        """The teacher's size."""
        return max(self.sizes)

    # ---- text ---------------------------------------------------------------------------------------------------

    def encode_unconditional(self, batch: int) -> Conditioning:
        """The conditions that guidance contrasts with; the empty prompt unless a family does otherwise."""
        return repeat_rows(self.encode_prompts([""]), batch)

    def size_conditions(self, size: Size, batch: int) -> Conditioning:
        """Further denoiser inputs that name the stage's own size; none unless a family has them."""
        return {}

    # ---- denoising ----------------------------------------------------------------------------------------------

    def network_timestep(self, t: Tensor) -> Tensor:
        """What the network sees for times ``t`` in [0, 1]: ``1000 t`` as float32, shape (B,).

        A variance preserving network was trained on the entries 0..999 of its table, so t = 1 is its entry 999.
        """
        timestep = (t.double() * 1000.0).float()
        return timestep.clamp(max=999.0) if isinstance(self.schedule, VariancePreserving) else timestep

    def denoiser_inputs(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        size: Size,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The named inputs of the ``denoiser`` component; floating conditions and latents in ``dtype``."""
        dtype = dtype or self.dtype
        batch = latents.shape[0]
        inputs = {"latents": latents.to(dtype), "timestep": self.network_timestep(t.to(latents.device).expand(batch))}
        for name, value in conditioning.items():
            if value.shape[0] != batch:
                raise ValueError(f"condition {name!r} has {value.shape[0]} rows for {batch} latents")
            inputs[name] = value.to(latents.device, dtype if value.is_floating_point() else value.dtype)
        # Sizes stay float32: bfloat16 cannot hold every number of pixels.
        inputs.update({name: value.to(latents.device) for name, value in self.size_conditions(size, batch).items()})
        return inputs

    def predict_output(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        size: Size,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """The denoiser's own prediction (noise or velocity) as float32, shape of ``latents``.

        ``denoiser`` is a module of the component's signature, called with gradients (training); without one the
        executor runs.
        """
        self._check_latents(latents, size)
        if denoiser is None:
            output = self.run("denoiser", size, self.denoiser_inputs(latents, t, conditioning, size))
        else:
            output = denoiser(**self.denoiser_inputs(latents, t, conditioning, size, weights_dtype(denoiser)))
        return output.float()

    def predict_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        size: Size,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """The prediction of the clean latent.

        Args:
            latents: (B, C, [T], H, W) at time ``t``.
            t: (B,) in [0, 1].
            conditioning: B rows each.
            size: the size in pixels that the latents stand for.
            denoiser: see :meth:`predict_output`.

        Returns:
            x0, float32, shape of ``latents``.
        """
        return self.x0_from_output(latents, self.predict_output(latents, t, conditioning, size, denoiser), t)

    def guided_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        scale: float,
        size: Size,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """Classifier-free guidance ``uncond + scale (cond - uncond)`` in one batch of 2 B; none at ``scale`` 1.

        Guiding the network's output equals guiding x0 (one is affine in the other at a given x_t and t) and does not
        multiply the rounding error of small ``alpha``.
        """
        if uncond is None or scale == 1.0:
            return self.predict_x0(latents, t, conditioning, size, denoiser)
        batch = latents.shape[0]
        t = t.to(latents.device).expand(batch)
        both = {k: torch.cat([repeat_rows({k: uncond[k]}, batch)[k].to(v), v]) for k, v in conditioning.items()}
        output = self.predict_output(torch.cat([latents, latents]), torch.cat([t, t]), both, size, denoiser)
        without, given = output.chunk(2)
        return self.x0_from_output(latents, without + scale * (given - without), t)

    def x0_from_output(self, latents: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """x0 from the network's prediction, in float32 or better whatever the network's dtype.

        The conversion of ``epsilon`` divides by alpha, as small as 0.006 at the start of PixArt's schedule.
        """
        latents, output = latents.float(), output.float()
        if self.predicts_x0:
            return output
        if self.prediction == "epsilon":
            return self.schedule.x0_from_eps(latents, output, t)
        return self.schedule.x0_from_v(latents, output, t)

    # ---- decoding -----------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """Pictures (B, 3, H, W) or films (B, 3, T, H, W), float32 in [0, 1]."""
        self._check_latents(latents, size)
        pixels = self.run("decoder", size, {"latents": latents.to(self.device, self.decoder_dtype)})
        return pixels.float().mul(0.5).add_(0.5).clamp(0.0, 1.0)

    @property
    def decoder_dtype(self) -> torch.dtype:
        """The dtype in which the decoder runs; it may differ from ``dtype`` where the latter would overflow."""
        parameters = self._modules["decoder"].parameters() if "decoder" in self._modules else iter(())
        return next((p.dtype for p in parameters), self.dtype)

    # ---- helpers ------------------------------------------------------------------------------------------------

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """Runs a component through the executor; the result may be saved for backward by later operations."""
        output = self.executor.run(component, size, inputs)
        return output.clone() if output.is_inference() and not torch.is_inference_mode_enabled() else output

    def _check_latents(self, latents: Tensor, size: Size) -> None:
        expected = self.latent_shape(size)
        if tuple(latents.shape[1:]) != expected:
            raise ValueError(f"latents of shape {tuple(latents.shape)} are not {self.name} at {size}: (B, {expected})")


def repeat_rows(conditioning: Mapping[str, Tensor], batch: int) -> Conditioning:
    """Repeats one-row conditions ``batch`` times; conditions that have ``batch`` rows pass unchanged."""
    return {
        name: value if value.shape[0] == batch else value.expand(batch, *value.shape[1:])
        for name, value in conditioning.items()
    }


def _on_one_device(module: nn.Module) -> nn.Module:
    """The module, its own buffers (constants of a wrapper) moved to where its network's weights are."""
    weight = next(module.parameters(), None)
    if weight is not None and weight.device.type != "meta":
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(weight.device))
    return module
