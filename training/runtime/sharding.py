"""Networks sharded over processes by FSDP2, and tensors that may be shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rmd.backbones.base import weights_dtype


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, a view; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(value: Tensor, like: Tensor) -> Tensor:
    """`value`, this process's part, as a tensor sharded as `like` is; as it is where `like` is whole."""
    if not isinstance(like, DTensor):
        return value
    return DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; of a sharded one all processes must ask together."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu")


def process_mesh(device: torch.device) -> DeviceMesh:
    """All processes of the run in a row.

    Raises:
        ValueError: there is one process, and nothing to shard over.
    """
    if not torch.distributed.is_initialized():
        raise ValueError("sharding=true needs several processes: start them with accelerate launch or torchrun")
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def shard(denoiser: nn.Module, network: Any, mesh: DeviceMesh, compute: torch.dtype, *, trained: bool) -> None:
    """Shard a denoiser in place, one group a block, so that a single block is whole at a time.

    Trained weights are kept in float32, gathered in `compute` and their gradients reduced in float32: the shards are
    the optimiser's masters. Frozen ones stay as they are.

    Args:
        denoiser: the module that is called.
        network: the diffusers model in it, which names its blocks.
        mesh: of the processes.
        compute: dtype of products.
        trained: whether the optimiser updates it.
    """
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False) if trained else None
    wide = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False) if trained else None
    for group, keep in _groups(network, compute):
        _shard_group(group, mesh, wide if keep else policy)
    _shard_group(denoiser, mesh, policy)
    denoiser.compute_dtype = compute  # type: ignore[assignment]


def group_bytes(denoiser: nn.Module, network: Any) -> int:
    """Bytes of what is gathered at a time at most: the parameters outside all blocks, and two blocks, the one that runs
    and the next; with the gradients of one block in float32 before they are spread."""
    groups = [list(group.parameters()) for group, _ in _groups(network, weights_dtype(network))]
    inside = {id(parameter) for group in groups for parameter in group}
    rest = sum(p.numel() * p.element_size() for p in denoiser.parameters() if id(p) not in inside)
    largest = max((sum(p.numel() for p in group) for group in groups), default=0)
    return rest + largest * (2 + 2 + 4)


def _shard_group(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None) -> None:
    if policy is None:
        fully_shard(module, mesh=mesh)
        return
    for inner in module.modules():  # what an inner group holds already is float32
        for parameter in inner.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
    fully_shard(module, mesh=mesh, mp_policy=policy)


def _groups(network: Any, compute: torch.dtype) -> list[tuple[nn.Module, bool]]:
    """The modules that are gathered one at a time, and whether each keeps float32: as its loader does, or because it
    was made so in a network of another dtype (a last projection)."""
    wide = set(network._keep_in_fp32_modules or ())
    blocks = set(network._no_split_modules or ())
    groups = []
    for name, module in network.named_modules():
        keep = name.rpartition(".")[2] in wide or (
            isinstance(module, nn.Linear | nn.Conv2d) and "." not in name and module.weight.dtype != compute
        )
        innermost = type(module).__name__ in blocks and not any(
            type(inner).__name__ in blocks for inner in list(module.modules())[1:]
        )
        if (keep or innermost) and any(True for _ in module.parameters()):
            groups.append((module, keep))
    return sorted(groups, key=lambda group: not group[1])  # inner ones first: a float32 module may lie in a block
