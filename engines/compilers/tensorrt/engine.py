"""A loaded plan, and its profiles at work."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.compilers.engine import Engine, EngineMemory
from engines.compilers.tensorrt.refit import changed_fixed, read_rest, refit_plan
from engines.errors import EngineError, EngineMismatch
from engines.manifest import Manifest
from engines.spec import WeightsMode
from engines.weights.recipes import Recipe

PLAN = "engine.plan"


class Plan:
    """A loaded plan with its weights, shared by the engines of all its batches."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.folder = folder
        tensorrt = importlib.import_module("torch_tensorrt._TensorRTProxyModule") and importlib.import_module(
            "tensorrt"
        )
        self.tensorrt: Any = tensorrt
        self.logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self.engine: Any = tensorrt.Runtime(self.logger).deserialize_cuda_engine((folder / PLAN).read_bytes())
        if self.engine is None:
            raise EngineMismatch(
                f"TensorRT refuses the plan of {manifest.spec.title}: it was built for another GPU or version; "
                f"build it on this machine (rmd build)"
            )
        profiles = self.engine.num_optimization_profiles
        if profiles != len(manifest.spec.batches):
            raise EngineMismatch(
                f"the plan of {manifest.spec.title} has {profiles} profiles; build it again (rmd build)"
            )

    def serialized(self) -> bytes:
        """The plan with the weights that it has now; it can still be refitted."""
        flags = self.tensorrt.SerializationFlag
        config = self.engine.create_serialization_config()
        config.clear_flag(flags.EXCLUDE_WEIGHTS)
        if hasattr(flags, "INCLUDE_REFIT"):  # from TensorRT 10.14 on
            config.set_flag(flags.INCLUDE_REFIT)
        return bytes(self.engine.serialize_with_config(config))


class TensorRTEngine(Engine):
    """One profile of a plan and its execution context, on torch's current stream.

    The context, and with it the profile's memory, comes with the first run: whoever warms engines up, smallest batch
    first, meets an exhausted memory there and can go without the larger ones.
    """

    def __init__(self, manifest: Manifest, plan: Plan, batch: int | None = None) -> None:
        super().__init__(manifest, batch)
        self._plan: Plan | None = plan
        self._tensorrt, self._logger, self._engine = plan.tensorrt, plan.logger, plan.engine
        self._profile = manifest.spec.batches.index(self.batch)
        self._context: Any = None
        modes = {name: self._engine.get_tensor_mode(name) for name in self._tensor_names()}
        self._outputs = [name for name, mode in modes.items() if mode == self._tensorrt.TensorIOMode.OUTPUT]
        self._inputs = [name for name, mode in modes.items() if mode == self._tensorrt.TensorIOMode.INPUT]
        known = {item.name for item in manifest.inputs}
        if len(self._outputs) != 1 or not set(self._inputs) <= known:
            raise EngineMismatch(f"the plan of {manifest.spec.title} takes {self._inputs}, not {sorted(known)}")

    def at(self, batch: int) -> Engine:
        """See :meth:`Engine.at`."""
        if batch == self.batch or batch not in self.manifest.spec.batches or self._plan is None:
            return super().at(batch)
        return TensorRTEngine(self.manifest, self._plan, batch)

    def _new_context(self) -> Any:
        # The context's memory is that of its own profile, not of the widest one.
        context = self._engine.create_execution_context(
            self._tensorrt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        stream = torch.cuda.current_stream()
        # The profile is one of the plan's: what can fail here is the allocation.
        if context is None or not context.set_optimization_profile_async(self._profile, stream.cuda_stream):
            raise torch.OutOfMemoryError(f"out of memory: no execution context for {self.manifest.spec.title}")
        stream.synchronize()
        for name, shape, _ in self._expected:
            if name in self._inputs and not context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT does not take {name!r} {shape} in {self.manifest.spec.title}")
        return context

    def _tensor_names(self) -> Iterator[str]:
        for index in range(self._engine.num_io_tensors):
            yield self._engine.get_tensor_name(index)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._plan is None:
            raise EngineError(f"engine {self.manifest.spec.title} was unloaded")
        if self._context is None:
            self._context = self._new_context()
        named = {
            spec.name: tensor.contiguous() for spec, tensor in zip(self.manifest.inputs, inputs, strict=True)
        }  # alive until the launch below: TensorRT gets addresses only
        spec = self.manifest.output
        output = torch.empty((self.batch, *spec.shape[1:]), dtype=spec.torch_dtype, device=self.device)
        for name in self._inputs:
            self._context.set_tensor_address(name, named[name].data_ptr())
        self._context.set_tensor_address(self._outputs[0], output.data_ptr())
        stream = torch.cuda.current_stream()
        for tensor in named.values():
            tensor.record_stream(stream)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"TensorRT could not run {self.manifest.spec.title}")
        return output

    def check_refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.check_refit`.

        Raises:
            EngineError: the plan holds its weights for good; or a parameter changes whose place in the plan is not
                known, since it was equal to another or computed with when the plan was built.
        """
        if self.manifest.weights_mode is not WeightsMode.REFITTABLE or self._plan is None:
            raise EngineError(
                f"engine {self.manifest.spec.title} holds its weights for good; build it for the new ones (rmd build)"
            )
        for recipe in self.manifest.constants.values():
            Recipe.from_dict(recipe).make(state)
        # TensorRT itself would keep the old values of these without a word.
        changed = changed_fixed(self._plan.folder, state)
        if changed:
            raise EngineError(
                f"refit of {self.manifest.spec.title}: {changed[0]!r} changes ({len(changed)} in all), whose place in "
                f"the plan is not known; build the engine again"
            )

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.refit`.

        Raises:
            EngineError: see :meth:`check_refit`; nothing was changed then. Or TensorRT refuses, after which the plan
                may hold some old weights and some new ones: load it again.
        """
        self.check_refit(state)
        assert self._plan is not None
        torch.cuda.synchronize()  # a refit beside pending work is undefined
        refitter = self._tensorrt.Refitter(self._engine, self._logger)
        recipes = {name: Recipe.from_dict(recipe) for name, recipe in self.manifest.constants.items()}
        # On the CPU, and kept until the refit is done: a second set of weights may not fit beside the plan's.
        made = {name: recipe.make(state).detach().cpu().contiguous() for name, recipe in recipes.items()}
        refit_plan(self._tensorrt, refitter, made | read_rest(self._plan.folder), self.manifest.spec.title)

    def memory(self) -> EngineMemory:
        """The profile's workspace, and the plan's weights."""
        workspace = 0 if self._context is None else self._engine.get_device_memory_size_for_profile_v2(self._profile)
        return EngineMemory(int(workspace), self.manifest.embedded_bytes)

    def unload(self) -> None:
        """See :meth:`Engine.unload`. The plan goes with the last of its engines."""
        self._context = None
        self._engine = self._plan = None
