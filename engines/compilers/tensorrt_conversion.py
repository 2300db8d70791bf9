"""What a plan needs of torch-tensorrt beyond its own arguments: profiles by batch, and the names of its weights."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import EngineError
from engines.spec import EngineSpec
from engines.weights import Recipe, find_recipe


def export_batches(module: nn.Module, inputs: Mapping[str, Tensor], spec: EngineSpec) -> Any:
    """The network as a graph; of several batches, one whose batch is a symbol.

    Raises:
        EngineError: the network fixes its batch.
    """
    shapes = None
    if len(spec.batches) > 1:
        batch = torch.export.Dim("batch", min=spec.batches[0], max=spec.batches[-1])
        shapes = {name: {0: batch} for name in inputs}
    try:
        with torch.no_grad():
            program = torch.export.export(
                module,
                (),
                kwargs=dict(inputs),
                strict=False,
                dynamic_shapes=shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except torch._dynamo.exc.UserError as error:
        raise EngineError(
            f"{spec.title} cannot be exported with a batch that varies; build one bucket at a time (--buckets "
            f"{spec.batch}): {str(error).splitlines()[0]}"
        ) from error
    # Memory without values, which Wan's rotary embedding fills afterwards, has no converter where its batch varies.
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.empty_like.default:
            node.target = torch.ops.aten.zeros_like.default
    return program


def input_ranges(spec: EngineSpec) -> dict[str, Any]:
    """torch-tensorrt's description of inputs whose batch varies over the spec's batches."""
    kind = importlib.import_module("torch_tensorrt").Input
    first, last = spec.batches[0], spec.batches[-1]
    return {
        item.name: kind(
            min_shape=(first, *item.shape[1:]),
            opt_shape=(last, *item.shape[1:]),
            max_shape=(last, *item.shape[1:]),
            dtype=item.torch_dtype,
        )
        for item in spec.inputs
    }


@contextmanager
def profile_per_batch(batches: Sequence[int]) -> Iterator[None]:
    """Plans built meanwhile get one optimisation profile a batch; torch-tensorrt itself makes a single wide one."""
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter").TRTInterpreter
    original = interpreter._populate_trt_builder_config

    def populate(self: Any, *args: Any, **kwargs: Any) -> Any:
        network = self.ctx.net
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        self.optimization_profiles = [self.builder.create_optimization_profile() for _ in batches]
        for batch, profile in zip(batches, self.optimization_profiles, strict=True):
            for item in inputs:
                shape = tuple(batch if side == -1 else side for side in item.shape)
                profile.set_shape(item.name, shape, shape, shape)
        return original(self, *args, **kwargs)

    if len(batches) > 1:
        interpreter._populate_trt_builder_config = populate
    try:
        yield
    finally:
        interpreter._populate_trt_builder_config = original


@contextmanager
def recorded_weights() -> Iterator[dict[str, Tensor]]:
    """The weights of the network that is converted meanwhile, by the names under which the plan can be refitted."""
    context = importlib.import_module("torch_tensorrt.dynamo.conversion._ConversionContext").ConversionContext
    original = context.record_weight
    recorded: dict[str, Tensor] = {}

    def record(self: Any, name: str, weight: Tensor) -> Any:
        if isinstance(weight, Tensor):
            recorded[name] = weight.detach()
        return original(self, name, weight)

    context.record_weight = record
    try:
        yield recorded
    finally:
        context.record_weight = original


def only_recipe(weight: Tensor, held: Mapping[str, Tensor]) -> Recipe | None:
    """How ``weight`` comes from one of ``held``; None where several are equal (zero biases, norms of ones)."""
    found = [find_recipe(_shaped(weight, tensor), {name: tensor}, {}) for name, tensor in held.items()]
    recipes = [recipe for recipe in found if recipe is not None]
    return recipes[0] if len(recipes) == 1 else None


def _shaped(weight: Tensor, like: Tensor) -> Tensor:
    """A weight that differs from a parameter by sides of 1 (a table of modulations, say) in the parameter's shape."""
    same = [side for side in weight.shape if side != 1] == [side for side in like.shape if side != 1]
    return weight.reshape(like.shape) if same else weight


# ---- what a refit needs beside the traced parameters -----------------------------------------------------------------

REST = "rest.safetensors"
FIXED = "fixed.json"


def save_rest(folder: Path, constants: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
    """Keep beside a plan what a refit has to give it back, and what must not change.

    Args:
        constants: weights of the plan that are none of the network's parameters, by the plan's names. A refit has to
            name every weight of a plan.
        fixed: parameters and buffers whose place in the plan is not known.
    """
    from safetensors.torch import save_file

    if constants:
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in constants.items()}, folder / REST)
    kept = {name: [_name(tensor.dtype), _digest(tensor)] for name, tensor in sorted(fixed.items())}
    (folder / FIXED).write_text(json.dumps(kept, indent=1))


def read_rest(folder: Path) -> dict[str, Tensor]:
    """The constants that :func:`save_rest` kept."""
    from safetensors.torch import load_file

    return load_file(folder / REST) if (folder / REST).is_file() else {}


def changed_fixed(folder: Path, state: Mapping[str, Tensor]) -> list[str]:
    """The parameters and buffers whose place is not known and that ``state`` has with another value."""
    return [
        name
        for name, (dtype, digest) in json.loads((folder / FIXED).read_text()).items()
        if name in state and _digest(state[name].to(getattr(torch, dtype))) != digest
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()
