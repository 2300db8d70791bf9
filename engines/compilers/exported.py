"""What compilers ask of a graph that torch.export made."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import EngineError

_NEEDED = ("aot_inductor.package_constants_in_so", "always_keep_tensor_constants")


def package(program: Any, path: Path, options: Mapping[str, Any]) -> None:
    """Compile an exported program into a package.

    Args:
        options: inductor's, by dotted name.

    Raises:
        OSError: the disk is full.
        EngineError: it does not compile; the message holds the compiler's own. Or this torch lacks an option without
            which weights would end up in the package.
    """
    lacking = sorted({*_NEEDED} - options.keys())
    if lacking:
        raise EngineError(
            f"torch {torch.__version__} has no option {lacking[0]!r}, which keeps weights outside engines"
        )
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(options))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = str(error)
        if "No space left on device" in text:
            raise OSError(errno.ENOSPC, "No space left on device") from error
        lines = [line for line in text.strip().splitlines() if line.strip()]
        raise EngineError(
            f"AOTInductor could not compile the graph: {lines[0] if lines else type(error).__name__}"
        ) from error


def user_inputs(program: Any, inputs: Mapping[str, Tensor]) -> list[str]:
    """The inputs' names in the order in which the compiled graph takes them.

    Raises:
        EngineError: the graph dropped or renamed one.
    """
    names = [str(name) for name in program.graph_signature.user_inputs]
    if sorted(names) != sorted(inputs):
        raise EngineError(f"the exported graph takes {', '.join(names)}, the component {', '.join(inputs)}")
    return names


def used_tensors(program: Any) -> list[str]:
    """Parameters and buffers that the graph's outputs depend on.

    A decoder's folder also holds its encoder, for one; and what is computed for nothing (BERT's pooled state) is left
    out by every compiler.
    """
    needed: set[Any] = set()
    found = [program.graph.output_node()]
    while found:
        node = found.pop()
        if node not in needed:
            needed.add(node)
            found += node.all_input_nodes
    names = {node.name for node in needed}
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return [name for node, name in held.items() if node in names]
