"""Which engines a checkpoint needs, known without building any."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.compilers import get_compiler
from engines.compilers.base import Compiler, EngineRequest
from engines.compilers.examples import example_tensors
from engines.errors import EngineError
from engines.plan.memory import MemoryPlan, available_bytes, meta_copy, weight_bytes, workspace_bytes
from engines.plan.options import EngineOptions
from engines.spec import EngineSpec
from engines.store import EngineStore
from engines.target import this_machine
from rmd.backbones.base import Backbone, weights_dtype
from rmd.backbones.layout import lay_out
from rmd.backbones.registry import get_backbone
from rmd.checkpoint import CheckpointFolder
from rmd.size import Size

log = logging.getLogger(__name__)

# Of the largest component, beside the loaded model: on the CPU each worker holds the model, a copy with random weights
# and the packed constants.
_BUILDING_COPIES = {"cpu": 3, "cuda": 1}
_PROMPTS = ("a red rocket", "a blue fish under water", "two green trees", "a smiling face", "a yellow star")


@dataclass(frozen=True)
class PlannedEngine:
    """One engine to build or to load."""

    component: str
    size: Size | None
    spec: EngineSpec


class CheckpointPlan:
    """The engines of all schedules of a checkpoint, the teacher's included (it has the student's architecture).

    Args:
        checkpoint: its folder, read and checked.
        options: see :class:`EngineOptions`.
        backbone: already loaded; None loads one without weights.
    """

    def __init__(self, checkpoint: CheckpointFolder, options: EngineOptions, backbone: Backbone | None = None) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self._given = backbone
        if backbone is not None:
            lay_out(backbone.component_modules().get("decoder"), options.device)
        self.compiler: Compiler = get_compiler(options.backend)
        self.target = this_machine(options.device)
        self._workspaces: dict[tuple[str, Size | None], int] = {}

    @classmethod
    def read(cls, folder: Path | str, options: EngineOptions, decoder: Path | str | None = None) -> CheckpointPlan:
        """The plan of a checkpoint folder.

        Args:
            folder: the checkpoint's.
            options: see :class:`EngineOptions`.
            decoder: see :meth:`~rmd.checkpoint.CheckpointFolder.with_decoder`.
        """
        return cls(CheckpointFolder.read(folder).with_decoder(decoder), options)

    @cached_property
    def backbone(self) -> Backbone:
        """The model, possibly without weights (on the meta device)."""
        if self._given is not None:
            return self._given
        return load_backbone(self.checkpoint, self.options, weights=False)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The components."""
        return self.backbone.component_modules()

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes at which a schedule of the checkpoint runs, ascending; the teacher runs at the last."""
        found = {size for cascade in self.checkpoint.cascades.values() for size in (*cascade.sizes, cascade.full_size)}
        return tuple(sorted(found))

    def places(self) -> Iterator[tuple[str, Size | None, tuple[int, ...]]]:
        """(component, size, batches) of every engine."""
        profiles = self.compiler.capabilities(self.target.device).profiles
        for component, size, buckets in self._buckets():
            yield from ((component, size, part) for part in ([buckets] if profiles else [(one,) for one in buckets]))

    def _buckets(self) -> Iterator[tuple[str, Size | None, tuple[int, ...]]]:
        """(component, size, all its batches)."""
        buckets = self.options.buckets
        for component in self.modules:
            if component == "denoiser":
                yield from ((component, size, buckets) for size in self.sizes)
            elif component == "decoder":
                # Lower sizes are only decoded for previews.
                yield from ((component, size, buckets[::2][:2]) for size in self.sizes[:-1])
                yield component, self.sizes[-1], buckets[::2]
            else:
                one = self.compiler.text_in_one_batch(self.spec(component, None, buckets[0]))
                # The smallest: a prompt comes alone more often than not, and waits for no rows that are padding.
                yield component, None, buckets[:1] if one else buckets[::2]

    @cached_property
    def engines(self) -> tuple[PlannedEngine, ...]:
        """Every engine, in the order in which they are worth having: small batches first."""
        planned = [
            PlannedEngine(component, size, self.spec(component, size, *batches))
            for component, size, batches in self.places()
        ]
        return tuple(sorted(planned, key=lambda engine: engine.spec.batch))

    def serving_order(self, engine: PlannedEngine) -> tuple[int, int, int]:
        """Sorts engines by what a server gains: where a picture of the default schedule spends most, one row first."""
        cascade = self.checkpoint.default_cascade
        steps = [step.size for step in cascade.steps]
        first = engine.spec.batches[0] == self.options.buckets[0]
        spent = 0
        if engine.component == "denoiser":
            rank = (0 if first else 2) if engine.size in steps else 5
            spent = steps.count(engine.size) * self.backbone.tokens(engine.size) if engine.size in steps else 0
        elif engine.component == "decoder":
            rank = (1 if first else 3) if engine.size == cascade.full_size else 6
        else:
            rank = 4
        return rank, engine.spec.batch, -spent

    def spec(self, component: str, size: Size | None, *batches: int) -> EngineSpec:
        """The spec of one engine that serves these batches.

        Raises:
            EngineError: the model has no such component.
        """
        if component not in self.modules:
            raise EngineError(f"unknown component {component!r}; this model has {', '.join(self.modules)}")
        module = self.modules[component]
        return self.compiler.plan(
            EngineRequest(
                component=component,
                size=None if size is None else str(size),
                module=module,
                inputs=self.backbone.example_inputs(component, size, max(batches)),
                target=self.target,
                dtype=str(weights_dtype(module)).removeprefix("torch."),
                weights=self._weights(component),
                batches=batches,
            )
        )

    def typical_inputs(self, component: str, size: Size | None, batch: int) -> dict[str, Tensor]:
        """What the component meets in service, for comparing an engine with eager: real prompts, noise at t = 0.5.

        On random numbers as text, a bf16 network is further from itself in float32 than engines are from it on prompts.
        Needs a backbone with weights.
        """
        if component not in ("denoiser", "decoder"):
            return example_tensors(self.spec(component, size, batch), self.options.device)
        # The seed is every generator's: that of the GPU is given back too.
        on_gpu = [torch.cuda.current_device()] if self.options.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=on_gpu):
            torch.manual_seed(0)
            inputs = self.backbone.example_inputs(component, size, batch)
        if component == "denoiser":
            prompts = [_PROMPTS[index % len(_PROMPTS)] for index in range(batch)]
            for name, value in self.backbone.encode_prompts(prompts).items():
                inputs[name] = value.to(inputs[name])
        return inputs

    def _weights(self, component: str) -> str:
        try:
            return self.checkpoint.digest(component)
        except FileNotFoundError:
            return ""

    def memory(self, workers: int = 1) -> MemoryPlan:
        """What the engines will take when loaded, and what ``workers`` compilers take beside them."""
        weights: dict[str, int] = {}
        shared, apart = [0], 0
        for engine in self.engines:
            own = weight_bytes(self.modules[engine.component])
            inside = engine.spec.weights_mode.inside
            weights[engine.component] = weights.get(engine.component, 0) + own if inside else own
            inputs = self.backbone.example_inputs(engine.component, engine.size, 1)
            row = self._workspace(engine.component, engine.size, inputs)
            if inside:
                apart += row * sum(engine.spec.batches)
            else:
                shared.append(row * engine.spec.batch)
        largest = max((weight_bytes(module) for module in self.modules.values()), default=0)
        return MemoryPlan(
            weights=weights,
            # Execution contexts of plans keep their own; CUDA graphs share one, and so do all runs on a CPU.
            workspace=max(shared) + apart,
            building=workers * _BUILDING_COPIES[self.target.device] * largest if self.options.backend != "eager" else 0,
            available=available_bytes(self.options.device),
            device=self.options.device,
        )

    def _workspace(self, component: str, size: Size | None, inputs: dict[str, torch.Tensor]) -> int:
        if (component, size) not in self._workspaces:
            module = self.modules[component]
            on_meta = all(tensor.device.type == "meta" for tensor in [*module.parameters(), *module.buffers()])
            if not on_meta:
                module = meta_copy(module)
            self._workspaces[component, size] = workspace_bytes(module, inputs)
        return self._workspaces[component, size]

    def command(self, store: Path) -> str:
        """The command that builds this plan."""
        buckets = ",".join(str(bucket) for bucket in self.options.buckets)
        # The key of a CPU engine holds the number of threads; another shell may have another default.
        threads = f" --threads {torch.get_num_threads()}" if self.target.device == "cpu" else ""
        chosen = self.checkpoint.chosen_decoder
        decoder = "" if chosen is None else f" --decoder {chosen}"
        return (
            f"rmd build --checkpoint {self.checkpoint.path} --engines {store} --backend {self.options.backend} "
            f"--device {self.options.device} --dtype {self.options.dtype} --buckets {buckets}{threads}{decoder}"
        )


def plan_checkpoint(
    checkpoint: Path | str,
    backend: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    buckets: Sequence[int] | None = None,
    decoder: Path | str | None = None,
) -> CheckpointPlan:
    """Every engine that the checkpoint's schedules need, the teacher's size included.

    Raises:
        BackendUnavailable: the named backend cannot build here.
        EngineError: a wrong bucket or dtype.
        FileNotFoundError, ValueError: the checkpoint cannot be used.
    """
    options, note = EngineOptions.resolve(backend, device, dtype, buckets)
    if note:
        log.warning(note)
    return CheckpointPlan.read(checkpoint, options, decoder)


def missing_engines(plan: CheckpointPlan, store: EngineStore) -> list[PlannedEngine]:
    """The planned engines that the store lacks, or holds broken."""
    return [engine for engine in plan.engines if not store.has(engine.spec.key)]


def load_backbone(
    checkpoint: CheckpointFolder, options: EngineOptions, weights: bool = True, for_device: str | None = None
) -> Backbone:
    """The checkpoint's model in the options' dtype on their device, laid out as engines read it.

    Args:
        checkpoint: its folder.
        options: see :class:`EngineOptions`.
        weights: False for the meta device.
        for_device: where the engines run, if that is another than the options' device.
    """
    dtype: torch.dtype = getattr(torch, options.dtype)
    kind = get_backbone(checkpoint.backbone_name)
    loaded = kind.load(
        checkpoint.path, dtype=dtype, device=options.device, weights=weights, decoder=checkpoint.decoder_path
    )
    lay_out(loaded.component_modules().get("decoder"), for_device or options.device)
    return loaded
