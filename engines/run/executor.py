"""Runs a checkpoint through all of its engines, and gives them other weights without building any again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.compilers.engine import Engine
from engines.errors import EngineError, EngineMismatch, EngineMissing
from engines.manifest import Manifest
from engines.plan.checkpoint import CheckpointPlan, load_backbone
from engines.plan.options import EngineOptions
from engines.run.buckets import BucketExecutor, Place
from engines.run.choice import loadable_options
from engines.run.loader import EngineLoader
from engines.spec import EngineSpec, graph_digest
from engines.store import EngineStore
from engines.weights.bank import WeightBank
from rmd.backbones.registry import get_backbone
from rmd.checkpoint import CheckpointFolder

log = logging.getLogger(__name__)


class EngineExecutor(BucketExecutor):
    """An :class:`~rmd.backbones.executor.Executor` over all engines of a checkpoint, loaded at once.

    Attributes:
        kind: the backend, such as "inductor"; "eager" when nothing is compiled.
    """

    def __init__(
        self, engines: Mapping[Place, Mapping[int, Engine]], banks: Mapping[str, WeightBank], kind: str, padded: bool
    ) -> None:
        super().__init__(engines, banks, kind, padded)
        self._decoder: str | None = None  # what was asked for, and is asked for again of other weights
        self._device = next((m.spec.target.device for m in self.manifests()), "cpu")
        # What the engines that hold their weights hold now, by component; a digest, None where it is not known.
        self._held = {m.spec.component: m.spec.weights for m in self.manifests() if m.weights_mode.inside}

    @classmethod
    def open(
        cls,
        checkpoint: Path | str,
        store: EngineStore | Path | str,
        backend: str = "auto",
        device: str = "cpu",
        *,
        dtype: str = "auto",
        buckets: Sequence[int] | None = None,
        weights_from: Path | str | None = None,
        cuda_graphs: bool = True,
        decoder: Path | str | None = None,
    ) -> EngineExecutor:
        """Load every engine of a checkpoint, warmed up.

        Args:
            checkpoint: folder.
            store: of the built engines.
            backend: a backend's name or "auto".
            device, dtype, buckets: as they were built with.
            weights_from: another folder of the same architecture, such as the teacher's; engines do not depend on
                weights that they do not hold, so they serve both. Those that do hold them are refused.
            cuda_graphs: replay each engine as one CUDA graph (on CUDA).
            decoder: a small decoder's folder or "full"; what the checkpoint names when None.

        Raises:
            BackendUnavailable: see :func:`~engines.run.choice.loadable_options`.
            EngineMissing: engines are not built; the message holds the command that builds them.
            EngineMismatch, EngineCorrupt: an engine is not for this machine, or damaged, or holds other weights.
        """
        store = store if isinstance(store, EngineStore) else EngineStore(store)
        folder = CheckpointFolder.read(checkpoint).with_decoder(decoder)
        options, note = loadable_options(folder, store, backend, device, dtype, buckets)
        if note:
            log.warning(note)
        if weights_from is None:
            backbone = load_backbone(folder, options)
        else:
            kind = get_backbone(folder.backbone_name)
            backbone = kind.load(
                Path(weights_from), dtype=getattr(torch, options.dtype), device=device, decoder=folder.decoder_path
            )
        plan = CheckpointPlan(folder, options, backbone)
        foreign = weights_from is not None and Path(weights_from).resolve() != folder.path.resolve()
        return cls.from_plan(plan, store, cuda_graphs=cuda_graphs, foreign=foreign)

    @classmethod
    def from_plan(
        cls, plan: CheckpointPlan, store: EngineStore, *, cuda_graphs: bool = True, foreign: bool = False
    ) -> EngineExecutor:
        """As :meth:`open`, for a plan whose backbone has its weights; those weights may be taken apart here.

        Args:
            foreign: those weights are not the checkpoint's own.
        """
        loader = EngineLoader(plan, store, foreign=foreign, cuda_graphs=cuda_graphs)
        manifests: list[Manifest] = []
        missing: list[EngineSpec] = []
        for planned in plan.engines:
            manifest = loader.find(planned)
            if manifest is None:
                missing.append(planned.spec)
            else:
                manifests.append(manifest)
        if missing:
            raise EngineMissing(missing_message(missing, store, plan))
        loader.check(manifests)
        for component in {manifest.spec.component for manifest in manifests if manifest.weights_mode.inside}:
            loader.make_room(component)
        engines: dict[Place, dict[int, Engine]] = {}
        for manifest in manifests:
            place = engines.setdefault((manifest.spec.component, manifest.spec.size), {})
            place |= loader.load(manifest, needed=not place)
        for name in loader.banks:
            loader.release(name, [manifest for manifest in manifests if manifest.spec.component == name])
        executor = cls(engines, loader.banks, plan.options.backend, loader.padded)
        executor._decoder = plan.checkpoint.chosen_decoder
        return executor

    # ---- weights --------------------------------------------------------------------------------------------------

    def refit(self, weights: Path | str | Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace the weights in place: no engine is built or loaded again.

        Args:
            weights: a checkpoint folder of the same architecture, or component -> parameters by name.

        Raises:
            EngineError: the weights do not fit. All components are checked before any is changed.
        """
        states = self._states(weights)
        for component, state in states.items():
            if component not in self._banks:
                raise EngineError(f"unknown component {component!r}; this model has {', '.join(self._banks)}")
            for engine in self._holding(component):
                engine.check_refit(state)
            self._banks[component].check(state)
        folder = CheckpointFolder.read(weights).with_decoder(self._decoder) if isinstance(weights, Path | str) else None
        for component, state in states.items():
            if component not in self._held:
                self._banks[component].refit(state)
                continue
            self._held[component] = None  # until all of its plans have the new ones
            for engine in self._holding(component):
                engine.refit(state)
            for (name, _), by_batch in self._engines.items():
                for engine in by_batch.values() if name == component else ():
                    engine.on_refit()
            self._held[component] = None if folder is None else _digest(folder, component)

    def _holding(self, component: str) -> list[Engine]:
        """One engine of every plan of a component that holds its weights."""
        own = [engine for place, by in self._engines.items() if place[0] == component for engine in by.values()]
        return list({engine.manifest.key: engine for engine in own if engine.manifest.weights_mode.inside}.values())

    def _states(self, weights: Path | str | Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        if not isinstance(weights, Path | str):
            return {component: dict(state) for component, state in weights.items()}
        folder = CheckpointFolder.read(weights).with_decoder(self._decoder)
        # Plans whose weights are the folder's already are left alone: text encoders and decoder, nearly always.
        same = {name for name, held in self._held.items() if held is not None and held == _digest(folder, name)}
        # On the CPU: a second model on the device may not fit beside the first.
        options = EngineOptions(self.kind, "cpu", _dtype(self._engines))
        modules: dict[str, nn.Module] = load_backbone(folder, options, for_device=self._device).component_modules()
        states = {}
        for name, module in modules.items():
            if name not in self._banks or name in same:
                continue
            graphs = {manifest.spec.graph for manifest in self.manifests() if manifest.spec.component == name}
            if graphs != {graph_digest(module)}:
                raise EngineMismatch(
                    f"{weights}: its {name} is another network or has other settings (a scaling factor, say) than the "
                    f"loaded engines; build engines for it (rmd build)"
                )
            tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
            states[name] = dict(tensors)
        return states


def _digest(folder: CheckpointFolder, component: str) -> str | None:
    try:
        return folder.digest(component)
    except FileNotFoundError:
        return None


def missing_message(missing: Sequence[EngineSpec], store: EngineStore, plan: CheckpointPlan) -> str:
    """Say which of a plan's engines are not in the store, what builds them, and what those there were built for."""
    command = plan.command(store.root)
    count = f"{len(missing)} of {len(plan.engines)}"
    message = f"{count} engines are not in {store.root} ({missing[0].title}, ...). Build them: {command}"
    wanted = {(spec.title, spec.backend): spec for spec in missing}
    others = [
        manifest.spec.differences(wanted[manifest.spec.title, manifest.spec.backend])
        for manifest in store.list()
        if (manifest.spec.title, manifest.spec.backend) in wanted
    ]
    # The nearest one: the fewer differences, the likelier it is the engine that was meant.
    reasons = min((differences for differences in others if differences), key=len, default=None)
    return f"{message}. Engines there were built for {'; '.join(reasons)}" if reasons else message


def _dtype(engines: Mapping[Place, Mapping[int, Engine]]) -> str:
    denoisers = [engine for (name, _), by in engines.items() if name == "denoiser" for engine in by.values()]
    return denoisers[0].manifest.spec.dtype if denoisers else "bfloat16"
