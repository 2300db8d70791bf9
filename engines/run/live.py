"""Serves at once: starts eager, and takes an engine into service whenever one has come into the store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from engines.compilers.engine import Engine
from engines.errors import EngineCorrupt, EngineError, EngineMismatch
from engines.manifest import MANIFEST, Manifest
from engines.plan.checkpoint import CheckpointPlan, PlannedEngine
from engines.run.accuracy import check_accuracy, relative_l2
from engines.run.buckets import BucketExecutor, Place, place_of
from engines.run.exhaustion import free_memory
from engines.run.loader import EngineLoader
from engines.spec import WeightsMode
from engines.store import EngineStore
from rmd.backbones.executor import EagerExecutor
from rmd.size import Size

log = logging.getLogger(__name__)

RECORDED_SECONDS = 0.5
"""What takes longer than this is not recorded on the spot: see :class:`EngineLoader`."""


@dataclass(frozen=True)
class _Candidate:
    """An engine that may come into service: of which plan, best first, and where."""

    rung: int
    planned: PlannedEngine
    place: Place

    @property
    def component(self) -> str:
        return self.planned.component

    @property
    def key(self) -> str:
        return self.planned.spec.key


class LiveExecutor(BucketExecutor):
    """An :class:`~rmd.backbones.executor.Executor` that runs eager what has no engine yet. One thread at a time.

    Packed constants and eager weights coexist until all engines of a component are in service; then the weights that
    none of them reads are dropped. A batch at a place takes the engine of the best backend that has one.

    Args:
        plan: its backbone has its weights; they may be taken apart here.
        store: into which somebody else may be building meanwhile.
        foreign: those weights are not the checkpoint's own, such as the teacher's.
        cuda_graphs: replay each engine as one CUDA graph (on CUDA).
        keep_eager: components whose network stays whole, so that it can be timed eager (:meth:`run_eager`).
        wanted: which places get engines, (component, size in pixels or None); all of the plan where it is None. A
            component with none of them stays eager; one with some runs nowhere else once those are in service, but it
            is in ``keep_eager``.
        below: the same checkpoint's plans with the backends that stand in where the first has no engine (yet), best
            first; of the same backbone.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        store: EngineStore,
        *,
        foreign: bool = False,
        cuda_graphs: bool = True,
        keep_eager: frozenset[str] = frozenset(),
        wanted: Iterable[Place] | None = None,
        below: Sequence[CheckpointPlan] = (),
    ) -> None:
        load = partial(EngineLoader, store=store, foreign=foreign, cuda_graphs=cuda_graphs, patience=RECORDED_SECONDS)
        first = load(plan)
        self._loaders = [first, *(load(other, banks=first.banks) for other in below)]
        super().__init__({}, first.banks, plan.options.backend, first.padded)
        self._plan = plan
        self._store = store
        self._keep_eager = keep_eager
        self._eager = EagerExecutor(plan.modules)
        places = None if wanted is None else set(wanted)
        self._planned = [
            _Candidate(rung, planned, place_of(planned.component, planned.size))
            for rung, each in enumerate((plan, *below))
            for planned in sorted(each.engines, key=each.serving_order)
            if places is None or place_of(planned.component, planned.size) in places
        ]
        self._engines = {place: {} for place in self.planned()}
        self._rungs: dict[tuple[Place, int], int] = {}  # which backend serves a batch of a place
        self._taken: set[str] = set()
        self._released: set[str] = set()
        self._refused: dict[str, tuple[int, int]] = {}
        self._typical: dict[Place, dict[str, Tensor]] = {}

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """The component's output for any number of rows: through its engines at that size where any is loaded.

        Raises:
            EngineError: no such component, or (once its weights were dropped) no such size.
            EngineInputError: a name, shape or dtype is wrong, or the inputs' rows disagree.
        """
        if self._engines.get(place_of(component, size)) or component in self._released:
            return super().run(component, size, inputs)
        return self.run_eager(component, size, inputs)

    def run_eager(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same without engines.

        Raises:
            EngineError: no such component, or its weights were dropped (see ``keep_eager``).
        """
        if component not in self._eager.modules:
            raise EngineError(f"unknown component {component!r}; this model has {', '.join(self._eager.modules)}")
        if component in self._released:
            raise EngineError(f"the weights of {component!r} moved into its engines; it cannot run eager any more")
        return self._eager.run(component, size, inputs)

    # ---- taking engines over ----------------------------------------------------------------------------------------

    def adopt_next(self) -> Place | None:
        """Put one engine into service that has come into the store; serving pauses for the while.

        It is loaded, compared with eager as its builder did, and run once. One that is damaged, not for this machine or
        wrong is logged once and passed over, until another is built in its place.

        Returns:
            Its place; None if there is nothing new.
        """
        for candidate in self._planned:
            key = candidate.key
            stamp = self._stamp(candidate) if self._is_useful(candidate) else None
            if stamp is None or stamp == self._refused.get(key):
                continue
            if self._adopt(candidate, compare=True):
                self._release_complete(candidate.component)
                return candidate.place
            self._refused[key] = stamp
        return None

    def adopt_all(self, report: Callable[[int, int, str], None] = lambda done, total, title: None) -> int:
        """Put all engines into service that the store holds, at the start, when nobody waits.

        Their builder compared them with eager, and their files are read against their digests; they are not compared
        again.

        Args:
            report: told (how many are in service, how many there are, what comes next).

        Returns:
            How many were taken.
        """
        here = [each for each in self._planned if self._is_useful(each) and self._stamp(each) is not None]
        self._make_room(here)
        count = 0
        for candidate in here:
            if not self._is_useful(candidate):  # a better one has been taken
                continue
            report(count, len(here), candidate.planned.spec.title)
            stamp = self._stamp(candidate)
            if self._adopt(candidate, False):
                count += 1
            elif stamp is not None:
                self._refused[candidate.key] = stamp
        for component in {candidate.component for candidate in here}:
            self._release_complete(component)
        return count

    def _is_useful(self, candidate: _Candidate) -> bool:
        """Whether it is not in service, can be, and is better than what is."""
        runs_the_network = candidate.planned.spec.weights_mode is WeightsMode.MODULE
        if candidate.key in self._taken or (runs_the_network and candidate.component in self._released):
            return False
        place, none = candidate.place, len(self._loaders)
        wanted = set(candidate.planned.spec.batches) & set(self.planned()[place])
        return any(self._rungs.get((place, batch), none) > candidate.rung for batch in wanted)

    def _stamp(self, candidate: _Candidate) -> tuple[int, int] | None:
        """What changes when an engine is built anew; None where there is none."""
        plan = self._loaders[candidate.rung].plan
        try:
            found = (self._store.folder(candidate.key) / MANIFEST).stat()
        except OSError:
            return (0, 0) if plan.compiler.on_the_spot(plan.target.device) else None
        return found.st_ino, found.st_mtime_ns

    def _adopt(self, candidate: _Candidate, compare: bool) -> bool:
        planned, place, loader = candidate.planned, candidate.place, self._loaders[candidate.rung]
        engines: dict[int, Engine] = {}
        try:
            manifest = loader.find(planned)
            if manifest is None:
                return False
            loader.check([manifest])
            engines = loader.load(manifest, needed=not self._engines[place])
            if compare and planned.component not in self._released:
                for engine in engines.values():
                    check_accuracy(manifest.spec, relative_l2(engine, *self._reference(planned)))
        # Compiled code and its loader raise what they like, and a request must not pay for it.
        except Exception as error:
            reason = str(error) or type(error).__name__
            log.warning("engine %s is not used, its station goes on as it is: %s", planned.spec.title, reason)
        else:
            self._put_in_service(candidate, engines)
            return True
        for engine in engines.values():
            engine.unload()
        engines.clear()
        free_memory()
        return False

    def _put_in_service(self, candidate: _Candidate, engines: dict[int, Engine]) -> None:
        place, serving = candidate.place, dict(self._engines[candidate.place])
        for batch in candidate.planned.spec.batches:
            if self._rungs.get((place, batch), len(self._loaders)) <= candidate.rung:
                if batch in engines:
                    engines.pop(batch).unload()
                continue
            self._rungs[place, batch] = candidate.rung
            former = serving.pop(batch, None)
            if former is not None:
                former.unload()
            if batch in engines:
                serving[batch] = engines[batch]
        self._engines[place] = dict(sorted(serving.items()))
        self._taken.add(candidate.key)
        self._forget_splits(place)

    def _reference(self, planned: PlannedEngine) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network and its inputs in service at the widest batch of the place, made once."""
        place = place_of(planned.component, planned.size)
        if place not in self._typical:
            widest = max(self.planned()[place])
            self._typical[place] = self._plan.typical_inputs(planned.component, planned.size, widest)
        return self._eager.modules[planned.component], self._typical[place]

    def _make_room(self, here: list[_Candidate]) -> None:
        """Engines that hold their weights do not share; where all are there and sound, the network's own copy goes."""
        found: dict[str, list[Manifest]] = {}
        for candidate in here:
            holding = candidate.planned.spec.weights_mode.inside and not candidate.rung
            if holding and candidate.component not in self._keep_eager:
                try:
                    manifest = self._store.get(candidate.key)
                    if manifest is not None:
                        self._loaders[0].check([manifest])
                        found.setdefault(candidate.component, []).append(manifest)
                except (EngineCorrupt, EngineMismatch):
                    continue  # told when it is its turn
        for component, manifests in found.items():
            first = [each for each in self._planned if each.component == component and not each.rung]
            if len(manifests) == len(first):
                self._loaders[0].make_room(component)
                self._released.add(component)

    def _release_complete(self, component: str) -> None:
        """Drop a component's weights that no engine reads, once all of its batches have an engine that needs no
        network."""
        if component in self._keep_eager:
            return
        own = {place: batches for place, batches in self.planned().items() if place[0] == component}
        if own and all(self._is_compiled(place, batch) for place, batches in own.items() for batch in batches):
            manifests = [manifest for manifest in self.manifests() if manifest.spec.component == component]
            if any(manifest.weights_mode is WeightsMode.MODULE for manifest in manifests):
                return
            self._loaders[0].release(component, manifests)
            self._released.add(component)
            self._typical = {place: inputs for place, inputs in self._typical.items() if place[0] != component}
            free_memory()

    def _is_compiled(self, place: Place, batch: int) -> bool:
        """Whether a batch is served by what it was to be served by: not by what stands in until that is built."""
        rung = self._rungs.get((place, batch))
        if rung is None:
            return False
        plan = self._loaders[rung].plan
        return rung == 0 or not plan.compiler.on_the_spot(plan.target.device)

    # ---- what the server asks -------------------------------------------------------------------------------------

    @property
    def serving(self) -> str:
        """The backend that serves most batches of the denoiser by now, or of the others while it has no engine; "eager"
        while nothing has."""
        rungs = [rung for (place, _), rung in self._rungs.items() if place[0] == "denoiser"] or [*self._rungs.values()]
        if not rungs:
            return "eager"
        return self._loaders[max(sorted(set(rungs), reverse=True), key=rungs.count)].plan.options.backend

    @property
    def complete(self) -> bool:
        """Whether nothing is to be built: every batch at every place is served by an engine that was built for it, or
        by one that is made on the spot where that is the first choice."""
        first = self._plan
        if first.compiler.on_the_spot(first.target.device):
            return True
        return all(self._is_compiled(place, batch) for place, batches in self.planned().items() for batch in batches)

    def buckets(self, component: str, size: Size | None) -> tuple[int, ...]:
        """Batch sizes that have an engine, ascending; empty while eager."""
        return tuple(self._engines.get(place_of(component, size), ()))

    def places(self) -> dict[Place, tuple[int, ...]]:
        """Every place that is to have engines, with the batch sizes that have one by now."""
        return {place: tuple(by_batch) for place, by_batch in self._engines.items()}

    def planned(self) -> dict[Place, tuple[int, ...]]:
        """Every place that is to have engines, with all their batch sizes."""
        found: dict[Place, list[int]] = {}
        for candidate in self._planned:
            if not candidate.rung:
                found.setdefault(candidate.place, []).extend(candidate.planned.spec.batches)
        return {place: tuple(sorted(batches)) for place, batches in found.items()}

    def unload(self) -> None:
        """Free all engines and weights."""
        super().unload()
        self._loaders[0].banks.clear()
        self._eager.modules.clear()
        self._typical.clear()
