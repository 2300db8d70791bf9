"""What is asked of a lent GPU, in the order of what it is worth; torch-free.

Two parts of at most eight minutes, the more valuable first, and so within each. Every case is a process with a deadline
of its own (:mod:`bench.gpu.harness`); the deadlines add up to more, since not all are used, and what is left when the
minutes are over is not begun.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        name: on the command line.
        part: 1 or 2.
        seconds: after which it is stopped.
        decides: what its answer is for.
        call: ``module:function`` of :mod:`bench.gpu`, which yields rows.
        words: given to that function.
        environment: of its process.
    """

    name: str
    part: int
    seconds: float
    decides: str
    call: str
    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}
CASES = (
    Case("machine", 1, 30, "that the ceilings hold", "machine:machine"),
    Case("decoder", 1, 40, "one-line gains of the decoder", "networks:decoder"),
    Case("denoiser", 1, 50, "one-line gains of the denoiser", "networks:denoiser"),
    Case("decoder-compiled", 1, 90, "half of end to end", "networks:compiled", ("decoder", "small decoder")),
    Case("denoiser-compiled", 1, 160, "the other half", "networks:compiled", ("denoiser",)),
    Case("aoti-compile", 1, 60, "whether AOTInductor compiles there", "aoti:compile_both"),
    Case("aoti-load", 1, 30, "whether the package takes weights from outside", "aoti:load", environment=_BLOCKING),
    Case("aoti-run", 1, 30, "whether it runs with them", "aoti:run", environment=_BLOCKING),
    Case("aoti-inside", 1, 30, "the same with weights inside: whose fault it is", "aoti:inside", environment=_BLOCKING),
    Case("aoti-replay", 1, 30, "whether it can be recorded", "aoti:replay"),
    Case("student", 1, 120, "the headline: 2+2 in one call", "student:student"),
    Case("engines-eager", 2, 40, "the step down, as served", "backends:backend", ("eager",)),
    Case("engines-inductor", 2, 90, "AOTInductor, as served", "backends:backend", ("inductor",)),
    Case("denoiser-fp8", 2, 120, "whether FP8 is worth keeping", "fp8:denoiser"),
    Case("pixart", 2, 60, "its row of the table", "families:family", ("pixart",)),
    Case("sd3", 2, 75, "its row of the table", "families:family", ("sd3",)),
    Case("wan-1.3b", 2, 75, "films: steps and decoding", "families:family", ("wan-1.3b",)),
    Case("decoder-autotuned", 2, 90, "the last milliseconds", "networks:autotuned"),
    Case("engines-tensorrt", 2, 90, "TensorRT, as served, where it is installed", "backends:backend", ("tensorrt",)),
    Case("wan-14b", 2, 90, "its row of the table, in steps", "families:family", ("wan-14b",)),
)


def find(name: str) -> Case:
    """The case called ``name``.

    Raises:
        ValueError: there is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"no case {name!r}; there are {', '.join(case.name for case in CASES)}")
