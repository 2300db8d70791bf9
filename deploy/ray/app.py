"""``serve run deploy.ray.app:build checkpoint=models/mine device=cuda max_engines=8``: RMD on a Ray cluster.

docs/scaling.md says what goes where, and why the settings below are as they are.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from deploy.ray.engine import WORK, EngineReplica
from deploy.ray.front import FrontReplica
from deploy.ray.roster import Roster
from deploy.ray.settings import ClusterSettings
from server.core.stages import ALL, Stages, name_of

_SCALE_IN_SECONDS = 300.0  # a device is dear to give back and to get: models are loaded for minutes
_SPARE_SECONDS = 15.0  # last batches, last replies, and Ray's own messages
_REFUSED_AT_ONCE = 1000  # requests that are only told no, polls, downloads, probes

ROSTER_OPTIONS: dict[str, Any] = {
    "num_replicas": 1,
    "ray_actor_options": {"num_cpus": 0},
    "max_ongoing_requests": 1000,  # every engine and every front asks once a second
    "health_check_period_s": 2.0,
    "logging_config": {"enable_access_log": False},
}


def build(arguments: dict[str, Any]) -> Application:
    """Return the application: fronts over engines over the roster.

    Raises:
        ValidationError: a setting is wrong; the message names it.
    """
    settings = ClusterSettings.model_validate(arguments)
    told = settings.of_replicas()
    roster = serve.deployment(Roster).options(**ROSTER_OPTIONS).bind()
    kinds = settings.engine_pools or {ALL: settings.min_engines}
    engines = [
        serve.deployment(EngineReplica, name=deployment_of(stages))
        .options(**engine_options(settings, count))
        .bind(told, roster, stages)
        for stages, count in kinds.items()
    ]
    front = serve.deployment(serve.ingress()(FrontReplica), name="Front").options(**front_options(settings))
    return front.bind(told, roster, *engines)


def deployment_of(stages: Stages) -> str:
    """Return what Ray calls the engines with these stages: Engine, Engine-low, Engine-high-decode."""
    return "Engine" if stages == ALL else f"Engine-{name_of(stages).replace('+', '-')}"


def engine_options(settings: ClusterSettings, count: int) -> dict[str, Any]:
    """Return what Ray is to know of so many engines, or more where work asks for them."""
    gpus = {"num_gpus": 1} if settings.device.startswith("cuda") else {}
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": settings.engine_cpus, **gpus},
        "graceful_shutdown_timeout_s": settings.drain_seconds + _SPARE_SECONDS,
        "health_check_period_s": 2.0,
        "logging_config": {"enable_access_log": False},  # ours names keys, and leaves out queries
    }
    if settings.max_engines == settings.min_engines:
        return {**options, "num_replicas": count}
    policy = AutoscalingPolicy(
        policy_function="deploy.ray.scaling:EnginesForWork",
        policy_kwargs={"seconds": settings.engine_seconds, "metric": WORK},
    )
    scaling = AutoscalingConfig(
        min_replicas=settings.min_engines,
        max_replicas=settings.max_engines,
        metrics_interval_s=1.0,
        look_back_period_s=5.0,
        upscale_delay_s=5.0,
        downscale_delay_s=_SCALE_IN_SECONDS,
        policy=policy,
    )
    return {**options, "autoscaling_config": scaling}


def front_options(settings: ClusterSettings) -> dict[str, Any]:
    """Return what Ray is to know of fronts."""
    return {
        "num_replicas": settings.fronts,
        "ray_actor_options": {"num_cpus": 1},
        "max_ongoing_requests": settings.queue_items + _REFUSED_AT_ONCE,
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": settings.deadline_seconds + _SPARE_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "logging_config": {"enable_access_log": False},  # ours names keys, and leaves out queries
    }
