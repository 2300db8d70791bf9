"""Serves at once: starts eager, and takes an engine into service whenever one has come into the store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from engines.accuracy import check_accuracy, relative_l2
from engines.buckets import BucketExecutor, Place, place_of
from engines.compilers.base import Engine
from engines.errors import EngineCorrupt, EngineError, EngineMismatch
from engines.exhaustion import free_memory
from engines.loader import EngineLoader
from engines.manifest import MANIFEST, Manifest
from engines.planning import CheckpointPlan, PlannedEngine
from engines.store import EngineStore
from rmd.backbones.base import EagerExecutor
from rmd.size import Size

log = logging.getLogger(__name__)


class LiveExecutor(BucketExecutor):
    """An :class:`~rmd.backbones.base.Executor` that runs eager what has no engine yet. One thread at a time.

    Packed constants and eager weights coexist until all engines of a component are in service; then the weights that
    none of them reads are dropped.

    Args:
        plan: its backbone has its weights; they may be taken apart here.
        store: into which somebody else may be building meanwhile.
        foreign: those weights are not the checkpoint's own, such as the teacher's.
        cuda_graphs: replay each engine as one CUDA graph (on CUDA).
        keep_eager: components whose network stays whole, so that it can be timed eager (:meth:`run_eager`).
        wanted: which places get engines, (component, size in pixels or None); all of the plan where it is None. A
            component with none of them stays eager; one with some runs nowhere else once those are in service, but it
            is in ``keep_eager``.
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
    ) -> None:
        self._loader = EngineLoader(plan, store, foreign=foreign, cuda_graphs=cuda_graphs)
        super().__init__({}, self._loader.banks, plan.options.backend, self._loader.padded)
        self._plan = plan
        self._store = store
        self._keep_eager = keep_eager
        self._eager = EagerExecutor(plan.modules)
        places = None if wanted is None else set(wanted)
        engines = sorted(plan.engines, key=plan.serving_order)
        self._planned = [e for e in engines if places is None or place_of(e.component, e.size) in places]
        self._engines = {place: {} for place in self.planned()}
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
        for planned in self._planned:
            key = planned.spec.key
            stamp = None if key in self._taken else self._stamp(planned)
            if stamp is None or stamp == self._refused.get(key):
                continue
            if self._adopt(planned, compare=True):
                self._release_complete(planned.component)
                return place_of(planned.component, planned.size)
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
        here = [e for e in self._planned if e.spec.key not in self._taken and self._stamp(e) is not None]
        self._make_room(here)
        count = 0
        for planned in here:
            report(count, len(here), planned.spec.title)
            stamp = self._stamp(planned)
            if self._adopt(planned, False):
                count += 1
            elif stamp is not None:
                self._refused[planned.spec.key] = stamp
        for component in {planned.component for planned in here}:
            self._release_complete(component)
        return count

    def _stamp(self, planned: PlannedEngine) -> tuple[int, int] | None:
        """What changes when an engine is built anew; None where there is none."""
        try:
            found = (self._store.folder(planned.spec.key) / MANIFEST).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _adopt(self, planned: PlannedEngine, compare: bool) -> bool:
        place = place_of(planned.component, planned.size)
        engines: dict[int, Engine] = {}
        try:
            manifest = self._store.get(planned.spec.key)
            if manifest is None:
                return False
            self._loader.check([manifest])
            engines = self._loader.load(manifest, needed=not self._engines[place])
            if compare and planned.component not in self._released:
                for engine in engines.values():
                    check_accuracy(manifest.spec, relative_l2(engine, *self._reference(planned)))
        # Compiled code and its loader raise what they like, and a request must not pay for it.
        except Exception as error:
            reason = str(error) or type(error).__name__
            log.warning("engine %s is not used, its station goes on as it is: %s", planned.spec.title, reason)
        else:
            self._engines[place] = dict(sorted({**self._engines[place], **engines}.items()))
            self._taken.add(planned.spec.key)
            self._forget_splits(place)
            return True
        for engine in engines.values():
            engine.unload()
        engines.clear()
        free_memory()
        return False

    def _reference(self, planned: PlannedEngine) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network and its inputs in service at the widest batch of the place, made once."""
        place = place_of(planned.component, planned.size)
        if place not in self._typical:
            widest = max(self.planned()[place])
            self._typical[place] = self._plan.typical_inputs(planned.component, planned.size, widest)
        return self._eager.modules[planned.component], self._typical[place]

    def _make_room(self, here: list[PlannedEngine]) -> None:
        """Engines that hold their weights do not share; where all are there and sound, the network's own copy goes."""
        found: dict[str, list[Manifest]] = {}
        for planned in here:
            if planned.spec.weights_mode in ("embedded", "refittable") and planned.component not in self._keep_eager:
                try:
                    manifest = self._store.get(planned.spec.key)
                    if manifest is not None:
                        self._loader.check([manifest])
                        found.setdefault(planned.component, []).append(manifest)
                except (EngineCorrupt, EngineMismatch):
                    continue  # told when it is its turn
        for component, manifests in found.items():
            if len(manifests) == sum(planned.component == component for planned in self._planned):
                self._loader.make_room(component)
                self._released.add(component)

    def _release_complete(self, component: str) -> None:
        """Drop a component's weights that no engine reads, once all of its engines are in service."""
        own = [planned for planned in self._planned if planned.component == component]
        if component in self._keep_eager or self.kind == "eager":
            return
        if own and all(planned.spec.key in self._taken for planned in own):
            manifests = [manifest for manifest in self.manifests() if manifest.spec.component == component]
            self._loader.release(component, manifests)
            self._released.add(component)
            self._typical = {place: inputs for place, inputs in self._typical.items() if place[0] != component}
            free_memory()

    # ---- what the server asks -------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether every planned engine is in service."""
        return len(self._taken) == len(self._planned)

    def buckets(self, component: str, size: Size | None) -> tuple[int, ...]:
        """Batch sizes that have an engine, ascending; empty while eager."""
        return tuple(self._engines.get(place_of(component, size), ()))

    def places(self) -> dict[Place, tuple[int, ...]]:
        """Every place that is to have engines, with the batch sizes that have one by now."""
        return {place: tuple(by_batch) for place, by_batch in self._engines.items()}

    def planned(self) -> dict[Place, tuple[int, ...]]:
        """Every place that is to have engines, with all their batch sizes."""
        found: dict[Place, list[int]] = {}
        for planned in self._planned:
            found.setdefault(place_of(planned.component, planned.size), []).extend(planned.spec.batches)
        return {place: tuple(sorted(batches)) for place, batches in found.items()}

    def unload(self) -> None:
        """Free all engines and weights."""
        super().unload()
        self._loader.banks.clear()
        self._eager.modules.clear()
        self._typical.clear()
