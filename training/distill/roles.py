"""The three roles: a frozen teacher, and a student and a fake score that start as copies of it or of a student."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmd.backbones.base import Backbone, weights_dtype
from rmd.noise_schedule import NoiseSchedule, VariancePreserving
from training.distill.adapters import adapted_layers
from training.distill.settings import DistillSettings
from training.runtime.sharding import process_mesh, shard, whole

_LAST_LAYERS = ("conv_out", "proj_out")


@dataclass
class Networks:
    """Denoiser components by role.

    Attributes:
        teacher, student, fake: the modules that hold the weights.
        plain: a denoiser of the same class without weights (:func:`skeleton`), where the three are sharded.
    """

    teacher: nn.Module
    student: nn.Module
    fake: nn.Module
    plain: nn.Module | None = None
    _teacher_fingerprint: str = ""

    @classmethod
    def build(cls, backbone: Backbone, settings: DistillSettings, initial: nn.Module | None = None) -> Networks:
        """Copy the backbone's denoiser for student and fake score; the backbone's own is the teacher.

        Under `sharding` each copy is sharded before the next is made, so that two are whole at a time.

        Args:
            initial: a denoiser of the same class whose weights the student starts from instead.

        Raises:
            ValueError: sharding, and there is one process.
        """
        teacher = backbone.component_modules()["denoiser"].eval().requires_grad_(False)
        for denoiser in (teacher, initial):
            if denoiser is not None:
                last_layer_in_float32(denoiser, backbone.schedule)
        plain, digest = None, ""
        mesh = None
        if settings.sharding:
            mesh = process_mesh(backbone.device)
            plain, digest = skeleton(teacher), fingerprint(teacher)
        compute = weights_dtype(teacher)
        with torch.random.fork_rng(devices=[]):  # a LoRA's first weights are random
            torch.manual_seed(settings.seed)
            student = trainable_copy(initial if initial is not None else teacher, settings)
            if mesh is not None:
                shard(student, network_of(student)[1], mesh, compute, trained=True)
            fake = trainable_copy(teacher, settings)
            if mesh is not None:
                shard(fake, network_of(fake)[1], mesh, compute, trained=True)
                shard(teacher, network_of(teacher)[1], mesh, compute, trained=False)
        if settings.compile:
            for module in (teacher, student, fake):
                compile_blocks(network_of(module)[1])
        return cls(teacher, student, fake, plain, digest)

    def teacher_fingerprint(self) -> str:
        """The digest of the teacher's weights (:func:`fingerprint`); a sharded teacher's was taken before."""
        return self._teacher_fingerprint or fingerprint(self.teacher)


def last_layer_in_float32(denoiser: nn.Module, schedule: NoiseSchedule) -> None:
    """Let the last projection of a network that predicts noise compute, and put out, float32; in place.

    In `(x - sigma eps) / alpha` an output's rounding is multiplied by `sigma / alpha`, 14 at the start of SDXL's table
    and 157 of PixArt's: in bfloat16 it would rival the scores' own difference. Others' are left as they are.
    """
    if not isinstance(schedule, VariancePreserving):
        return
    _, network = network_of(denoiser)
    (layer,) = (child for name, child in network.named_children() if name in _LAST_LAYERS)
    if next(layer.parameters()).dtype != torch.float32:
        layer.float().register_forward_pre_hook(_inputs_in_float32)


def _inputs_in_float32(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def compile_blocks(network: Any) -> None:
    """Compile the blocks of a diffusers model in place, each kind once for every shape it meets.

    Blocks rather than the network as one graph: the network's backward does not compile on the CPU with torch 2.13, and
    equal blocks share their code.
    """
    # Three roles, sides and batches: more shapes of one block than dynamo keeps by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if hasattr(network, "get_base_model"):  # a LoRA's wrapper
        network = network.get_base_model()
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile(dynamic=False)


def trainable_copy(teacher: nn.Module, settings: DistillSettings) -> nn.Module:
    """A copy whose weights (all, or those of a LoRA) are trained."""
    # Under a LoRA the weights stay as they are, and all roles may hold the same ones: 28 GB each for Wan-14B.
    shared = {id(weight): weight for weight in teacher.parameters()} if settings.lora_rank else {}
    module = copy.deepcopy(teacher, shared).requires_grad_(settings.lora_rank == 0)
    name, network = network_of(module)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if settings.lora_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_rank,
            # As one pattern: names in a list would also stand for the ends of others.
            target_modules="|".join(map(re.escape, adapted_layers(network, settings.lora_targets))),
            init_lora_weights="gaussian",
        )
        # Adapters in the network's own dtype, over float32 masters like any other trained weight.
        setattr(module, name, get_peft_model(network, config, autocast_adapter_dtype=False))
    return module


def network_of(denoiser: nn.Module) -> tuple[str, Any]:
    """The diffusers model inside a denoiser component, and the attribute that holds it.

    Raises:
        ValueError: there is none.
    """
    for name, child in denoiser.named_children():
        if hasattr(child, "save_pretrained"):
            return name, child
    raise ValueError(f"{type(denoiser).__name__} holds no diffusers model")


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A digest over up to 64 evenly spaced values of each parameter: tells two sets of weights apart in a moment.

    Of the values in bfloat16, so that weights read in another precision are still the same ones.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.flatten()
        some = values[:: max(1, values.numel() // 64)][:64]
        digest.update(name.encode() + some.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are on the meta device, and whose buffers are its own."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    buffers = {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, {**empty, **buffers}).requires_grad_(False)


@torch.no_grad()
def with_weights(module: nn.Module, weights: Mapping[str, Tensor], plain: nn.Module | None = None) -> nn.Module:
    """A copy of a trained module on the CPU, without gradients, that carries other (averaged) weights.

    Its device holds no second copy. A LoRA's factors become float32, so that merging rounds once; other weights keep
    the dtype of the module, or of `plain`.

    Args:
        plain: the class's empty module, where `module` is sharded: all processes call this together then, and the first
            gets the copy, the others the empty module.

    Raises:
        KeyError: a weight's name is not one of the module's.
    """
    copied = skeleton(module) if plain is None else copy.deepcopy(plain)
    own = dict(module.named_parameters())
    for name in weights:
        own[name]  # a wrong name is said, not left out
    dtypes = {name: parameter.dtype for name, parameter in copied.named_parameters()}
    for name, parameter in own.items():
        dtype = torch.float32 if "lora_" in name else dtypes[name]
        owner, _, last = name.rpartition(".")
        value = whole(weights.get(name, parameter))
        if plain is not None and torch.distributed.get_rank():
            continue
        value = value.to(dtype, copy=True)
        copied.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)
    for part in copied.modules():
        part._buffers = {name: None if b is None else b.to("cpu", copy=True) for name, b in part._buffers.items()}
    return copied


def merged_network(module: nn.Module) -> Any:
    """The plain diffusers model of a denoiser, with a LoRA merged into its weights in place.

    Layer by layer in float32 on the CPU, rounded once: in bfloat16 a small change of a large weight is lost.
    """
    _, network = network_of(module)
    if not hasattr(network, "unload"):
        return network
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            place, dtype = layer.get_base_layer().weight.device, layer.get_base_layer().weight.dtype
            layer.to("cpu", torch.float32)
            layer.merge()
            layer.get_base_layer().to(place, dtype)
    return network.unload()
