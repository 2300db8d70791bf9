"""The distillation loop: one student update, some fake-score updates, records, checkpoints.

Devices and processes are accelerate's; the first process keeps the records.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from rmd.machine import device_name
from training.distill.drift import DriftWatch
from training.distill.methods.base import DistributionMatching
from training.distill.resumption import Progress, TrainingError, resume_run, save_run
from training.distill.roles import Networks
from training.distill.settings import DistillSettings
from training.distill.update import Kept, Updater
from training.runtime.attention import training_attention
from training.runtime.files import write_json
from training.runtime.interrupts import stopped_by_signals
from training.runtime.metrics import append_line, cut_lines
from training.runtime.processes import lost_processes

__all__ = ["Hooks", "Trainer", "TrainingError"]

MAX_BAD_UPDATES = 20


@dataclass
class Hooks:
    """What the loop calls; every one may do nothing.

    Attributes:
        on_update: after each update, with the share of the run that is done and the update's figures.
        on_record: with each line of the metrics, on the first process.
        on_sheet: every `sheet_every` updates, with the trainer; on the first process, or all of a sharded run.
    """

    on_update: Callable[[float, dict[str, float]], None] = lambda _share, _figures: None
    on_record: Callable[[dict[str, float]], None] = lambda _line: None
    on_sheet: Callable[[Trainer], None] = lambda _trainer: None


class Trainer:
    """Runs one method on one set of networks, in one run folder.

    The folder gets `settings.json`, `metrics.jsonl`, `checkpoints/step-*` and, from the hooks, `sheets/*.png`.

    Args:
        tokens: of a picture at the matched side; they decide which attention kernel is faster.
    """

    def __init__(
        self,
        method: DistributionMatching,
        networks: Networks,
        settings: DistillSettings,
        run: Path,
        *,
        accelerator: Accelerator | None = None,
        hooks: Hooks | None = None,
        dtype: torch.dtype = torch.float32,
        tokens: int = 0,
    ) -> None:
        self.tokens = tokens
        self.method, self.networks, self.settings, self.run = method, networks, settings, run
        self.accelerator = accelerator or Accelerator(cpu=method.backbone.device.type == "cpu")
        self.hooks = hooks or Hooks()
        self.updater = Updater(method, networks, settings, self.accelerator, dtype)
        self.student_optimizer, self.fake_optimizer = self.updater.student_optimizer, self.updater.fake_optimizer
        self.ema = self.updater.ema
        self.progress = Progress()
        self.drift = DriftWatch(method.cascade.num_steps - 1)
        self._drifted: str | None = None
        self._saved: int | None = None  # the newest iteration that was saved
        self._stop = self._stop_wanted = False

    # ---- one update -------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """One generator update and its fake-score updates; returns figures to log."""
        settings, iteration = self.settings, self.progress.iteration
        if iteration < settings.fake_warmup_iterations:
            return self._fake_warmup()
        warm = iteration < settings.warm_start_iterations
        factor = self.rate_factor()
        figures: dict[str, float] = {}
        train_fake = not warm or iteration >= settings.warm_start_iterations - settings.warm_start_fake_iterations
        if train_fake and settings.fake_first:
            self._update_fake([], factor, figures)
        rate = (settings.warm_start_rate if warm else None) or settings.generator_rate
        rate *= self.rate_factor(settings.fake_warmup_iterations)
        kept = self.updater.train_student(iteration, rate, warm, figures)
        if train_fake and not settings.fake_first:
            self._update_fake(kept, factor, figures)
        self.progress.iteration += 1
        self._watch(figures)
        return figures

    def _fake_warmup(self) -> dict[str, float]:
        """One update of the fake score alone: it learns a student that is at rest."""
        figures: dict[str, float] = {}
        self._update_fake([], self.rate_factor(), figures)
        self.progress.iteration += 1
        self._watch(figures)
        return figures

    def _update_fake(self, kept: list[Kept], factor: float, figures: dict[str, float]) -> None:
        settings, iteration = self.settings, self.progress.iteration
        early = iteration < settings.early_iterations
        for number in range(settings.early_fake_steps if early else settings.fake_steps):
            if number:  # a pipelined batch holds every step already
                kept = [replace(part, shared=[]) for part in kept] if settings.rollout == "pipelined" else []
            self.updater.train_fake(iteration, number, settings.fake_rate * factor, kept, figures)

    def _watch(self, figures: dict[str, float]) -> None:
        self._drifted = self.drift.observe(figures)
        norms = [value for name, value in figures.items() if name.endswith("grad_norm")]
        if all(math.isfinite(value) for value in norms):
            self.progress.bad_updates = 0
            return
        self.progress.bad_updates += 1
        self.progress.skipped += 1
        if self.progress.bad_updates >= MAX_BAD_UPDATES:
            raise TrainingError(
                f"{MAX_BAD_UPDATES} updates in a row had no finite gradient; resume from an earlier checkpoint with "
                f"lower rates (--change-settings --set generator_rate=... --set fake_rate=...)"
            )

    # ---- the run ----------------------------------------------------------------------------------------------------

    def share_done(self) -> float:
        """How much of the run is behind, 0 to 1, by iterations or minutes, whichever is further."""
        shares = [0.0]
        if self.settings.iterations is not None:
            shares.append(self.progress.iteration / max(self.settings.iterations, 1))
        if self.settings.minutes is not None:
            shares.append(self.progress.seconds / (60 * self.settings.minutes))
        return min(1.0, max(shares))

    def rate_factor(self, start: int = 0) -> float:
        """Linear rise over `rate_warmup` updates from `start`, linear fall to `final_rate` over `decay_share`."""
        settings = self.settings
        done = self.progress.iteration + 1 - start
        rise = min(1.0, done / settings.rate_warmup) if settings.rate_warmup else 1.0
        fall = 1.0
        if settings.decay_share:
            into = max(0.0, (self.share_done() - (1 - settings.decay_share)) / settings.decay_share)
            fall = 1.0 - (1.0 - settings.final_rate) * into
        return rise * fall

    def train(self) -> bool:
        """Run to the end of the budget, or until SIGTERM or SIGINT.

        Returns:
            whether the budget is used up (False: stopped; resume to go on).

        Raises:
            TrainingError: no end was set, or the gradients stay without finite values.
        """
        settings = self.settings
        if settings.iterations is None and settings.minutes is None:
            raise TrainingError("the run has no end: give --minutes or --iterations")
        self.run.mkdir(parents=True, exist_ok=True)
        if (name := device_name(self.method.backbone.device)) not in self.progress.devices:
            self.progress.devices.append(name)
        if self.accelerator.is_main_process:
            write_json(self.run / "settings.json", self.settings.to_record())
            cut_lines(self.metrics_file, self.progress.iteration)
        found = f"the newest checkpoint of {self.run} is whole"
        with (
            stopped_by_signals(self.stop),
            training_attention(self.method.backbone.device.type, self.tokens),
            lost_processes(f"{found}: start all of them again with --resume"),
        ):
            self._loop()
        return not self._stop

    def _loop(self) -> None:
        settings, mark = self.settings, time.monotonic()
        while self.share_done() < 1.0 and not self._stop:
            figures = self.update()
            now = time.monotonic()
            self.progress.seconds, mark = self.progress.seconds + now - mark, now
            self._agree()
            self._record(figures)
            self._stop_on_drift()
            self.hooks.on_update(self.share_done(), figures)
            iteration = self.progress.iteration
            if iteration % settings.save_every == 0:
                self.save()
            if settings.sheet_every and iteration % settings.sheet_every == 0:
                self._draw_sheet()
        if self._saved != self.progress.iteration:
            self.save()

    def _stop_on_drift(self) -> None:
        if self._drifted and self.settings.stop_on_drift:
            raise TrainingError(
                f"update {self.progress.iteration}: {self._drifted}. The run's checkpoints are as they were: --resume "
                f"with lower rates (--change-settings --set generator_rate=...), or with --set stop_on_drift=false"
            )

    def _draw_sheet(self) -> None:
        """A sheet is a record: where it cannot be drawn (memory, disk), the run goes on without it."""
        if self.settings.sharding:  # one process that gave up would leave the others waiting
            self.hooks.on_sheet(self)
            return
        if not self.accelerator.is_main_process:
            return
        try:
            self.hooks.on_sheet(self)
        except (RuntimeError, OSError) as error:
            warnings.warn(f"no sheet at update {self.progress.iteration}: {error}", stacklevel=2)

    def _agree(self) -> None:
        """Processes take the mean time and any wish to stop, so that they cool down and leave together."""
        if self.accelerator.num_processes == 1:
            return
        own = [self.progress.seconds, float(self._stop_wanted), float(self._drifted is not None)]
        state = torch.tensor(own, device=self.accelerator.device)
        seconds, stop, drifted = self.accelerator.reduce(state, reduction="mean").tolist()
        self.progress.seconds, self._stop = seconds, stop > 0
        if drifted and self._drifted is None:
            self._drifted = "another process' predictions drifted"

    def stop(self) -> None:
        """Ask the loop to save and return after the update it is in; several processes leave together, one later."""
        self._stop_wanted = True
        # Of several, one that left on its own would wait for the others at the save, and they for it at a reduction.
        if self.accelerator.num_processes == 1:
            self._stop = True

    # ---- records ----------------------------------------------------------------------------------------------------

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, every `log_every` updates: means since the line before."""
        return self.run / "metrics.jsonl"

    def _record(self, figures: dict[str, float]) -> None:
        sums = self.progress.sums
        for name, value in figures.items():
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += value
            pair[1] += 1
        if self.progress.iteration % self.settings.log_every or not self.accelerator.is_main_process:
            return
        means = {name: total / count for name, (total, count) in sums.items()}
        line = {
            "iteration": self.progress.iteration,
            "seconds": round(self.progress.seconds, 2),
            "rate_factor": round(self.rate_factor(), 5),
            "skipped": self.progress.skipped,
            **{name: float(f"{value:.6g}") for name, value in sorted(means.items()) if math.isfinite(value)},
        }
        append_line(self.metrics_file, line)
        self.hooks.on_record(line)
        sums.clear()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, all processes together."""
        self._saved = self.progress.iteration
        save_run(self)

    def resume(self, change_settings: bool = False, *, to_export: bool = False) -> bool:
        """Continue from the run's newest checkpoint; see :func:`training.distill.resumption.resume_run`."""
        return resume_run(self, change_settings, to_export=to_export)
