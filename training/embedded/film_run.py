"""One run of the film teacher: from a cache of encoded films to an exported checkpoint, resumed where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmd.backbones.base import usable_device
from rmd.backbones.embedded import EmbeddedBackbone
from rmd.checkpoint import CheckpointFolder
from rmd.dtypes import native_dtype
from training.embedded.film_export import export_film_teacher
from training.embedded.film_latents import FilmData
from training.embedded.film_teacher import FilmSettings, FilmTrainer
from training.runtime.metrics import append_line, cut_lines

Log = Callable[[str], None]
PID_FILE = "train.pid"


class FilmRun:
    """The parts of a run folder: ``state.safetensors``, ``log.jsonl``, ``export/`` (the averaged teacher as of the last
    save) and ``train.pid`` (the process that trains, while it does).

    Args:
        cache: encoded films, as `rmd data --films` writes them.
        run: the run's folder.
        model: the embedded checkpoint that encoded the films.
        threads: CPU threads for torch.
        device: where everything runs.
        log: takes one line at a time.
    """

    def __init__(
        self,
        cache: Path,
        run: Path,
        model: Path,
        *,
        threads: int | None = None,
        device: torch.device | str = "cpu",
        log: Log = print,
    ) -> None:
        self.cache, self.run, self.model, self.log = cache, run, model, log
        self.device = usable_device(device)
        self.trainer: FilmTrainer | None = None
        if threads:
            torch.set_num_threads(threads)

    def train(self, **settings: Any) -> FilmTrainer:
        """Trains until the budget is spent or the process is asked to stop.

        Args:
            settings: fields of :class:`FilmSettings`.

        Raises:
            FileNotFoundError: the cache holds no films yet.
            ValueError: the run's state started from another teacher, or the settings contradict each other.
        """
        data = FilmData(self.cache, self.device)
        self.trainer = FilmTrainer(
            FilmSettings(**settings), data, self._empty_prompt(), self.run, on_save=self._on_save, device=self.device
        )
        if self.trainer.resume():
            self.log(f"resuming at step {self.trainer.step}, {self.trainer.seconds / 60:.1f} minutes spent")
        cut_lines(self.run / "log.jsonl", self.trainer.step, "step")
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / PID_FILE).write_text(f"{os.getpid()}\n")

        def log(entry: dict[str, float]) -> None:
            append_line(self.run / "log.jsonl", entry)
            self.log("  ".join(f"{name} {value:g}" for name, value in entry.items()))

        try:
            self.trainer.train(log)
        finally:
            (self.run / PID_FILE).unlink(missing_ok=True)
        return self.trainer

    def export(self, folder: Path) -> Path:
        """Writes the averaged teacher as a checkpoint folder.

        Raises:
            ValueError: called before :meth:`train`.
        """
        if self.trainer is None:
            raise ValueError("there is no teacher to export: train first")
        return export_film_teacher(folder, self.trainer.ema_model(), self.model, self.record(self.trainer))

    def record(self, trainer: FilmTrainer) -> dict[str, Any]:
        """How the teacher was trained, for ``cascade.json``."""
        settings = trainer.settings.model_dump(mode="json")
        initial = trainer.settings.initial
        for name in ("initial", "picture_teacher"):
            if settings[name] is not None and Path(settings[name]).is_absolute():
                settings[name] = Path(settings[name]).name  # where it lay is nobody's business
        before = CheckpointFolder.read(initial).distillation.get("training", {}) if initial is not None else {}
        return {
            "settings": settings,
            "device": ", ".join(trainer.devices),
            "step": trainer.step,
            "samples": trainer.samples,
            "samples_of": dict(trainer.kinds),
            "minutes": round(trainer.seconds / 60, 2),
            "initial": {name: before.get(name) for name in ("step", "samples", "minutes")} if before else None,
        }

    def _empty_prompt(self) -> tuple[Tensor, Tensor]:
        backbone = EmbeddedBackbone.load(self.model, dtype=native_dtype(self.device), device=self.device)
        text = backbone.encode_unconditional(1)
        return text["encoder_hidden_states"].bfloat16().clone(), text["pooled_projections"].bfloat16().clone()

    def _on_save(self, trainer: FilmTrainer) -> None:
        export_film_teacher(self.run / "export", trainer.ema_model(), self.model, self.record(trainer))
