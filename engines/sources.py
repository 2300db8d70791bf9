"""Digests of source files: an engine made by other code than today's is another engine."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

# Files whose comments and layout change every week, and whose meaning does not.
_OURS = ("rmd", "engines")


def code_digest(modules: Iterable[str]) -> str:
    """One digest of several modules' source files, by their names."""
    parts = [f"{name} {module_digest(name)}" for name in sorted(set(modules))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=4096)
def module_digest(name: str) -> str:
    """Digest of a module's source file; "" for torch's, whose version is in every key, and for one without a file.

    Of this project's own files comments, docstrings and layout do not count.
    """
    path = None if name.partition(".")[0] == "torch" else _file(name)
    if path is None:
        return ""
    content = path.read_bytes()
    if name.partition(".")[0] in _OURS:
        content = ast.dump(_without_docstrings(ast.parse(content))).encode()
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=4096)
def with_helpers(name: str) -> tuple[str, ...]:
    """A module and those of its own package from which it takes functions (rotary embeddings, say)."""
    package = name.partition(".")[0]
    module = None if package == "torch" else _module(name)
    if module is None:
        return (name,)
    taken = {value.__module__ for value in vars(module).values() if inspect.isfunction(value) and value.__module__}
    return (name, *sorted(other for other in taken - {name} if other.partition(".")[0] == package))


def _module(name: str) -> ModuleType | None:
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except ImportError:
        return None


def _file(name: str) -> Path | None:
    file = getattr(_module(name), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree
