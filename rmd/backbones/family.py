"""What the adapters over stock diffusers networks share: loading, building, text tables, example inputs."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rmd.backbones.base import Backbone, BackboneError, ComponentConfigs, Conditioning, usable_device
from rmd.backbones.decoders import TINY, read_small_decoder
from rmd.backbones.executor import EagerExecutor
from rmd.backbones.folder import DiffusersFolder, load_network
from rmd.backbones.layout import lay_out
from rmd.backbones.random_weights import build_random
from rmd.backbones.tiny_decoder import TinyDecoder
from rmd.backbones.wrappers import ImageEncoder
from rmd.noise_schedule import NoiseSchedule, RectifiedFlow, VariancePreserving
from rmd.profiles import PROFILES
from rmd.size import Size

if TYPE_CHECKING:
    from rmd.cascade import Cascade

SMALL_DECODER = "small_decoder"  # among the networks of a backbone, beside the sub-folders' names


class DiffusersBackbone(Backbone):
    """A backbone whose components are classes of diffusers and transformers, in a folder that diffusers wrote.

    Subclasses name their components and write :meth:`wrap`, the text part and the size conditions.
    """

    components: ClassVar[Mapping[str, str]]
    """Sub-folder -> class as ``module:Class``."""
    tokenizers: ClassVar[Mapping[str, int]]
    """Tokenizer's sub-folder -> text length in tokens. Fixed lengths keep the shapes of engines static."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Components that a folder may leave out."""
    denoiser_folder: ClassVar[str] = "transformer"
    small_decoder: ClassVar[str] = TINY
    """Class of the small decoders that it takes, as ``module:Class``."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        configs: ComponentConfigs,
        tokenizers: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Takes the loaded networks by sub-folder; use :meth:`load` or :meth:`from_config`."""
        self.configs = {name: dict(config) for name, config in configs.items()}
        # The network's own record has the defaults that a file may leave out.
        self.configs[self.denoiser_folder] = dict(raw[self.denoiser_folder].config)
        self._tokenizers = dict(tokenizers)
        defaults = PROFILES[self.profile]
        self.teacher_steps = defaults.teacher_steps
        self.teacher_guidance = defaults.teacher_guidance
        self.flow_shift = defaults.flow_shift
        self.sizes = defaults.sizes
        # Told by the scheduler's configuration, as diffusers' pipelines are (SDXL-Lightning's one-step UNet).
        self.predicts_x0 = self.prediction == "epsilon" and configs["scheduler"].get("prediction_type") == "sample"
        # No component of its own: it shares the decoder's weights, and only training encodes.
        self._encoder = self.wrap_encoder(raw["vae"]) if "vae" in raw else None
        modules = self.wrap(raw)
        if SMALL_DECODER in raw:
            modules["decoder"] = self.wrap_small_decoder(raw[SMALL_DECODER])
        super().__init__(schedule=self.schedule_from(configs["scheduler"]), modules=modules, dtype=dtype, device=device)

    # ---- what a family defines ----------------------------------------------------------------------------------

    @abstractmethod
    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The exportable components over the networks of ``raw`` (see :mod:`rmd.backbones.wrappers`)."""

    def wrap_small_decoder(self, network: Any) -> nn.Module:
        """The exportable component over a network of class ``small_decoder``."""
        return TinyDecoder(network)

    def wrap_encoder(self, vae: Any) -> nn.Module:
        """The way from pixels to the denoiser's latents: ``forward(pixels, noise)``, see :meth:`encode`."""
        return ImageEncoder(vae)

    @abstractmethod
    def text_widths(self) -> dict[str, tuple[int, ...]]:
        """Shape of each floating condition, without batch."""

    # ---- construction -------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        weights: bool | Collection[str] = True,
        decoder: Path | str | None = None,
    ) -> Self:
        """See :meth:`Backbone.load`; ``hub:<owner>/<name>[@<revision>]`` is fetched first."""
        place = usable_device(device)
        source = DiffusersFolder.open(folder, (*cls.components, *cls.tokenizers, "scheduler"))
        present = [name for name in cls.components if name not in cls.optional or source.has(name)]
        source.require(*present, "scheduler")
        of = {cls.denoiser_folder: "denoiser", "vae": "decoder"}
        held = {
            name: weights if isinstance(weights, bool) else of.get(name, "text_encoder") in weights for name in present
        }
        raw: dict[str, Any] = {}
        if decoder is not None:
            raw[SMALL_DECODER] = cls.load_small_decoder(Path(decoder), source, dtype, place, held["vae"])
        for name in present:
            if name == "vae" and decoder is not None:
                continue
            wanted_dtype = cls.component_dtype(name, source.config(name), dtype)
            raw[name] = source.load(name, cls.components[name], wanted_dtype, place, held[name])
        wanted = [name for name in cls.tokenizers if name.replace("tokenizer", "text_encoder") in present]
        source.require(*wanted)
        configs = {name: source.config(name) for name in [*present, "scheduler"]}
        configs["model_index"] = source.index
        tokenizers = {name: source.tokenizer(name) for name in wanted}
        return cls(raw, configs=configs, tokenizers=tokenizers, dtype=dtype, device=device)

    @classmethod
    def load_small_decoder(
        cls, folder: Path, source: DiffusersFolder, dtype: torch.dtype, device: torch.device, weights: bool = True
    ) -> Any:
        """The network of a small decoder's folder.

        Args:
            folder: the decoder's.
            source: the folder with the autoencoder whose place it takes.
            dtype, device, weights: see :meth:`Backbone.load`.

        Raises:
            BackboneError: it does not fit; see :func:`~rmd.backbones.decoders.read_small_decoder`.
        """
        config = read_small_decoder(
            folder,
            cls.small_decoder,
            cls.name,
            cls.latent_channels,
            cls.spatial_compression,
            source.path / "vae",
            source.config("vae"),
        )
        wanted = cls.component_dtype("vae", config, dtype)
        if not weights:
            return build_random(cls.small_decoder, config, wanted, torch.device("meta"))
        return load_network(folder, cls.small_decoder, wanted, device)

    @classmethod
    def from_config(
        cls,
        config: ComponentConfigs,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Random weights in place on ``device``; components that ``config`` leaves out are not built.

        A bench that has no transformers, or needs no text, simply leaves the text encoders out. A further entry
        ``small_decoder`` puts a network of the class ``small_decoder`` in the place of the autoencoder's decoder.

        Raises:
            BackboneError: the denoiser's or the scheduler's configuration is missing.
        """
        for name in (cls.denoiser_folder, "scheduler"):
            if name not in config:
                raise BackboneError(f"{cls.name}: the configuration lacks {name!r}")
        place = usable_device(device)
        raw = {
            name: build_random(target, config[name], cls.component_dtype(name, config[name], dtype), place)
            for name, target in cls.components.items()
            if name in config
        }
        if SMALL_DECODER in config:
            wanted = cls.component_dtype("vae", config[SMALL_DECODER], dtype)
            raw[SMALL_DECODER] = build_random(cls.small_decoder, config[SMALL_DECODER], wanted, place)
        return cls(raw, configs=config, tokenizers={}, dtype=dtype, device=device)

    @classmethod
    def component_dtype(cls, component: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        """The dtype of one component: autoencoders that overflow in float16 run in bfloat16 instead."""
        if component == "vae" and dtype == torch.float16 and config.get("force_upcast", True):
            return torch.bfloat16
        return dtype

    @classmethod
    def schedule_from(cls, scheduler: Mapping[str, Any]) -> NoiseSchedule:
        """The noise schedule that a scheduler's configuration describes.

        Raises:
            BackboneError: another parametrisation than the family's or x0 itself, or an unknown table of betas.
        """
        if scheduler.get("num_train_timesteps", 1000) != 1000:
            raise BackboneError(f"{cls.name}: the scheduler has {scheduler['num_train_timesteps']} timesteps, not 1000")
        if cls.prediction == "velocity":
            return RectifiedFlow()
        if str(scheduler.get("_class_name", "")).startswith("EDM"):
            raise BackboneError(f"{cls.name}: {scheduler['_class_name']} scales its network otherwise: not supported")
        if scheduler.get("trained_betas") is not None:
            raise BackboneError(f"{cls.name}: a scheduler with a table of its own (trained_betas) is not supported")
        if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "sample"):
            raise BackboneError(f"{cls.name} predicts noise; the scheduler says {scheduler['prediction_type']!r}")
        kind = scheduler.get("beta_schedule", "linear")
        betas = float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02))
        if kind == "scaled_linear":
            return VariancePreserving.scaled_linear(*betas)
        if kind == "linear":
            return VariancePreserving.linear(*betas)
        raise BackboneError(f"{cls.name}: beta_schedule {kind!r} is not supported; known are linear, scaled_linear")

    def with_small_decoder(self, network: Any) -> Self:
        """The same backbone, its other networks shared, that decodes with a network of class ``small_decoder``."""
        other = copy.copy(self)
        decoder = self.wrap_small_decoder(network).eval()
        lay_out(decoder, self.device)
        other._modules = {**self._modules, "decoder": decoder}
        other.executor = EagerExecutor(other._modules)
        return other

    # ---- shapes and examples ------------------------------------------------------------------------------------

    def default_cascade(self) -> Cascade:
        """The paper's preset."""
        from rmd.presets import preset

        return preset(self.profile)

    def random_conditioning(self, batch: int) -> Conditioning:
        """See :meth:`Backbone.random_conditioning`."""
        return {
            name: torch.randn(batch, *shape, device=self.device, dtype=self.dtype)
            for name, shape in self.text_widths().items()
        }

    def example_inputs(self, component: str, size: Size | None, batch: int) -> dict[str, Tensor]:
        """See :meth:`Backbone.example_inputs`.

        Raises:
            BackboneError: unknown component, or a size is needed and not given.
        """
        if component not in self._modules:
            raise BackboneError(f"{self.name} has no component {component!r}; it has {', '.join(self._modules)}")
        if component.startswith("text_encoder"):
            return self.example_text(component, batch)
        if size is None:
            raise BackboneError(f"the component {component!r} needs a size")
        latents = torch.randn(batch, *self.latent_shape(size), device=self.device)
        if component == "decoder":
            return {"latents": latents.to(self.decoder_dtype)}
        t = torch.full((batch,), 0.5, device=self.device)
        return self.denoiser_inputs(latents, t, self.random_conditioning(batch), size)

    def example_text(self, component: str, batch: int) -> dict[str, Tensor]:
        """Token inputs of one text encoder."""
        length = self.tokenizers[component.replace("text_encoder", "tokenizer")]
        return {"input_ids": torch.ones(batch, length, dtype=torch.int64, device=self.device)}

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of pictures (B, 3, H, W) or films (B, 3, T, H, W) in [0, 1], float32: what :meth:`decode` undoes.

        Args:
            noise: standard normal, in the latents' shape: a sample of the autoencoder's posterior, not its mode.

        Raises:
            BackboneError: the autoencoder is not loaded (a small decoder took its place).
        """
        if self._encoder is None:
            raise BackboneError(f"this {self.name} has no autoencoder to encode with: load it without a small decoder")
        scaled = pixels.to(self.device, self.decoder_dtype) * 2 - 1
        latents: Tensor = self._encoder(scaled, noise)
        return latents.float()

    # ---- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, tokenizer: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 of shape (B, fixed length); longer prompts are cut.

        Raises:
            BackboneError: the backbone was built from a configuration and has no tokenizer.
        """
        if tokenizer not in self._tokenizers:
            raise BackboneError(f"this {self.name} has no {tokenizer!r}; load it from a folder to encode prompts")
        if not prompts:
            raise ValueError("no prompts to encode")
        encoded = self._tokenizers[tokenizer](
            list(prompts),
            padding="max_length",
            max_length=self.tokenizers[tokenizer],
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def tokenizer_digest(self) -> str:
        """Of the vocabularies and text lengths: where it is the same, a prompt becomes the same tokens."""
        content = [
            [name, self.tokenizers[name], sorted(tokenizer.get_vocab().items())]
            for name, tokenizer in sorted(self._tokenizers.items())
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def token_counts(self, prompts: Sequence[str]) -> list[tuple[int, int]]:
        """How many tokens of each prompt are heard and how many are cut off, by the text encoder that hears most.

        Raises:
            BackboneError: the backbone was built from a configuration and has no tokenizer.
        """
        name = max(self.tokenizers, key=lambda tokenizer: self.tokenizers[tokenizer])
        if name not in self._tokenizers:
            raise BackboneError(f"this {self.name} has no {name!r}; load it from a folder to encode prompts")
        whole = self._tokenizers[name](list(prompts), truncation=False, verbose=False)["input_ids"]
        limit = self.tokenizers[name]
        return [(min(len(ids), limit), max(len(ids) - limit, 0)) for ids in whole]
