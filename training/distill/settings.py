"""Settings of a distillation run: YAML file, environment (`RMD_DISTILL_*`) and flags.

What is left open is filled from the method's definition (its class's `defaults`) and, once the teacher is known, from
its backbone (`BACKBONE_DEFAULTS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from rmd.profiles import WAN_NEGATIVE_PROMPT
from training.distill.methods import METHODS
from training.distill.rollout import Draw, Mode

Method = Literal["rmd", "tdm", "dmd2", "swd", "naive"]

CHANGEABLE = frozenset(
    {
        "guidance_scale", "generator_rate", "fake_rate", "fake_steps", "final_rate", "decay_share", "ema_decay",
        "clip_norm", "stage_weights", "resolution_map", "interval",
    }
)  # fmt: skip
"""Settings that `--change-settings` may change when a run is resumed."""
HOUSEKEEPING = frozenset(
    {
        "minutes", "iterations", "log_every", "save_every", "keep_checkpoints", "sheet_every", "sheet_prompts",
        "validation_prompts", "tracker", "teacher_batch", "precision", "stop_on_drift",
        "compile", "micro_batch", "gradient_checkpointing", "offload_activations", "sharding", "ema_on_cpu",
        "export_weights", "export_checkpoints", "export_teacher_share", "inference_noise_intensity",
        "inference_step_noise_intensity",
    }
)  # fmt: skip
"""Settings that may differ on resuming without being asked: they do not touch what is learnt, but for rounding."""

BACKBONE_DEFAULTS: dict[str, dict[str, Any]] = {
    # The paper's Appendix B; and the contrast that this teacher is published with.
    "wan": {"batch_size": 4, "low_stage_iterations": 20, "negative_prompt": WAN_NEGATIVE_PROMPT},
    # sigma / alpha is 41 at .857 and 157 at .999: what bfloat16 rounds away of the noise drowns the score in x0.
    "pixart": {"max_tau": 0.9},
}
"""By a backbone's profile: what is right for it where neither the user nor the method says otherwise."""


class DistillSettings(BaseSettings):
    """What a distillation run is. The defaults are the paper's where it prints them, for large backbones."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix="RMD_DISTILL_", validate_default=True)

    method: Method = "rmd"
    backbone: str | None = Field(None, description="that these settings are made for; another teacher is refused")
    schedule: str | None = Field(None, description="steps per stage, such as 2+2; the method's own by default")
    timesteps: tuple[float, ...] | None = Field(None, description="of TDM's, DMD2's or SwD's steps; the backbone's own")
    preset: str | None = Field(None, description="name of a cascade preset; the backbone's own by default")
    resolution_map: Literal["shift", "logsnr", "none", "inverse"] | None = Field(None, description="Eq. 2 or another")
    seed: int = 0
    initial_student: str | None = Field(
        None, description="checkpoint folder whose denoiser the student starts from; the teacher's by default"
    )

    # Length of the run.
    iterations: int | None = Field(None, ge=0, description="stop after this many generator updates")
    minutes: float | None = Field(None, gt=0, description="stop after this much training time, over all resumptions")

    # The objective.
    batch_size: int = Field(32, ge=1, description="samples matched in one update, over all processes")
    guidance_scale: float | None = Field(None, ge=0, description="of the real score; the teacher's own by default")
    negative_prompt: str | None = Field(
        None, description="what guidance contrasts with; the backbone's own by default, mostly the empty prompt"
    )
    loss: Literal["pseudo_huber", "elementwise_huber", "sized_huber", "squared"] = "pseudo_huber"
    normalise: bool = Field(False, description="divide each sample's loss by mean |y - real|")
    normaliser_floor: float = Field(1e-6, gt=0, description="the least that it is divided by")
    interval: Literal["stage", "step", "full", "trajectory"] = Field(
        "stage", description="where tau is drawn for a sample; trajectory: from its step's end to the stage's top"
    )
    interval_offsets: tuple[float, ...] | None = Field(
        None, description="interval=trajectory: the share of the way up that is left out, low stage first"
    )
    match_at: str | None = Field(
        None, description="the teacher's size, for RMD of a student that ends below it; the student's last by default"
    )
    max_tau: float | None = Field(None, gt=0, le=1, description="tau is drawn no higher; the backbone's own by default")
    fake_weighting: Literal["snr", "uncapped_snr", "velocity", "none"] = "snr"
    stage_weights: tuple[float, ...] | None = Field(None, description="w_stage, low stage first; 1 by default")
    score_noise_intensity: float | None = Field(None, ge=0, le=1, description="the cascade's own by default")
    transition_noise_intensity: float | None = Field(None, ge=0, le=1, description="in roll-outs; the cascade's own")
    step_noise_intensity: float | None = Field(
        None, ge=0, le=1, description="the same inside a stage, in roll-outs; the cascade's own"
    )
    score_noise: Literal["constant", "trajectory"] = Field(
        "constant", description="trajectory: predicted noise as at the step's end, fading as tau rises"
    )
    score_frames: int | None = Field(
        None, ge=2, description="so many frames of a film, drawn anew each time, are what teacher and fake score see"
    )
    score_noise_everywhere: bool = Field(False, description="predicted noise also where the stage has the full side")
    gan_weight: float = Field(0.0, ge=0, description="of the student's GAN loss (DMD2, SwD)")
    gan_critic_weight: float = Field(1e-2, ge=0, description="of the discriminator's loss, beside the fake score's")
    mmd_weight: float = Field(0.0, ge=0, description="SwD's patch loss on the fake network's tokens")
    score_entries: tuple[int, int] = Field((12, 28), description="SwD: entries of its time table for the DMD loss")
    patch_entries: tuple[int, int] = Field((18, 28), description="SwD: the same for its patch loss")
    real_samples: int = Field(512, ge=2, description="clean samples for the losses above")
    real: str = Field("teacher", description="who makes them: teacher, or a folder (`rmd data`, or metadata.jsonl)")
    teacher_batch: int = Field(8, ge=1, description="of these at once, on each device")

    # The optimisation.
    generator_rate: float = Field(4e-6, gt=0)
    fake_rate: float = Field(2e-5, gt=0)
    betas: tuple[float, float] = (0.0, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    clip_fake: bool = Field(True, description="clip the fake score's gradients too")
    fake_steps: int = Field(1, ge=1, description="fake-score updates for each generator update")
    early_fake_steps: int = Field(1, ge=1, description="the same during the first early_iterations")
    early_iterations: int = Field(0, ge=0)
    rate_warmup: int = Field(0, ge=0, description="updates over which the rates rise linearly")
    decay_share: float = Field(0.0, ge=0, le=1, description="last share of the run over which the rates fall")
    final_rate: float = Field(0.1, ge=0, le=1, description="the rates' factor at the end of the run")
    low_stage_iterations: int = Field(50, ge=0, description="the paper's warm-up: the low stage alone")
    fake_warmup_iterations: int = Field(0, ge=0, description="first train the fake score alone, on a student at rest")
    ema_decay: float = Field(0.995, ge=0, lt=1)

    # Which steps an update trains.
    draw: Draw = Field("stage", description="Eq. 6: a stage first, then one of its steps; step: all steps alike")
    rollout: Mode = Field("mixed", description="a batch holds one step, one stage, each sample's own; or is pipelined")
    fake_first: bool = Field(
        False, description="the fake score's updates go before the student's, on samples of their own"
    )

    # Ours, not the paper's (see docs/training.md).
    shared_score_sample: bool = Field(False, description="both updates use the same tau and noise: one pass fewer")
    warm_start_iterations: int = Field(0, ge=0, description="first regress the guided teacher on the student's states")
    warm_start_fake_iterations: int = Field(50, ge=0, description="the last of these also train the fake score")
    warm_start_rate: float | None = Field(None, gt=0, description="generator's rate there; generator_rate by default")

    # Machine.
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the device has it")
    micro_batch: int | None = Field(
        None, ge=1, description="samples at once on a device; gradients add up to batch_size. All of them by default"
    )
    gradient_checkpointing: bool = False
    offload_activations: bool = Field(
        False,
        description="what the backward pass needs waits on the CPU; with gradient_checkpointing, or weights travel",
    )
    sharding: bool = Field(False, description="FSDP2: each process holds its part of the three networks")
    second_moment: Literal["float32", "8bit"] = Field("float32", description="AdamW's; 8bit needs torchao")
    ema_on_cpu: bool = False
    compile: bool = False
    lora_rank: int = Field(0, ge=0, description="0 trains all weights")
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        description="attention, mlp, convolutions, projections, or the ends of layers' names",
    )
    export_weights: Literal["ema", "student"] = "ema"
    export_checkpoints: int = Field(1, ge=1, description="export the mean over the newest so many checkpoints kept")
    export_teacher_share: float = Field(
        0.0, ge=0, lt=1, description="share of the teacher's weights in the exported mean (arXiv 2109.01903)"
    )
    inference_noise_intensity: float | None = Field(
        None, ge=0, le=1, description="re-injection at inference, as exported; the cascade's own by default"
    )
    inference_step_noise_intensity: float | None = Field(None, ge=0, le=1, description="the same inside a stage")

    # Records.
    stop_on_drift: bool = Field(True, description="end a run whose predictions turn to noise, one colour or a still")
    log_every: int = Field(10, ge=1)
    save_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sheet_every: int = Field(500, ge=0, description="0 draws none")
    sheet_prompts: tuple[str, ...] = ()
    validation_prompts: str | None = Field(None, description="file of the prompts that sheets are drawn of")
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    changeable: ClassVar[frozenset[str]] = CHANGEABLE

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**method_defaults(str(values.get("method", "rmd"))), **values}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSettings:
        if self.warm_start_fake_iterations > self.warm_start_iterations > 0:
            raise ValueError(
                f"warm_start_fake_iterations ({self.warm_start_fake_iterations}) are part of warm_start_iterations "
                f"({self.warm_start_iterations}) and cannot be more"
            )
        if self.fake_warmup_iterations and self.warm_start_iterations:
            raise ValueError("fake_warmup_iterations and warm_start_iterations exclude each other: set one to 0")
        if self.second_moment == "8bit" and (self.betas[0] or self.sharding):
            raise ValueError("second_moment=8bit is for betas[0] = 0 and networks that are not sharded: leave it out")
        if self.sharding and (self.lora_rank or self.compile):
            raise ValueError(
                "sharding=true is for plain networks trained whole: under lora_rank all roles share one frozen copy, "
                "and compiled blocks are not sharded; leave sharding out, or set lora_rank=0 and compile=false"
            )
        if self.gan_weight and self.method not in ("dmd2", "swd"):
            raise ValueError(f"gan_weight is DMD2's and SwD's loss, and method {self.method!r} has none: set it to 0")
        if self.shared_score_sample and self.method in ("dmd2", "swd"):
            raise ValueError(f"shared_score_sample: {self.method} draws the fake score's times by a law of its own")
        if self.timesteps is not None and (self.method in ("rmd", "naive") or self.schedule or self.preset):
            raise ValueError("timesteps are for tdm, dmd2 and swd, without schedule and preset: leave one of them out")
        if self.mmd_weight and self.method != "swd":
            raise ValueError(f"mmd_weight is SwD's loss, and method {self.method!r} has none: set it to 0")
        if self.score_frames is not None and self.method not in ("rmd", "tdm"):
            raise ValueError(f"score_frames: method {self.method!r} has a further loss, on whole films; leave it out")
        if self.interval_offsets is not None and self.interval != "trajectory":
            raise ValueError(f"interval_offsets belong to interval=trajectory, and interval is {self.interval!r}")
        if self.score_noise == "trajectory" and self.interval != "trajectory":
            raise ValueError("score_noise=trajectory starts at a step's end, and tau lies above: interval=trajectory")
        if self.fake_first and (self.rollout == "pipelined" or self.shared_score_sample):
            raise ValueError("fake_first: under rollout=pipelined or shared_score_sample both learn on one batch")
        if self.rollout == "pipelined" and self.method == "swd":
            raise ValueError("rollout=pipelined: SwD draws each step's states from clean samples, not from roll-outs")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and file (given at construction) win over the environment."""
        return init_settings, env_settings

    @classmethod
    def read(cls, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> DistillSettings:
        """Settings from a YAML file, overridden by flags; the environment fills what neither says.

        Raises:
            ValueError: an unknown setting or an impossible value; the message names it.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{file} is not valid YAML: {error}") from None
            if not isinstance(loaded, dict):
                raise ValueError(f"{file} must hold a mapping of settings")
            values.update(loaded)
        given = {key: value for key, value in (flags or {}).items() if value is not None}
        _refuse_another_methods(file, values, given)
        values.update(given)
        if unknown := sorted(values.keys() - cls.model_fields.keys()):
            raise ValueError(f"unknown setting {unknown[0]!r}; there are {', '.join(cls.model_fields)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(_one_line(error)) from None

    def for_backbone(self, profile: str) -> DistillSettings:
        """The same with a backbone's own defaults where nothing was said, see `BACKBONE_DEFAULTS`."""
        defaults = BACKBONE_DEFAULTS.get(profile, {})
        return self.model_copy(update={k: v for k, v in defaults.items() if k not in self.model_fields_set})

    def departures(self) -> list[str]:
        """Where the settings leave the method's definition, such as "interval=stage (tdm: step)"."""
        defined = method_defaults(self.method)
        return [
            f"{name}={getattr(self, name)} ({self.method}: {value})"
            for name, value in defined.items()
            if getattr(self, name) != value
        ]

    def to_record(self) -> dict[str, Any]:
        """A JSON-ready dictionary of every setting."""
        return self.model_dump(mode="json")


def method_defaults(name: str) -> Mapping[str, Any]:
    """What defines a method, by its class; nothing for an unknown name."""
    return METHODS[name].defaults if name in METHODS else {}


def _refuse_another_methods(file: Path | None, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """A file that was written for another method than the flags name would win over that method's definition."""
    method, written_for = str(flags.get("method", "")), str(values.get("method", "rmd"))
    defined = method_defaults(method)
    odd = [name for name in defined if name not in flags and values.get(name, defined[name]) != defined[name]]
    if file is not None and method and method != written_for and odd:
        raise ValueError(
            f"{file} was written for method {written_for}, and its {', '.join(odd)} would make of {method} something "
            f"else ({method} has {', '.join(f'{name}={defined[name]}' for name in odd)}); give a file of {method}'s, "
            f"or these settings as flags (--set)"
        )


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["guidance_scale=5", "betas=[0, 0.95]"]` as values, read as YAML.

    Raises:
        ValueError: an entry is not `name=value`.
    """
    values: dict[str, Any] = {}
    for entry in assignments:
        name, sign, text = entry.partition("=")
        if not sign or not name:
            raise ValueError(f"--set {entry!r} is not name=value")
        try:
            values[name] = _value(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {entry!r}: {text!r} is not a YAML value") from None
    return values


def _value(text: str) -> Any:
    """A YAML value, or a number that YAML reads as text, such as 1e-4."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def changed_settings(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ, leaving out those of `HOUSEKEEPING`.

    A setting that is younger than the stored ones had its default then.
    """
    defaults = DistillSettings.model_construct().to_record()
    names = sorted((set(stored) | set(current)) - HOUSEKEEPING)
    return [name for name in names if stored.get(name, defaults.get(name)) != current.get(name)]


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    return f"setting {name!r}: {first['msg']}" if name else str(first["msg"])
