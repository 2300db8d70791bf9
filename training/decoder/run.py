"""One run: the student's latents, the training, the decoder's folder; each goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.base import usable_device
from rmd.backbones.registry import get_backbone
from rmd.checkpoint import CheckpointFolder
from rmd.dtypes import dtype_name, native_dtype
from rmd.machine import device_name
from training.decoder.export import check_decoder_out, name_decoder, write_decoder, write_record
from training.decoder.latents import SHARD, LatentSource, read_shards, write_shards
from training.decoder.measure import compare, seconds
from training.decoder.settings import DecoderSettings
from training.decoder.trainer import DecoderTrainer
from training.evaluate.shared.features import EfficientNetLite0, default_weights, load_efficientnet_lite0
from training.runtime.files import write_json
from training.runtime.interrupts import stopped_by_signals


class DecoderRun:
    """The parts of a run folder: ``latents/``, ``settings.json``, ``metrics.jsonl`` and ``checkpoints/``.

    Args:
        checkpoint: the student's folder.
        run: the run's folder.
        device: where everything runs.

    Raises:
        ValueError: a checkpoint of films.
    """

    def __init__(self, checkpoint: Path, run: Path, device: torch.device | str = "cpu") -> None:
        self.run, self.device = run, usable_device(device)
        self.checkpoint = CheckpointFolder.read(checkpoint).with_decoder("full")
        kind = get_backbone(self.checkpoint.backbone_name)
        if kind.media == "video":
            raise ValueError(
                f"{checkpoint} makes films, and single pictures' decoders are distilled here; embedded-video takes "
                f"one that was distilled from embedded, which has the same autoencoder"
            )
        self.dtype = native_dtype(self.device)
        self.backbone = kind.load(checkpoint, dtype=self.dtype, device=self.device)
        self._stop = False

    # ---- latents --------------------------------------------------------------------------------------------------

    def make_latents(
        self,
        prompts: Sequence[str],
        samples: int,
        *,
        schedule: str | None = None,
        seed: int = 0,
        batch: int = 8,
        shard: int = SHARD,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> bool:
        """Sample what is missing of the training's latents and of one shard beside them, kept for measuring.

        Args:
            prompts: of which each is drawn once before any is drawn again.
            samples: for training; whole shards are made.
            schedule: of the checkpoint; its default when None.
            seed: of noise and order.
            batch: prompts together.
            shard: samples a shard.
            progress: told the samples that are there and that are to be.

        Returns:
            whether they are all there; False where SIGTERM or Ctrl-C stopped it.

        Raises:
            ValueError: no such schedule, or the folder holds other latents.
        """
        name = schedule or self.checkpoint.default
        if name not in self.checkpoint.cascades:
            raise ValueError(f"--schedule {name!r} is not one of {', '.join(self.checkpoint.cascades)}")
        self.source = LatentSource(
            self.backbone, self.checkpoint.cascades[name], prompts, self.checkpoint.digest("denoiser"), seed
        )
        self.shards = 1 + -(-samples // shard)
        with stopped_by_signals(self._ask_to_stop):
            return write_shards(
                self.run / "latents", self.source, self.shards, shard=shard, batch=batch, progress=progress,
                stopped=lambda: self._stop,
            )  # fmt: skip

    def _ask_to_stop(self) -> None:
        self._stop = True

    # ---- training -------------------------------------------------------------------------------------------------

    def train(
        self,
        settings: DecoderSettings,
        on_update: Callable[[float, dict[str, float]], None] = lambda _share, _figures: None,
    ) -> DecoderTrainer:
        """Train until the budget is spent or the process is asked to stop; goes on with an earlier run.

        Raises:
            ValueError: the run was begun with other settings or latents.
            FileNotFoundError: the perceptual term's network is not installed.
        """
        features = self._features() if settings.perceptual else None
        trainer = DecoderTrainer(
            settings,
            self.backbone.component_modules()["decoder"],
            read_shards(self.run / "latents", range(1, self.shards)),
            compression=self.backbone.spatial_compression,
            identity={"autoencoder": self.checkpoint.digest("vae"), "latents": self.source.meta},
            run=self.run,
            features=features,
            device=self.device,
        )
        trainer.resume()
        write_json(self.run / "settings.json", settings.model_dump(mode="json"))
        trainer.train(on_update)
        return trainer

    def _features(self) -> EfficientNetLite0:
        return load_efficientnet_lite0(device=self.device)

    # ---- the folder -----------------------------------------------------------------------------------------------

    def export(self, trainer: DecoderTrainer, out: Path, use: bool = False) -> dict[str, Any]:
        """Write the decoder's folder, measured as it will be loaded.

        Args:
            trainer: of :meth:`train`.
            out: the folder.
            use: also name it in the checkpoint's `cascade.json`.

        Returns:
            its record.
        """
        write_decoder(out, trainer.averaged(), self.checkpoint)
        kind, folder = get_backbone(self.checkpoint.backbone_name), self.checkpoint.path
        loaded = kind.load(folder, dtype=self.dtype, device=self.device, decoder=out)
        small = loaded.component_modules()["decoder"]
        full = self.backbone.component_modules()["decoder"]
        held = read_shards(self.run / "latents", [0])
        largest = max(held)
        settings, progress = trainer.settings, trainer.progress
        try:
            features = load_efficientnet_lite0(default_weights(), self.device)
        except FileNotFoundError:  # the card then has no figures on features
            features = None
        threads = torch.get_num_threads()
        cores = f"{threads} thread{'s' if threads > 1 else ''} of " if self.device.type == "cpu" else ""
        record = {
            "settings": settings.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in small.parameters()),
            "full_parameters": _decoder_parameters(full),
            "training": {
                "latents": sum(len(z) for z in trainer.latents.values()) // len(trainer.latents),
                "schedule": self.source.cascade.schedule_name,
                "prompts": len(self.source.prompts),
                "iterations": progress.iteration,
                "pictures": progress.pictures,
                "seconds": round(progress.seconds),
                "devices": progress.devices,
                "weights": self.source.meta["weights"],
            },
            "quality": compare(full, small, held, features, settings.noise),
            "seconds": {
                **seconds(full, small, self.backbone.latent_shape(largest)),
                "dtype": dtype_name(self.dtype),
                "where": f"{cores}{device_name(self.device)}",
            },
        }
        write_record(out, self.checkpoint, record)
        if use:
            name_decoder(self.checkpoint, out)
        return record


def check_run(out: Path, settings: DecoderSettings) -> None:
    """Say before anything is sampled what would stop the run at its end.

    Raises:
        ValueError: ``out`` holds something else than a decoder.
        FileNotFoundError: the perceptual term's network is not installed.
    """
    check_decoder_out(out)
    if settings.perceptual:
        default_weights()


def _decoder_parameters(full: torch.nn.Module) -> int:
    """Of the decoder alone: a family's component may hold the encoder as well."""
    vae = getattr(full, "vae", full)
    return sum(p.numel() for p in getattr(vae, "decoder", vae).parameters())
