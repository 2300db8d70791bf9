"""CPU engines whose matrices lie as the kernels read them, and are still shared by all sizes and batches.

Inductor's "freezing" packs constant matrices once, at compile time, for its own matrix kernels: without it oneDNN
reorders every bf16 weight at every call, which at 16 tokens is most of a step. But it bakes the packed weights into
each engine. Here the network is compiled with random weights that are all different, each packed constant is traced to
the parameter and layout it came from, and only that recipe is kept: engines hold no weights, one bank serves all.

Inductor's kernels need matrix tiles (AMX) for bf16. With vector instructions alone they widen to float32: on an EPYC
with avx512_bf16 and two threads they made a 256 px step 54 ms, where eager takes 27. There the products stay oneDNN's,
which uses those instructions, and matrices lie as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.compilers.exported import package, user_inputs
from engines.compilers.inductor.attention import attention_by_products, fused_attention
from engines.compilers.inductor.rewrites import rewrite
from engines.compilers.inductor.settings import options_of, takes_templates
from engines.errors import EngineError
from engines.weights.recipes import Recipe, find_recipe


class UnexplainedConstantError(EngineError):
    """A constant of the compiled graph could not be traced to a parameter or buffer."""


def compile_packed(
    module: nn.Module, inputs: Mapping[str, Tensor], path: Path, settings: Mapping[str, Any]
) -> tuple[list[str], Tensor, dict[str, Recipe], dict[str, Tensor]]:
    """Compile ``module`` into the package ``path``.

    Args:
        settings: of the engine; with inductor's matrix kernels matrices are packed, with oneDNN's they lie as they are.

    Returns:
        The inputs' names in the graph's order, an example output, the recipe of every constant by name, and the
        constants that no weights can change.

    Raises:
        UnexplainedConstantError: a constant's origin is unclear; the package must not be used.
    """
    stand_in = _with_random_weights(module)
    rewritten = rewrite(stand_in, inputs, fused_attention if takes_templates(settings) else attention_by_products)
    with torch.no_grad():
        output = module(**inputs)
        program = torch.export.export(rewritten.module, (), kwargs=dict(inputs), strict=False)
        names = user_inputs(program, inputs)
        with ExitStack() as stack:
            if takes_templates(settings):
                stack.enter_context(_own_matrix_kernels())
                stack.enter_context(_templates_parsed_once())
            captured = stack.enter_context(_captured_constants())
            package(program, path, options_of(settings))
    candidates = _tensors(rewritten.module)
    parameters = _tensors(stand_in)
    wanted = torch._inductor.aoti_load_package(str(path)).get_constant_fqns()
    if len(set(wanted)) != len(wanted):
        raise UnexplainedConstantError("the compiled graph names two constants alike")
    recipes: dict[str, Recipe] = {}
    fixed: dict[str, Tensor] = {}
    for name in wanted:
        constant = captured.get(name)
        if constant is None or constant.is_mkldnn:
            raise UnexplainedConstantError(f"constant {name} has an opaque layout")
        recipe = find_recipe(constant, candidates, rewritten.sources)
        if recipe is None:
            raise UnexplainedConstantError(f"constant {name} {tuple(constant.shape)} comes from no single parameter")
        if not recipe.sources:
            fixed[name] = constant
        elif torch.equal(recipe.make(parameters), constant):
            recipes[name] = recipe
        else:
            raise UnexplainedConstantError(f"constant {name} {tuple(constant.shape)} is not what its recipe makes")
    return names, output, recipes, fixed


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters hold distinct random values: equal ones (biases of zero) could not be told apart, and
    nothing of the real weights can then be folded into the graph."""
    stand_in = copy.deepcopy(module).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in stand_in.parameters():
        if parameter.is_floating_point():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return stand_in


@contextmanager
def _own_matrix_kernels() -> Iterator[None]:
    """Take inductor's own C++ matrix kernel wherever there is one, without timing the candidates.

    Timing builds every candidate alone, which costs minutes, and its winner depends on what else the machine did.
    """
    from torch._inductor import select_algorithm

    def prefer(choices: list[Any]) -> list[Any]:
        return [choice for choice in choices if str(choice.name).startswith("cpp_")][:1] or choices

    select_algorithm.add_preprocessing_fn(prefer)
    try:
        yield
    finally:
        select_algorithm.clear_preprocessing_fns()


@contextmanager
def _templates_parsed_once() -> Iterator[None]:
    """Parse each of inductor's source templates once and not once a matrix: two fifths of its time otherwise."""
    from torch._inductor.codegen.common import KernelTemplate

    original = KernelTemplate._template_from_string
    KernelTemplate._template_from_string = staticmethod(lru_cache(maxsize=None)(original))  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelTemplate._template_from_string = staticmethod(original)  # type: ignore[method-assign]


@contextmanager
def _captured_constants() -> Iterator[dict[str, Tensor]]:
    """The constants of the graph that is compiled meanwhile, by the names the package gives them.

    Constants that inductor makes (packed matrices) are named by how many there are at that moment, so names repeat;
    here each gets its own.
    """
    from torch._inductor.graph import GraphLowering

    original = GraphLowering.allocate_non_dup_const_name
    captured: dict[str, Tensor] = {}
    graphs: list[Any] = []

    def allocate(self: Any, name: str | None, data: Tensor) -> str:
        chosen: str = original(self, name, data)
        if name is None:
            self.allocated_constant_name[chosen] = chosen
        if self not in graphs:
            graphs.append(self)
        return chosen

    GraphLowering.allocate_non_dup_const_name = allocate  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        GraphLowering.allocate_non_dup_const_name = original  # type: ignore[method-assign]
        for graph in graphs:
            known = {**graph.allocated_constant_name, **graph.dynamo_flat_name_to_original_fqn}
            for name, value in graph.constants.items():
                captured[known.get(name, name)] = value.detach()
