"""Interleaved timing: every case once a round, so that a slow minute of the machine falls on all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

WARM_RUNS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one case.

    Attributes:
        median, low, high: of the repeats.
        repeats: how many.
        first: of the very first run, compilation included.
    """

    median: float
    low: float
    high: float
    repeats: int
    first: float

    @classmethod
    def of(cls, seconds: list[float], first: float = 0.0) -> Timing:
        """From the repeats' seconds.

        Raises:
            ValueError: there are none.
        """
        if not seconds:
            raise ValueError("no repeats to take a median of")
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), first)

    def to_dict(self) -> dict[str, float | int]:
        """As written to the report: seconds."""
        return {
            "median_s": self.median,
            "low_s": self.low,
            "high_s": self.high,
            "repeats": self.repeats,
            "first_s": self.first,
        }


@dataclass
class Interleaved:
    """What :func:`time_interleaved` found.

    Attributes:
        timings: by case.
        failures: case -> one sentence, for cases that could not run.
    """

    timings: dict[Any, Timing] = field(default_factory=dict)
    failures: dict[Any, str] = field(default_factory=dict)


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def repeats_for(seconds: float, most: int, budget: float) -> int:
    """How often to repeat a case of ``seconds``: at least once, at most ``most``, within ``budget`` seconds."""
    return max(1, min(most, int(budget / max(seconds, 1e-9))))


def time_interleaved(
    cases: Mapping[Any, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int = 7,
    case_budget: float = 10.0,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda _case: None,
) -> Interleaved:
    """Time all cases round by round, each warmed up first.

    Args:
        cases: name -> call; the order is kept inside a round.
        repeats: rounds at most.
        case_budget: seconds for the repeats of one case: slow cases are repeated less often.
        deadline: in `time.monotonic` seconds; cases that come later are failures, and repeats end. A case that has no
            repeat by then keeps its fastest warm run.
        progress: called with the name of each case before it is warmed up.

    Returns:
        medians; a case that raises (no memory, a graph that its backend cannot build) is a failure and not an error.
    """
    found = Interleaved()
    seconds: dict[Any, list[float]] = {}
    first: dict[Any, float] = {}
    warmed: dict[Any, float] = {}
    rounds: dict[Any, int] = {}
    for name, call in cases.items():
        progress(str(name))
        if time.monotonic() > deadline:
            found.failures[name] = "not begun: out of time"
            continue
        try:
            first[name] = warm = stopwatch(call, device)
            if warm < case_budget:
                warm = min(stopwatch(call, device) for _ in range(WARM_RUNS))
            else:  # the run that may have compiled says nothing of a warm one
                warm = stopwatch(call, device)
            rounds[name] = repeats_for(warm, repeats, case_budget)
            warmed[name], seconds[name] = warm, []
        except Exception as error:  # whatever a compiler raises: the other cases' figures must not be lost with it
            found.failures[name] = failure(error, device)
    for turn in range(max(rounds.values(), default=0)):
        for name, call in cases.items():
            if turn >= rounds.get(name, 0) or time.monotonic() > deadline:
                continue
            try:
                seconds[name].append(stopwatch(call, device))
            except Exception as error:
                found.failures[name], rounds[name] = failure(error, device), 0
    found.timings = {
        name: Timing.of(values or [warmed[name]], first[name])
        for name, values in seconds.items()
        if name not in found.failures
    }
    return found


def failure(error: BaseException, device: torch.device) -> str:
    """One sentence for the report; memory of a failed CUDA case is given back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if "out of memory" in str(error).lower():
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
