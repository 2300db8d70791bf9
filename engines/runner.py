"""Runs a checkpoint through its engines: picks buckets, pads, splits, checks, and keeps one copy of the weights."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.build import as_it_runs, loadable_options
from engines.compilers.base import Engine, EngineMemory
from engines.errors import EngineError, EngineInputError, EngineMismatch, EngineMissing
from engines.manifest import Manifest
from engines.planning import CheckpointPlan, EngineOptions, load_backbone
from engines.spec import EngineSpec, graph_digest
from engines.store import EngineStore
from engines.weights import Recipe, WeightBank
from rmd.backbones.registry import get_backbone
from rmd.checkpoint import CheckpointFolder
from rmd.size import Size

log = logging.getLogger(__name__)

Place = tuple[str, str | None]


class EngineExecutor:
    """An :class:`~rmd.backbones.base.Executor` over built engines. One thread at a time.

    Attributes:
        kind: the backend, such as "inductor"; "eager" when nothing is compiled.
    """

    def __init__(
        self, engines: Mapping[Place, Mapping[int, Engine]], banks: Mapping[str, WeightBank], kind: str, padded: bool
    ) -> None:
        self.kind = kind
        self._engines = {place: dict(sorted(by_batch.items())) for place, by_batch in engines.items()}
        self._banks = dict(banks)
        self._padded = padded
        self._splits: dict[tuple[Place, int], tuple[int, ...]] = {}
        # What the engines that hold their weights hold now, by component; a digest, None where it is not known.
        self._held = {m.spec.component: m.spec.weights for m in self.manifests() if m.holds_weights}

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

        Raises:
            BackendUnavailable: see :func:`~engines.build.loadable_options`.
            EngineMissing: engines are not built; the message holds the command that builds them.
            EngineMismatch, EngineCorrupt: an engine is not for this machine, or damaged, or holds other weights.
        """
        store = store if isinstance(store, EngineStore) else EngineStore(store)
        folder = CheckpointFolder.read(checkpoint)
        options, note = loadable_options(folder, store, backend, device, dtype, buckets)
        if note:
            log.warning(note)
        if weights_from is None:
            backbone = load_backbone(folder, options)
        else:
            kind = get_backbone(folder.backbone_name)
            backbone = kind.load(Path(weights_from), dtype=getattr(torch, options.dtype), device=device)
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
        command = plan.command(store.root)
        manifests: list[Manifest] = []
        missing: list[EngineSpec] = []
        for planned in plan.engines:
            manifest = store.get(planned.spec.key)
            if manifest is None:
                missing.append(planned.spec)
            else:
                manifests.append(manifest)
        if missing:
            raise EngineMissing(_missing_message(missing, store, plan, command))
        for manifest in manifests:
            store.check(manifest, plan.target, command)
        holding = {manifest.spec.component for manifest in manifests if manifest.holds_weights}
        if foreign and holding:
            raise EngineMismatch(
                f"{plan.options.backend} engines hold the weights of {plan.checkpoint.path} "
                f"({', '.join(sorted(holding))}) and cannot run another folder's; take --backend inductor, whose "
                f"engines hold none, or build that folder's own engines"
            )
        banks = {name: WeightBank(module) for name, module in plan.modules.items()}
        for component in holding:  # the network's own copy goes before the plans come: both may not fit
            banks[component].release(())
        _free_memory()
        engines: dict[Place, dict[int, Engine]] = {}
        for manifest in manifests:
            spec = manifest.spec
            loaded = plan.compiler.load(manifest, store.folder(spec.key), banks[spec.component])
            for batch in spec.batches:
                place = engines.setdefault((spec.component, spec.size), {})
                engine = _warm(loaded, batch, cuda_graphs, needed=not place)
                if engine is None:
                    break
                place[batch] = engine
        if plan.options.backend != "eager":
            for name, bank in banks.items():
                own = [manifest for manifest in manifests if manifest.spec.component == name]
                bank.release([Recipe.from_dict(recipe) for manifest in own for recipe in _shared_constants(manifest)])
        padded = plan.compiler.capabilities(plan.target.device).static_shapes
        return cls(engines, banks, plan.options.backend, padded)

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
                if not _is_out_of_memory(error):
                    raise
                if not self._drop_largest(place, rows):
                    raise
                log.warning("%s: out of memory at %d rows, falling back to smaller batches", component, rows)
                _free_memory()

    def _run(self, place: Place, rows: int, inputs: Mapping[str, Tensor]) -> Tensor:
        outputs = []
        start = 0
        for bucket in self.split(place, rows):
            taken = min(bucket, rows - start)
            part = {name: tensor[start : start + taken] for name, tensor in inputs.items()}
            outputs.append(self._run_bucket(self._engines[place][bucket], taken, part))
            start += taken
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run_bucket(self, engine: Engine, rows: int, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._padded and rows < engine.batch:
            # Copies of the last row, not zeros: an all-zero mask or prompt may give NaN.
            inputs = {
                name: torch.cat([tensor, tensor[-1:].expand(engine.batch - rows, *tensor.shape[1:])])
                for name, tensor in inputs.items()
            }
        return engine.run(inputs)[:rows]

    def split(self, place: Place, rows: int) -> tuple[int, ...]:
        """The buckets that serve ``rows`` rows in the least time, by the recorded latencies; largest first."""
        known = self._splits.get((place, rows))
        if known is None:
            cost = self._costs(place)
            best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
            for count in range(1, rows + 1):
                options = [
                    (best[max(0, count - bucket)][0] + seconds, (bucket, *best[max(0, count - bucket)][1]))
                    for bucket, seconds in cost.items()
                ]
                best.append(min(options, key=lambda option: (option[0], len(option[1]))))
            known = tuple(sorted(best[rows][1], reverse=True))
            self._splits[place, rows] = known
        return known

    def _costs(self, place: Place) -> dict[int, float]:
        """By bucket: recorded seconds, or rows for all where one was never timed, since the two do not compare."""
        recorded = {bucket: engine.latency_seconds for bucket, engine in self._engines[place].items()}
        timed = {bucket: seconds for bucket, seconds in recorded.items() if seconds is not None}
        return timed if len(timed) == len(recorded) else {bucket: float(bucket) for bucket in recorded}

    def _drop_largest(self, place: Place, rows: int) -> bool:
        """Stop using the largest bucket that ``rows`` uses, and all above; False when only the smallest is left."""
        by_batch = self._engines[place]
        used = max(self.split(place, rows))
        if used == min(by_batch):
            return False
        for bucket in [bucket for bucket in by_batch if bucket >= used]:
            by_batch.pop(bucket).unload()
        self._splits = {key: split for key, split in self._splits.items() if key[0] != place}
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
        folder = CheckpointFolder.read(weights) if isinstance(weights, Path | str) else None
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
        return list({engine.manifest.key: engine for engine in own if engine.manifest.holds_weights}.values())

    def _states(self, weights: Path | str | Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        if not isinstance(weights, Path | str):
            return {component: dict(state) for component, state in weights.items()}
        folder = CheckpointFolder.read(weights)
        # Plans whose weights are the folder's already are left alone: text encoders and decoder, nearly always.
        same = {name for name, held in self._held.items() if held is not None and held == _digest(folder, name)}
        # On the CPU: a second model on the device may not fit beside the first.
        options = EngineOptions(self.kind, "cpu", _dtype(self._engines))
        modules: dict[str, nn.Module] = load_backbone(folder, options).component_modules()
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

    def unload(self) -> None:
        """Free all engines and weights."""
        for by_batch in self._engines.values():
            for engine in by_batch.values():
                engine.unload()
        self._engines.clear()
        self._banks.clear()

    def _place(self, component: str, size: Size | None) -> Place:
        place = (component, None if size is None else str(size))
        if place not in self._engines:
            components = sorted({name for name, _ in self._engines})
            if component not in components:
                raise EngineError(f"unknown component {component!r}; this model has {', '.join(components)}")
            sizes = sorted(str(other) for name, other in self._engines if name == component)
            raise EngineMissing(f"no engine of {component!r} at size {place[1]}; there are {', '.join(sizes)}")
        return place


def _warm(loaded: Engine, batch: int, cuda_graphs: bool, needed: bool) -> Engine | None:
    """The engine at one of its batches, run once; None where that is out of memory and a smaller one is there."""
    try:
        engine = as_it_runs(loaded.at(batch), cuda_graphs)
        engine.warmup(1)
        return engine
    except RuntimeError as error:
        if needed or not _is_out_of_memory(error):
            raise
    log.warning("%s: no memory for batch %d, smaller ones are used", loaded.manifest.spec.title, batch)
    _free_memory()
    return None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _digest(folder: CheckpointFolder, component: str) -> str | None:
    try:
        return folder.digest(component)
    except FileNotFoundError:
        return None


def _missing_message(missing: list[EngineSpec], store: EngineStore, plan: CheckpointPlan, command: str) -> str:
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


def _shared_constants(manifest: Manifest) -> list[Mapping[str, object]]:
    return list(manifest.constants.values()) if manifest.weights_mode in ("packed", "shared") else []


def _rows(component: str, inputs: Mapping[str, Tensor]) -> int:
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise EngineInputError(
            f"inputs of {component!r} need the same number of rows, at least 1; got {shapes or 'none'}"
        )
    return rows.pop()


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "bad_alloc", "not enough memory")
    )


def _dtype(engines: Mapping[Place, Mapping[int, Engine]]) -> str:
    denoisers = [engine for (name, _), by in engines.items() if name == "denoiser" for engine in by.values()]
    return denoisers[0].manifest.spec.dtype if denoisers else "bfloat16"
