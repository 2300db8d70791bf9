"""Which station runs next, and with whom: one small interface, several rules."""

from __future__ import annotations

import math

from server.core.costs import CostTable
from server.core.policies.base import Choice, Hold, Policy
from server.core.policies.continuous import ContinuousPolicy
from server.core.policies.dynamic import DynamicPolicy
from server.core.policies.fifo import FifoPolicy
from server.core.policies.stagewise import StagewisePolicy

POLICIES = ("stagewise", "fifo", "dynamic", "continuous")

__all__ = ["POLICIES", "Choice", "Hold", "Policy", "make_policy"]


def make_policy(text: str, costs: CostTable) -> Policy:
    """Return a policy by name, with options: ``stagewise``, ``fifo``, ``dynamic:8:0.02`` (pictures, seconds),
    ``continuous:8`` (rows).

    Raises:
        ValueError: there is no such policy, or its options are no such numbers; the message names those there are.
    """
    name, *options = text.split(":")
    try:
        if name == "stagewise" and len(options) <= 1:
            return StagewisePolicy(costs, *map(float, options))
        if name == "fifo" and not options:
            return FifoPolicy(costs)
        size = int([*options, "8"][0]) if name in ("dynamic", "continuous") else 1
        window = float([*options[1:], "0.02"][0])
        if size < 1 or not 0 <= window < math.inf:
            raise ValueError
        if name == "dynamic" and len(options) <= 2:
            return DynamicPolicy(costs, size, window)
        if name == "continuous" and len(options) <= 1:
            return ContinuousPolicy(costs, size)
    except ValueError:
        pass
    raise ValueError(
        f"policy '{text[:40]}' is none of {', '.join(POLICIES)}, such as stagewise, dynamic:8:0.02 or continuous:8"
    )
