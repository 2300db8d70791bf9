"""A distillation run's checkpoints: what they hold, and what a resumed run must have in common with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from training.distill.settings import changed_settings
from training.runtime.checkpoints import checkpoints, load_checkpoint, load_own, save_checkpoint

if TYPE_CHECKING:
    from training.distill.trainer import Trainer


class TrainingError(ValueError):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoints."""

    iteration: int = 0
    seconds: float = 0.0
    bad_updates: int = 0
    skipped: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)


def save_run(trainer: Trainer) -> None:
    """Write a checkpoint; all processes call it together."""
    updater, accelerator = trainer.updater, trainer.accelerator
    student = updater.student_optimizer.master_state()
    roles = {
        "student": student,
        "student_optimizer": updater.student_optimizer.optimizer_state(),
        "fake": updater.fake_optimizer.master_state(),
        "fake_optimizer": updater.fake_optimizer.optimizer_state(),
        "ema": updater.ema.state(student),
    }
    carried = {
        f"{number}.{name}": tensor
        for number, rollout in enumerate(updater.rollouts)
        for name, tensor in rollout.state_dict().items()
    }
    state = {
        **{name: value for name, value in asdict(trainer.progress).items() if name != "iteration"},
        "ema_updates": updater.ema.updates,
        "drift": trainer.drift.state(),
        "settings": trainer.settings.to_record(),
        "prompts": _prompts_digest(trainer),
        "teacher": trainer.networks.teacher_fingerprint(),
    }
    save_checkpoint(
        trainer.run / "checkpoints",
        trainer.progress.iteration,
        roles,
        state,
        trainer.settings.keep_checkpoints,
        own={_own_role(trainer): carried} if carried else None,
        rank=accelerator.process_index,
        wait=accelerator.wait_for_everyone,
    )


def resume_run(trainer: Trainer, change_settings: bool = False, *, to_export: bool = False) -> bool:
    """Continue from the run's newest checkpoint.

    What is drawn depends on the update's number alone, so the run goes on to the bit; but the samples that
    `rollout=pipelined` carries on are rolled out anew where the number of processes changes.

    Args:
        change_settings: allow the settings in `CHANGEABLE` to differ from the stored ones.
        to_export: the run is not trained on, so its prompts may be absent.

    Returns:
        whether there was a checkpoint.

    Raises:
        TrainingError: other settings, prompts or weights of the teacher than the run was started with.
    """
    found = checkpoints(trainer.run / "checkpoints")
    if not found:
        return False
    updater = trainer.updater
    student, fake = updater.student_optimizer.master_state(), updater.fake_optimizer.master_state()
    like = {"student": student, "student_optimizer": student, "ema": student, "fake": fake, "fake_optimizer": fake}
    roles, state = load_checkpoint(found[-1], like)
    _check(trainer, state, change_settings, to_export)
    updater.student_optimizer.load_master_state(roles["student"])
    updater.student_optimizer.load_optimizer_state(roles["student_optimizer"])
    updater.fake_optimizer.load_master_state(roles["fake"])
    updater.fake_optimizer.load_optimizer_state(roles["fake_optimizer"])
    updater.ema.load(roles["ema"], int(state["ema_updates"]))
    carried = load_own(found[-1], _own_role(trainer))
    for number, rollout in enumerate(updater.rollouts):
        rollout.load_state_dict(_of_rollout(carried, number))
    trainer.drift.load_state(state.get("drift", {}))
    trainer.progress = Progress(
        iteration=int(state["iteration"]),
        seconds=float(state["seconds"]),
        bad_updates=int(state["bad_updates"]),
        skipped=int(state["skipped"]),
        sums={name: list(pair) for name, pair in state["sums"].items()},
        devices=list(state.get("devices", [])),
    )
    return True


def _check(trainer: Trainer, state: dict[str, Any], change_settings: bool, to_export: bool) -> None:
    changed = changed_settings(state["settings"], trainer.settings.to_record())
    fixed = [name for name in changed if name not in trainer.settings.changeable]
    if fixed:
        raise TrainingError(
            f"this run was started with other settings: {', '.join(fixed)}; they cannot change: give what "
            f"{trainer.run / 'settings.json'} says, or another --run"
        )
    if changed and not change_settings:
        raise TrainingError(f"this run has other values of {', '.join(changed)}; to change them, --change-settings")
    teacher = trainer.networks.teacher_fingerprint()
    if state.get("teacher", teacher) != teacher:
        raise TrainingError(
            "this run was started with other weights of the teacher; give that --teacher, or another --run"
        )
    if not to_export and state.get("prompts", _prompts_digest(trainer)) != _prompts_digest(trainer):
        raise TrainingError(
            "this run was started with other prompts; give the same --prompts, --data and --max-prompts"
        )


def _own_role(trainer: Trainer) -> str:
    return f"carried-{trainer.accelerator.process_index}-of-{trainer.accelerator.num_processes}"


def _of_rollout(carried: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in carried.items() if name.startswith(prefix)}


def _prompts_digest(trainer: Trainer) -> str:
    return str(getattr(trainer.method.prompts, "digest", ""))
