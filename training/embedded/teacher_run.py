"""One run of the embedded teacher from the picture cache to an exported checkpoint; every part is skipped when done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from rmd.backbones.base import usable_device
from rmd.backbones.embedded import EmbeddedBackbone
from rmd.checkpoint import CheckpointFolder
from rmd.dtypes import native_dtype
from training.embedded.autoencoder import AutoencoderConfig, train_autoencoder
from training.embedded.data.dataset import PictureSet
from training.embedded.data.split import Split
from training.embedded.latents import TeacherData, encode_training_set
from training.embedded.teacher import TRANSFORMER_CONFIG, TeacherSettings, TeacherTrainer, picture_loss
from training.embedded.teacher_export import (
    TEACHER_FOLDER,
    export_shared,
    export_teacher,
    find_text_encoder,
    holds_weights,
    load_text_encoder,
    refuse_other_student,
)
from training.embedded.teacher_sheets import draw_teacher, sheet_prompts, write_teacher_sheet
from training.embedded.velocity import STATE_FILE
from training.evaluate.embedded.sets import hash_order, measured_indices
from training.runtime.files import write_json
from training.runtime.metrics import append_line, cut_lines

Log = Callable[[str], None]

MEASURED_PICTURES = 256
"""Of each split, the first by a hash, whose loss is written at every save."""


class TeacherRun:
    """The parts of a run folder: ``autoencoder/``, ``data/`` and ``measured-<split>/`` (encoded pictures),
    ``state.safetensors``, ``log.jsonl``, ``losses.jsonl``, ``initial.json`` (the record of the teacher that was started
    from), ``export/`` (the two checkpoint folders as of the last save) and ``sheets/``.

    Args:
        data: the picture cache.
        run: the run's folder.
        models: where the finished model goes.
        text_encoder: MiniLM's folder; the installed package's when None.
        threads: CPU threads for torch.
        device: where the transformer is trained and the set encoded; an autoencoder is always trained on the CPU.
        sheets: whether to draw a contact sheet at every save.
        log: takes one line at a time.
        transformer_config: the teacher's configuration.
    """

    def __init__(
        self,
        data: Path,
        run: Path,
        models: Path,
        *,
        text_encoder: Path | None = None,
        threads: int | None = None,
        device: torch.device | str = "cpu",
        sheets: bool = True,
        log: Log = print,
        transformer_config: dict[str, Any] = TRANSFORMER_CONFIG,
    ) -> None:
        self.run, self.models, self.sheets, self.log = run, models, sheets, log
        self.transformer_config = transformer_config
        self.device = usable_device(device)
        self.pictures = PictureSet.load(data)
        self.text_encoder = text_encoder or find_text_encoder()
        self.trainer: TeacherTrainer | None = None
        if threads:
            torch.set_num_threads(threads)

    @property
    def state_file(self) -> Path:
        """What an interrupted training goes on from."""
        return self.run / STATE_FILE

    @property
    def autoencoder_folder(self) -> Path:
        """The trained autoencoder."""
        return self.run / "autoencoder" / "model"

    def prepare(self, *, autoencoder_minutes: float, initial: Path | None = None, seed: int = 0) -> None:
        """Gets the autoencoder and encodes the training set and what is measured, unless the run has them.

        Args:
            autoencoder_minutes: for training one.
            initial: a teacher's folder whose transformer goes on; it knows its own autoencoder's latents, so that one
                is taken.

        Raises:
            ValueError: the run encoded other pictures, or has another autoencoder than ``initial``; or ``models`` holds
                a student of another one.
            FileNotFoundError: ``initial`` is not whole.
        """
        self._initial_record(initial)  # a folder that cannot be read is said before the training, not at its first save
        if initial is not None and not self.autoencoder_folder.is_dir():
            self.autoencoder_folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.autoencoder_folder.with_name(".model-partial")
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(initial / "vae", scratch)
            scratch.rename(self.autoencoder_folder)
        if not (self.autoencoder_folder / "config.json").is_file():
            refuse_other_student(self.models, None)
            self.log(f"no autoencoder in {self.autoencoder_folder}: training one for {autoencoder_minutes:g} minutes")
            config = AutoencoderConfig(minutes=autoencoder_minutes, seed=seed)
            train_autoencoder(self.pictures, self.run / "autoencoder", config, log=self.log)
        autoencoder, tokenizer, text_encoder = self._frozen()
        if initial is not None and not self.state_file.is_file() and not holds_weights(initial / "vae", autoencoder):
            raise ValueError(
                f"{self.autoencoder_folder} is another autoencoder than the one that --initial {initial} was trained "
                f"with: choose another --run folder"
            )
        refuse_other_student(self.models, autoencoder)
        export_shared(self.run / "export", autoencoder, tokenizer, text_encoder)
        networks = (
            autoencoder.to(self.device, memory_format=torch.channels_last),
            tokenizer,
            text_encoder.to(self.device),
        )
        self._encode("data", self.pictures.indices("train"), networks, grounds_each=3, captions_each=4, seed=seed)
        for split in get_args(Split):
            ranked = hash_order(self.pictures, measured_indices(self.pictures, split), "losses")
            chosen = ranked[:MEASURED_PICTURES]
            self._encode(f"measured-{split}", chosen, networks, grounds_each=1, captions_each=1, seed=seed)

    def _encode(self, name: str, rows: list[int], networks: tuple[Any, Any, Any], **options: Any) -> None:
        """Encodes these pictures into a folder of the run, unless it is there."""
        folder = self.run / name
        origin = folder / "pictures.json"
        if (folder / "captions.json").is_file():
            if not origin.is_file() or json.loads(origin.read_text()) != self.pictures.meta:
                raise ValueError(f"{folder} was encoded from other pictures: delete it, or choose another --run folder")
            return
        if not rows:
            return
        self.log(f"encoding {len(rows)} pictures ({name})")
        records = [self.pictures.records[i] for i in rows]
        pixels = torch.from_numpy(self.pictures.rgba[rows])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(origin, self.pictures.meta)
        encode_training_set(records, pixels, *networks, **options).save(folder)

    def train(self, **settings: Any) -> TeacherTrainer:
        """Trains until the budget is spent or the process is asked to stop.

        Args:
            settings: fields of :class:`TeacherSettings`.
        """
        self.trainer = TeacherTrainer(
            TeacherSettings(**settings),
            TeacherData.load(self.run / "data"),
            self.run,
            self.transformer_config,
            on_save=self._on_save,
            device=self.device,
        )
        if self.trainer.resume():
            self.log(f"resuming at step {self.trainer.step}, {self.trainer.seconds / 60:.1f} minutes spent")
        # What a killed run wrote after its last save is written again.
        cut_lines(self.run / "log.jsonl", self.trainer.step, "step")
        cut_lines(self.run / "losses.jsonl", self.trainer.step, "step")

        def log(entry: dict[str, float]) -> None:
            append_line(self.run / "log.jsonl", entry)
            self.log("  ".join(f"{name} {value:g}" for name, value in entry.items()))

        self.trainer.train(log)
        return self.trainer

    def export(self) -> Path:
        """Writes the averaged teacher and the shared components under ``models``; returns the teacher's folder.

        Raises:
            ValueError: called before :meth:`train`.
        """
        if self.trainer is None:
            raise ValueError("there is no teacher to export: train first")
        export_shared(self.models, *self._frozen())
        return export_teacher(self.models, self.trainer.ema_model(), self.record(self.trainer))

    def record(self, trainer: TeacherTrainer) -> dict[str, Any]:
        """How the teacher was trained, for ``cascade.json``."""
        metrics = self.run / "autoencoder" / "metrics.json"
        settings = trainer.settings.model_dump(mode="json")
        if trainer.settings.initial is not None and trainer.settings.initial.is_absolute():
            settings["initial"] = trainer.settings.initial.name  # where it lay is nobody's business
        return {
            "settings": settings,
            "device": ", ".join(trainer.devices),
            "step": trainer.step,
            "samples": trainer.samples,
            "minutes": round(trainer.seconds / 60, 2),
            "autoencoder": json.loads(metrics.read_text()) if metrics.is_file() else None,
            "pictures": self.pictures.meta,
            "initial": self._initial_record(trainer.settings.initial),
        }

    def _initial_record(self, folder: Path | None) -> dict[str, Any] | None:
        """How the teacher that this one started from was trained; kept in the run, since an export may overwrite it."""
        if folder is None:
            return None
        kept = self.run / "initial.json"
        if not kept.is_file():
            record = CheckpointFolder.read(folder).distillation.get("training", {})
            write_json(kept, {name: value for name, value in record.items() if name not in ("pictures", "autoencoder")})
        record = json.loads(kept.read_text())
        return dict(record)

    def _frozen(self) -> tuple[Any, Any, Any]:
        autoencoder = EmbeddedAutoencoder.from_pretrained(str(self.autoencoder_folder), use_safetensors=True).eval()
        tokenizer, text_encoder = load_text_encoder(self.text_encoder)
        return autoencoder, tokenizer, text_encoder

    def _on_save(self, trainer: TeacherTrainer) -> None:
        model = trainer.ema_model()
        export_teacher(self.run / "export", model, self.record(trainer))
        losses = self.picture_losses(model.to(self.device, trainer.dtype))
        # A run whose time is up saves once more when it is run again.
        cut_lines(self.run / "losses.jsonl", trainer.step - 1, "step")
        append_line(self.run / "losses.jsonl", {"step": trainer.step, **losses})
        self.log("averaged weights, velocity loss: " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        if self.sheets:
            self.draw_sheet(trainer.step)

    def picture_losses(self, model: Any) -> dict[str, float]:
        """The velocity loss on pictures of each split, in the measured styles: how far training and held-out pictures
        part. Nothing is chosen by it."""
        losses = {}
        for split in get_args(Split):
            folder = self.run / f"measured-{split}"
            if (folder / "captions.json").is_file():
                losses[split] = round(picture_loss(model, TeacherData.load(folder).to(self.device)), 4)
        return losses

    def draw_sheet(self, step: int) -> Path:
        """Draws ``sheets/step-<step>.png`` from the folder that was exported last."""
        dtype = native_dtype(self.device)
        backbone = EmbeddedBackbone.load(self.run / "export" / TEACHER_FOLDER, dtype=dtype, device=self.device)
        prompts = sheet_prompts(self.pictures)
        path = self.run / "sheets" / f"step-{step:06d}.png"
        write_teacher_sheet(path, self.pictures, prompts, draw_teacher(backbone, [p.text for p in prompts]))
        write_json(path.with_suffix(".json"), [{"split": p.split, "caption": p.text} for p in prompts])
        return path
