"""From the store into service: an engine is checked, loaded over the shared weights, and run once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch

from engines.compilers.engine import Engine
from engines.errors import EngineError, EngineMismatch
from engines.manifest import Manifest
from engines.plan.checkpoint import CheckpointPlan, PlannedEngine
from engines.run.cuda_graphs import as_it_runs
from engines.run.exhaustion import free_memory, is_out_of_memory
from engines.stopwatch import Stopwatch
from engines.store import EngineStore
from engines.weights.bank import WeightBank
from engines.weights.recipes import Recipe

log = logging.getLogger(__name__)


class EngineLoader:
    """Loads engines of one plan over one copy of its weights.

    Args:
        plan: its backbone has its weights; they may be taken apart (:meth:`release`).
        store: of the built engines.
        foreign: those weights are not the checkpoint's own, such as the teacher's.
        cuda_graphs: replay each engine as one CUDA graph (on CUDA).
        banks: of another loader of the same weights; None: own ones.
        patience: seconds that a run may take for an engine to be made on the spot. Recording such a one saves the
            launching of its kernels, which is nothing beside a long run; a film's step would be run for minutes.

    Attributes:
        banks: the weights of each component.
        padded: engines take exactly their batch.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        store: EngineStore,
        *,
        foreign: bool = False,
        cuda_graphs: bool = True,
        banks: dict[str, WeightBank] | None = None,
        patience: float = math.inf,
    ) -> None:
        self.plan = plan
        self.store = store
        self.banks = {name: WeightBank(module) for name, module in plan.modules.items()} if banks is None else banks
        self.padded = plan.compiler.capabilities(plan.target.device).static_shapes
        self._foreign = foreign
        self._patience = patience if plan.compiler.on_the_spot(plan.target.device) else math.inf
        self._cuda_graphs = cuda_graphs
        self._command = plan.command(store.root)
        self._made: dict[str, Manifest] = {}

    def find(self, planned: PlannedEngine) -> Manifest | None:
        """A planned engine's record; None where it has to be built first.

        Raises:
            EngineCorrupt: its manifest cannot be read.
        """
        key, compiler = planned.spec.key, self.plan.compiler
        if key not in self._made:
            manifest = self.store.get(key)
            if manifest is not None or not compiler.on_the_spot(self.plan.target.device):
                return manifest
            folder = self.store.folder(key)  # which it does not need
            self._made[key] = compiler.build(self.plan.modules[planned.component], planned.spec, folder)
        return self._made[key]

    def check(self, manifests: Iterable[Manifest]) -> None:
        """Whether the engines fit this machine, are whole, and may run these weights.

        Raises:
            EngineMismatch, EngineCorrupt: the first that does not or is not; the message says what to do.
        """
        manifests = list(manifests)
        for manifest in manifests:
            self.store.check(manifest, self.plan.target, self._command)
        holding = sorted({manifest.spec.component for manifest in manifests if manifest.weights_mode.inside})
        if self._foreign and holding:
            raise EngineMismatch(
                f"{self.plan.options.backend} engines hold the weights of {self.plan.checkpoint.path} "
                f"({', '.join(holding)}) and cannot run another folder's; take --backend inductor, whose "
                f"engines hold none, or build that folder's own engines"
            )

    def load(self, manifest: Manifest, needed: bool = True) -> dict[int, Engine]:
        """A checked engine at each of its batches, each run once.

        Args:
            manifest: of the engine.
            needed: its smallest batch has to fit; else it may have none.

        Returns:
            By batch; the batches for which there is no memory, or no patience, are left out.

        Raises:
            EngineError: not even the smallest batch is worth it.
        """
        loaded = self.plan.compiler.load(manifest, self.store.folder(manifest.key), self.banks[manifest.spec.component])
        found: dict[int, Engine] = {}
        for batch in manifest.spec.batches:
            if self._patience < math.inf and (seconds := self._seconds(loaded.at(batch))) > self._patience:
                if not found:
                    raise EngineError(f"a run takes {seconds:.1f} s, beside which launching its kernels is nothing")
                break
            engine = self._warm(loaded, batch, needed and not found)
            if engine is None:
                break
            found[batch] = engine
        return found

    def _seconds(self, engine: Engine) -> float:
        """Of one run as it is, without being recorded, the second after all that is done lazily."""
        try:
            engine.warmup(1)
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            watch = Stopwatch()
            engine.warmup(1)
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return 0.0  # told when it is warmed
        return watch.seconds

    def _warm(self, loaded: Engine, batch: int, needed: bool) -> Engine | None:
        """The engine at one of its batches, run once; None where that is out of memory and a smaller one is there."""
        try:
            engine = as_it_runs(loaded.at(batch), self._cuda_graphs)
            engine.warmup(1)
            return engine
        except RuntimeError as error:
            if needed or not is_out_of_memory(error):
                raise
        log.warning("%s: no memory for batch %d, smaller ones are used", loaded.manifest.spec.title, batch)
        free_memory()
        return None

    def release(self, component: str, manifests: Iterable[Manifest]) -> None:
        """Drop the weights of a component that none of ``manifests``, all that it has, reads as they are."""
        if self.plan.options.backend != "eager":
            shared = [recipe for manifest in manifests for recipe in _shared_constants(manifest)]
            self.banks[component].release([Recipe.from_dict(recipe) for recipe in shared])

    def make_room(self, component: str) -> None:
        """Drop a network's own copy before engines come that hold their weights: both may not fit."""
        self.banks[component].release(())
        free_memory()


def _shared_constants(manifest: Manifest) -> list[Mapping[str, object]]:
    return list(manifest.constants.values()) if manifest.weights_mode.reads_bank else []
