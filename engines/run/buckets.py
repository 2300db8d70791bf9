"""Any number of rows through engines of fixed batches: picks buckets by cost, pads, splits, drops what does not fit."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from engines.compilers.engine import Engine, EngineMemory
from engines.errors import EngineError, EngineInputError, EngineMissing
from engines.manifest import Manifest
from engines.run.exhaustion import free_memory, is_out_of_memory
from engines.tracks import Track, current_track
from engines.weights.bank import WeightBank
from rmd.size import Size

log = logging.getLogger(__name__)

Place = tuple[str, str | None]
"""(component, size in pixels as text, or None for a component without one)."""


def place_of(component: str, size: Size | None) -> Place:
    """The place of a component at a size."""
    return component, None if size is None else str(size)


class BucketExecutor:
    """An :class:`~rmd.backbones.executor.Executor` over loaded engines. One thread at a time, or one on each track.

    Args:
        engines: by place and batch.
        banks: the weights of each component.
        kind: the backend, such as "inductor"; "eager" when nothing is compiled.
        padded: engines take exactly their batch.
    """

    def __init__(
        self, engines: Mapping[Place, Mapping[int, Engine]], banks: Mapping[str, WeightBank], kind: str, padded: bool
    ) -> None:
        self.kind = kind
        self._engines = {place: dict(sorted(by_batch.items())) for place, by_batch in engines.items()}
        self._banks = dict(banks)
        self._padded = padded
        self._learnt: dict[tuple[Place, int], float] = {}
        self._splits: dict[tuple[Place, int], tuple[int, ...]] = {}

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """The component's output for any number of rows.

        Raises:
            EngineError: no such component or size.
            EngineInputError: a name, shape or dtype is wrong, or the inputs' rows disagree.
        """
        place = self._place(component, size)
        rows = _rows(component, inputs)
        while True:
            try:
                return self._run(place, rows, inputs)
            except RuntimeError as error:
                if not is_out_of_memory(error) or current_track() is not None:  # others run these engines meanwhile
                    raise
                if not self._drop_largest(place, rows):
                    raise
            # Out here, where no traceback keeps the failed run's tensors.
            log.warning("%s: out of memory at %d rows, falling back to smaller batches", component, rows)
            free_memory()

    def _run(self, place: Place, rows: int, inputs: Mapping[str, Tensor]) -> Tensor:
        outputs = []
        start = 0
        engines, track = self._engines_for(place, rows, current_track())
        for engine in engines:
            taken = min(engine.rows_on(track), rows - start)
            part = {name: tensor[start : start + taken] for name, tensor in inputs.items()}
            outputs.append(self._run_bucket(engine, taken, part, track))
            start += taken
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _engines_for(self, place: Place, rows: int, track: Track | None) -> tuple[list[Engine], Track | None]:
        """What runs ``rows`` rows, one after the other; and the track, where they take it."""
        by_batch = self._engines[place]
        if track is not None and by_batch[max(by_batch)].takes_tracks(track.count):
            fitting = [engine for engine in by_batch.values() if engine.takes_tracks(track.count)]
            whole, rest = divmod(rows, fitting[-1].rows_on(track))
            last = [next(engine for engine in fitting if engine.rows_on(track) >= rest)] if rest else []
            return [fitting[-1]] * whole + last, track
        return [by_batch[bucket] for bucket in self.split(place, rows)], None

    def _run_bucket(self, engine: Engine, rows: int, inputs: Mapping[str, Tensor], track: Track | None) -> Tensor:
        lacking = engine.rows_on(track) - rows
        if self._padded and lacking:
            # Copies of the last row, not zeros: an all-zero mask or prompt may give NaN.
            inputs = {
                name: torch.cat([tensor, tensor[-1:].expand(lacking, *tensor.shape[1:])])
                for name, tensor in inputs.items()
            }
        return engine.run(inputs, track)[:rows]

    def takes_tracks(self, count: int) -> bool:
        """Whether ``count`` threads, each on its track, may run the denoiser at once at every size."""
        denoisers = [by_batch for (component, _), by_batch in self._engines.items() if component == "denoiser"]
        return bool(denoisers) and all(by and by[max(by)].takes_tracks(count) for by in denoisers)

    # ---- what a batch costs -----------------------------------------------------------------------------------------

    def split(self, place: Place, rows: int) -> tuple[int, ...]:
        """The buckets that serve ``rows`` rows in the least time, by :meth:`costs`; largest first. The same as long as
        the costs are."""
        known = self._splits.get((place, rows))
        if known is None:
            cost = self._costs(place)
            best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
            for count in range(1, rows + 1):
                options = [
                    (best[max(0, count - bucket)][0] + seconds, (bucket, *best[max(0, count - bucket)][1]))
                    for bucket, seconds in cost.items()
                ]
                # Rounded: sums of the same cost in another order must not decide.
                best.append(min(options, key=lambda option: (float(f"{option[0]:.9g}"), len(option[1]), option[1])))
            known = tuple(sorted(best[rows][1], reverse=True))
            self._splits[place, rows] = known
        return known

    def learn(self, component: str, size: Size | None, bucket: int, seconds: float) -> None:
        """Take the real cost of a bucket in place of the one that was recorded when it was built.

        Args:
            component, size: where.
            bucket: rows of the batch; it may be one whose engine comes later.
            seconds: of one run, as its user estimates them by now.

        Raises:
            ValueError: no positive number.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"{seconds} is no cost of a batch in seconds")
        place = place_of(component, size)
        if self._learnt.get((place, bucket)) != seconds:
            self._learnt[place, bucket] = seconds
            self._forget_splits(place)

    def costs(self, component: str, size: Size | None) -> dict[int, float]:
        """Seconds by bucket: learnt ones; else recorded ones, brought to the scale of the learnt; else as much a row as
        the nearest known bucket. Where none is known: its rows."""
        return self._costs(self._place(component, size))

    def _costs(self, place: Place) -> dict[int, float]:
        recorded = {bucket: engine.latency_seconds for bucket, engine in self._engines[place].items()}
        learnt = {bucket: seconds for (where, bucket), seconds in self._learnt.items() if where == place}
        ratios = [seconds / record for bucket, seconds in learnt.items() if (record := recorded.get(bucket))]
        scale = statistics.median(ratios) if ratios else 1.0
        known = {bucket: seconds * scale for bucket, seconds in recorded.items() if seconds} | learnt
        if not known:
            return {bucket: float(bucket) for bucket in recorded}
        found = {}
        for bucket in recorded:
            nearest = min(known, key=lambda other: (abs(other - bucket), other))
            found[bucket] = known[nearest] * bucket / nearest
        return found

    def _forget_splits(self, place: Place) -> None:
        self._splits = {key: split for key, split in self._splits.items() if key[0] != place}

    def _drop_largest(self, place: Place, rows: int) -> bool:
        """Stop using the largest bucket that ``rows`` uses, and all above; False when only the smallest is left."""
        by_batch = self._engines[place]
        used = max(self.split(place, rows))
        if used == min(by_batch):
            return False
        for bucket in [bucket for bucket in by_batch if bucket >= used]:
            by_batch.pop(bucket).unload()
        self._forget_splits(place)
        return True

    # ---- what the server asks -------------------------------------------------------------------------------------

    def buckets(self, component: str, size: Size | None) -> tuple[int, ...]:
        """Batch sizes that have an engine, ascending."""
        return tuple(self._engines[self._place(component, size)])

    def engine_memory(self, component: str, size: Size | None, batch: int) -> EngineMemory:
        """Bytes of one loaded engine: its own, and the weights that it shares with others."""
        return self._engines[self._place(component, size)][batch].memory()

    def manifests(self) -> list[Manifest]:
        """Of the loaded engines, once each."""
        loaded = [engine.manifest for by_batch in self._engines.values() for engine in by_batch.values()]
        return list({manifest.key: manifest for manifest in loaded}.values())

    def memory(self) -> dict[str, int]:
        """Bytes by component: weights, each counted once, and what its engines hold of their own."""
        held = {name: bank.memory() for name, bank in self._banks.items()}
        for (component, _), by_batch in self._engines.items():
            held[component] += sum(engine.memory().private for engine in by_batch.values())
        for manifest in self.manifests():
            held[manifest.spec.component] += manifest.embedded_bytes
        return held

    def unload(self) -> None:
        """Free all engines and weights."""
        for by_batch in self._engines.values():
            for engine in by_batch.values():
                engine.unload()
        self._engines.clear()
        for bank in self._banks.values():
            bank.close()
        self._banks.clear()

    def _place(self, component: str, size: Size | None) -> Place:
        place = place_of(component, size)
        if place not in self._engines:
            components = sorted({name for name, _ in self._engines})
            if component not in components:
                raise EngineError(f"unknown component {component!r}; this model has {', '.join(components)}")
            sizes = sorted(str(other) for name, other in self._engines if name == component)
            raise EngineMissing(f"no engine of {component!r} at size {place[1]}; there are {', '.join(sizes)}")
        return place


def _rows(component: str, inputs: Mapping[str, Tensor]) -> int:
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise EngineInputError(
            f"inputs of {component!r} need the same number of rows, at least 1; got {shapes or 'none'}"
        )
    return rows.pop()
