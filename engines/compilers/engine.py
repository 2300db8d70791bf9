"""What every loaded engine does: warm up, run, take other weights, unload."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.errors import EngineError, EngineInputError
from engines.manifest import Manifest
from engines.tracks import Track


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of a loaded engine: its own, and those it shares with other engines of its component."""

    private: int
    shared: int


class Engine(ABC):
    """A loaded engine at one of its batches. Not safe for concurrent runs; one thread owns a device.

    Args:
        manifest: of the engine.
        batch: rows of a run, one of the manifest's batches; None: the widest.
    """

    def __init__(self, manifest: Manifest, batch: int | None = None) -> None:
        self.manifest = manifest
        self.batch = manifest.spec.batch if batch is None else batch
        self._device_type = manifest.spec.target.device
        self._names = frozenset(spec.name for spec in manifest.inputs)
        self._expected = tuple((spec.name, (self.batch, *spec.shape[1:]), spec.torch_dtype) for spec in manifest.inputs)

    def at(self, batch: int) -> Engine:
        """This engine at another of its batches; the weights are shared. Each is to be unloaded.

        Raises:
            EngineError: it has no such batch.
        """
        if batch != self.batch:
            raise EngineError(f"engine {self.manifest.spec.title} runs at batch {self.batch}, not {batch}")
        return self

    @property
    def latency_seconds(self) -> float | None:
        """The recorded median of a run, None when it was never timed."""
        return self.manifest.latency_seconds.get(self.batch)

    def takes_tracks(self, count: int) -> bool:
        """Whether ``count`` threads, each on its track, may run this engine at once, each its part of the batch."""
        return False

    def rows_on(self, track: Track | None) -> int:
        """Rows of a run: the batch, or a track's part of it."""
        return self.batch if track is None else self.batch // track.count

    def run(self, inputs: Mapping[str, Tensor], track: Track | None = None) -> Tensor:
        """The network's output.

        Args:
            inputs: by name; names, shapes and dtypes as in the manifest, contiguous or not.
            track: the calling thread's, of as many as the engine takes; the rows are its part of the batch.

        Raises:
            EngineInputError: a name, shape or dtype is wrong; the message says which and what is expected.
        """
        if track is None:
            self.check_inputs(inputs)
            return self._run([inputs[name] for name, _, _ in self._expected])
        self._check(inputs, self.rows_on(track))
        return self._run_on(track, [inputs[name] for name, _, _ in self._expected])

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """See :meth:`run`. Compiled code itself would read wrong shapes silently."""
        self._check(inputs, self.batch)

    def _check(self, inputs: Mapping[str, Tensor], rows: int) -> None:
        if inputs.keys() != self._names:
            missing, extra = sorted(self._names - inputs.keys()), sorted(inputs.keys() - self._names)
            said = [f"lacks {', '.join(missing)}"] if missing else []
            said += [f"does not take {', '.join(extra)}"] if extra else []
            raise EngineInputError(f"engine {self.manifest.spec.title} {' and '.join(said)}")
        for name, full, dtype in self._expected:
            given, shape = inputs[name], (rows, *full[1:])
            if given.shape != shape or given.dtype != dtype or given.device.type != self._device_type:
                raise EngineInputError(
                    f"engine {self.manifest.spec.title}: input {name!r} is {tuple(given.shape)} {given.dtype} on "
                    f"{given.device.type}, expected {shape} {dtype} on {self._device_type}"
                )

    def warmup(self, runs: int = 2) -> None:
        """Run on zeros, so that the first request pays for nothing."""
        inputs = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, shape, dtype in self._expected}
        for _ in range(runs):
            self.run(inputs)

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return torch.device(self.manifest.spec.target.device)

    @abstractmethod
    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        """Runs on checked inputs in the manifest's order."""

    def _run_on(self, track: Track, inputs: Sequence[Tensor]) -> Tensor:
        """The same on a track, of engines that take any."""
        raise EngineError(f"engine {self.manifest.spec.title} takes no tracks")

    @abstractmethod
    def refit(self, state: Mapping[str, Tensor]) -> None:
        """Take new weights, by the component's parameter names, without being built or loaded again.

        This engine's other batches follow, and so does every engine that reads the same weight bank.

        Raises:
            EngineError: this engine cannot, or the weights do not fit.
        """

    def check_refit(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  -- engines without weights have no say
        """Raises :class:`EngineError` where :meth:`refit` would, before anything is changed."""

    def on_refit(self) -> None:  # noqa: B027  -- most engines need not know
        """Told when the weights that this engine reads were replaced, by it or by another that shares them."""

    def addresses(self) -> tuple[int, ...]:
        """Where weights lie that may be moved behind this engine's back: a recording of it is of no use once these
        are others."""
        return ()

    @abstractmethod
    def memory(self) -> EngineMemory:
        """Bytes held; those of :attr:`~engines.manifest.Manifest.embedded_bytes` are counted as shared."""

    @abstractmethod
    def unload(self) -> None:
        """Free everything; the engine cannot run any more."""
