"""How many engines the admitted work asks for. Alone in its module: Ray sends it to its controller by value."""

from __future__ import annotations

from typing import Any


class EnginesForWork:
    """A policy of Ray Serve's autoscaler, which keeps the bounds and the delays of its configuration.

    Args:
        seconds: of admitted work that one engine is to have at most.
        metric: by which engines tell their share of it.
    """

    def __init__(self, seconds: float, metric: str) -> None:
        self._seconds, self._metric = seconds, metric

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the engines that are wanted. ``context``: ``ray.serve.config.AutoscalingContext``."""
        shares = (context.aggregated_metrics or {}).get(self._metric) or {}
        if not shares:  # nothing is known, as at the start: as it is
            return context.target_num_replicas, context.policy_state
        return sum(shares.values()) / self._seconds, context.policy_state
