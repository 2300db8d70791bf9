"""The distillation loop: one student update, some fake-score updates, records, checkpoints, resumption.

Devices and processes are accelerate's. Gradients are averaged over processes explicitly, so that the networks keep
their plain names and may be compiled; every process draws its own samples, and the first one keeps the records.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from rmd.machine import device_name
from training.distill.drift import DriftWatch
from training.distill.figures import step_figures
from training.distill.methods.base import DistributionMatching, Matched, Scores
from training.distill.methods.warm_start import warm_start_loss
from training.distill.optimizer import AveragedWeights, MasterAdamW
from training.distill.roles import Networks, fingerprint, trained_parameters
from training.distill.settings import DistillSettings, changed_settings
from training.runtime.attention import training_attention
from training.runtime.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from training.runtime.files import write_json
from training.runtime.interrupts import stopped_by_signals
from training.runtime.metrics import append_line, cut_lines
from training.runtime.randomness import Randomness

MAX_BAD_UPDATES = 20


class TrainingError(ValueError):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class Hooks:
    """What the loop calls; every one may do nothing.

    Attributes:
        on_update: after each update, with the share of the run that is done and the update's figures.
        on_sheet: every `sheet_every` updates, with the trainer.
    """

    on_update: Callable[[float, dict[str, float]], None] = lambda _share, _figures: None
    on_sheet: Callable[[Trainer], None] = lambda _trainer: None


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoints."""

    iteration: int = 0
    seconds: float = 0.0
    bad_updates: int = 0
    skipped: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)


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
        device = method.backbone.device
        rank = self.accelerator.process_index
        self.random = Randomness(settings.seed + 1_000_003 * rank, device, dtype)
        self.rollout = method.rollout(self.random)
        options = {"betas": settings.betas, "weight_decay": settings.weight_decay, "clip_norm": settings.clip_norm}
        fake_options = options if settings.clip_fake else {**options, "clip_norm": math.inf}
        student = trained_parameters(networks.student)
        self.student_optimizer = MasterAdamW(student, settings.generator_rate, **options)  # type: ignore[arg-type]
        fake = trained_parameters(networks.fake) | method.critic_parameters()
        self.fake_optimizer = MasterAdamW(fake, settings.fake_rate, **fake_options)  # type: ignore[arg-type]
        self.ema = AveragedWeights(self.student_optimizer.master_state(), settings.ema_decay)
        self.progress = Progress()
        self.drift = DriftWatch(method.cascade.num_steps - 1)
        self._drifted: str | None = None
        self._saved: int | None = None  # the newest iteration that was saved
        self._stop = self._stop_wanted = False

    # ---- one update -------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """One generator update and its fake-score updates; returns figures to log."""
        settings, method, networks = self.settings, self.method, self.networks
        iteration = self.progress.iteration
        if iteration < settings.fake_warmup_iterations:
            return self._fake_warmup()
        warm = iteration < settings.warm_start_iterations
        factor = self.rate_factor()
        figures: dict[str, float] = {}
        train_fake = not warm or iteration >= settings.warm_start_iterations - settings.warm_start_fake_iterations
        if train_fake and settings.fake_first:
            self._update_fake(self._fresh_matched(), (), factor, figures)
        self.student_optimizer.zero_grad()
        states = method.states(self.rollout, networks.student, method.active_steps(iteration))
        predictions = self.rollout.predict(networks.student, states)
        matched = method.match(predictions)
        shared: list[Scores] = []
        if warm:
            loss = warm_start_loss(method, predictions, networks.teacher, self.random)
            figures["warm_start_loss"] = float(loss.detach())
            rate = settings.warm_start_rate or settings.generator_rate
        else:
            loss, shared = self._generator_loss(matched, figures)
            figures["generator_loss"] = float(loss.detach())
            rate = settings.generator_rate
        loss.backward()  # type: ignore[no-untyped-call]
        figures.update(step_figures(predictions, matched))
        rate *= self.rate_factor(settings.fake_warmup_iterations)
        figures["generator_grad_norm"] = self.student_optimizer.step(rate, self._reduce)
        self.ema.update(self.student_optimizer.master_state())
        if train_fake and not settings.fake_first:
            self._update_fake(matched, shared, factor, figures)
        self.progress.iteration += 1
        self._watch(figures)
        return figures

    def _fake_warmup(self) -> dict[str, float]:
        """One update of the fake score alone: it learns a student that is at rest."""
        figures: dict[str, float] = {}
        self._update_fake(self._fresh_matched(), (), self.rate_factor(), figures)
        self.progress.iteration += 1
        self._watch(figures)
        return figures

    def _generator_loss(self, matched: Sequence[Matched], figures: dict[str, float]) -> tuple[Tensor, list[Scores]]:
        """The loss, and the scores that the fake score's update shares, if it does."""
        method, networks = self.method, self.networks
        total = sum(len(m.steps) for m in matched)
        samples = [method.score_sample(m, self.random) for m in matched]
        shared: list[Scores] = []
        loss: Tensor | None = None
        for m, sample in zip(matched, samples, strict=True):
            scores = method.scores(m, sample, networks.teacher, networks.fake)
            if self.settings.shared_score_sample:
                shared.append(scores)
            part, part_figures = method.generator_loss(m, scores, self.random)
            figures.update(part_figures)
            part = part * (len(m.steps) / total)
            loss = part if loss is None else loss + part
        if loss is None:
            raise TrainingError("the method matched nothing")
        return loss, shared

    def _update_fake(
        self,
        matched: Sequence[Matched],
        shared: Sequence[Scores],
        factor: float,
        figures: dict[str, float],
    ) -> None:
        settings, fake = self.settings, self.networks.fake
        early = self.progress.iteration < settings.early_iterations
        for number in range(settings.early_fake_steps if early else settings.fake_steps):
            if number and not self.rollout.pipelined:
                matched = self._fresh_matched()
            # Gradients that the generator's loss may have left in the fake network (GAN, patch loss) are dropped.
            self.fake_optimizer.zero_grad()
            total = sum(len(m.steps) for m in matched)
            parts = []
            for index, m in enumerate(matched):
                scores = shared[index] if shared and number == 0 else None
                parts.append(self.method.critic_loss(m, fake, self.random, scores) * (len(m.steps) / total))
            loss = torch.stack(parts).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            figures["fake_loss"] = float(loss.detach())
            figures["fake_grad_norm"] = self.fake_optimizer.step(settings.fake_rate * factor, self._reduce)

    @torch.no_grad()
    def _fresh_matched(self) -> list[Matched]:
        """New samples of the student for a further fake-score update."""
        student = self.networks.student
        active = self.method.active_steps(self.progress.iteration)
        return self.method.match(self.rollout.predict(student, self.method.states(self.rollout, student, active)))

    def _reduce(self, grads: list[Tensor]) -> None:
        if self.accelerator.num_processes == 1:
            return
        # In place, one after the other: accelerate's reduce, or one flat tensor, would hold them all twice.
        for grad in grads:
            torch.distributed.all_reduce(grad)
        torch._foreach_div_(grads, self.accelerator.num_processes)

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
        with stopped_by_signals(self.stop), training_attention(self.method.backbone.device.type, self.tokens):
            mark = time.monotonic()
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
                if settings.sheet_every and iteration % settings.sheet_every == 0 and self.accelerator.is_main_process:
                    self._draw_sheet()
        if self._saved != self.progress.iteration:
            self.save()
        return not self._stop

    def _stop_on_drift(self) -> None:
        if self._drifted and self.settings.stop_on_drift:
            raise TrainingError(
                f"update {self.progress.iteration}: {self._drifted}. The run's checkpoints are as they were: --resume "
                f"with lower rates (--change-settings --set generator_rate=...), or with --set stop_on_drift=false"
            )

    def _draw_sheet(self) -> None:
        """A sheet is a record: where it cannot be drawn (memory, disk), the run goes on without it."""
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
        sums.clear()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint (first process only)."""
        self._saved = self.progress.iteration
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        roles = {
            "student": self.student_optimizer.master_state(),
            "student_optimizer": self.student_optimizer.optimizer_state(),
            "fake": self.fake_optimizer.master_state(),
            "fake_optimizer": self.fake_optimizer.optimizer_state(),
            "ema": self.ema.weights,
            "random": {**self.random.state(), **self.rollout.state_dict()},
        }
        state = {
            "seconds": self.progress.seconds,
            "skipped": self.progress.skipped,
            "bad_updates": self.progress.bad_updates,
            "sums": self.progress.sums,
            "devices": self.progress.devices,
            "ema_updates": self.ema.updates,
            "drift": self.drift.state(),
            "settings": self.settings.to_record(),
            "prompts": self._prompts_digest(),
            "teacher": fingerprint(self.networks.teacher),
        }
        save_checkpoint(self.run / "checkpoints", self.progress.iteration, roles, state, self.settings.keep_checkpoints)

    def _prompts_digest(self) -> str:
        return str(getattr(self.method.prompts, "digest", ""))

    def resume(self, change_settings: bool = False, *, to_export: bool = False) -> bool:
        """Continue from the run's newest checkpoint.

        With several processes, all but the first draw other noise than an uninterrupted run would have; so does a run
        that goes on on another kind of device.

        Args:
            change_settings: allow the settings in `CHANGEABLE` to differ from the stored ones.
            to_export: the run is not trained on, so its prompts may be absent.

        Returns:
            whether there was a checkpoint.

        Raises:
            TrainingError: other settings, prompts or weights of the teacher than the run was started with.
        """
        found = checkpoints(self.run / "checkpoints")
        if not found:
            return False
        roles, state = load_checkpoint(found[-1])
        changed = changed_settings(state["settings"], self.settings.to_record())
        fixed = [name for name in changed if name not in self.settings.changeable]
        if fixed:
            raise TrainingError(
                f"this run was started with other settings: {', '.join(fixed)}; they cannot change: give what "
                f"{self.run / 'settings.json'} says, or another --run"
            )
        if changed and not change_settings:
            raise TrainingError(f"this run has other values of {', '.join(changed)}; to change them, --change-settings")
        teacher = fingerprint(self.networks.teacher)
        if state.get("teacher", teacher) != teacher:
            raise TrainingError(
                "this run was started with other weights of the teacher; give that --teacher, or another --run"
            )
        if not to_export and state.get("prompts", self._prompts_digest()) != self._prompts_digest():
            raise TrainingError(
                "this run was started with other prompts; give the same --prompts, --data and --max-prompts"
            )
        self.student_optimizer.load_master_state(roles["student"])
        self.student_optimizer.load_optimizer_state(roles["student_optimizer"])
        self.fake_optimizer.load_master_state(roles["fake"])
        self.fake_optimizer.load_optimizer_state(roles["fake_optimizer"])
        self.ema.weights = {name: roles["ema"][name].to(value) for name, value in self.ema.weights.items()}
        self.ema.updates = int(state["ema_updates"])
        self.drift.load_state(state.get("drift", {}))
        if self.accelerator.process_index == 0:
            self.random.load_state(roles["random"], int(state["iteration"]))
            self.rollout.load_state_dict(roles["random"])
        else:
            self.random = Randomness(
                self.settings.seed + 1_000_003 * self.accelerator.process_index + 7 * int(state["iteration"]),
                self.random.device,
                self.random.dtype,
            )
            self.rollout.random = self.random
        self.progress = Progress(
            iteration=int(state["iteration"]),
            seconds=float(state["seconds"]),
            bad_updates=int(state["bad_updates"]),
            skipped=int(state["skipped"]),
            sums={name: list(pair) for name, pair in state["sums"].items()},
            devices=list(state.get("devices", [])),
        )
        return True
