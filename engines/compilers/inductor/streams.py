"""A batch in equal parts, each run from end to end by threads of its own: *streams*, as OpenVINO calls them on a CPU.

Compiled for all threads, every operator of a network ends in a barrier, some hundreds a step. On a machine that others
share, a core is taken away now and then, and at each barrier all the other cores wait for it. Streams wait for each
other once, at the end of the step. On two AVX2 cores a step of 8 rows took 0.91 (128 px) and 0.86 times (256 px) its
time so, and about three quarters with a tenth of a core taken by another process. Networks of matrix products gain; a
decoder's few long convolutions took 1.08 times theirs, and stay in one piece (``docs/engines.md``).

Python's binding of AOTInductor holds the interpreter's lock while it computes, so streams call the compiled code by its
C interface (torch/csrc/inductor/aoti_runtime/interface.h), which lets go of it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import EngineError
from engines.tracks import Track

LEAST_ROWS = 4
"""Of a stream whose products are oneDNN's, which lay out every matrix anew in each stream: on two threads of an EPYC
two rows at 128 px took 22 ms in streams and 14 in one piece, four 29 and 22, eight 44 and 39 (256 px: 131 and 134).
"""

_PREFIX = "AOTInductorModelContainer"
_GIVES_CONSTANTS = f"{_PREFIX}UpdateUserManagedConstantBufferPairs"
_OTHER_OPERATORS = "aoti_torch_proxy_executor"

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def streams_of(threads: int, batch: int, least: int = 1) -> int:
    """In how many streams ``threads`` run ``batch`` rows: as many as share both evenly, with ``least`` rows in each."""
    most = math.gcd(threads, batch)
    return max(n for n in range(1, most + 1) if n == 1 or (most % n == 0 and batch // n >= least))


@contextmanager
def as_many_threads(threads: int) -> Iterator[None]:
    """Compile, and time kernels, as for that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def why_not_in_streams(package: Path) -> str:
    """Why a compiled package cannot be run in streams; empty where it can."""
    with zipfile.ZipFile(package) as archive:
        code = archive.read(_library(archive))
    if _GIVES_CONSTANTS.encode() not in code:
        return "this torch compiles code that takes no constants by its C interface"
    if _OTHER_OPERATORS.encode() in code:
        return "it calls operators that the C interface lacks"
    return ""


class StreamedCode:
    """A package's machine code, loaded once a stream.

    Args:
        package: compiled for the rows and threads of one stream.
        streams: how many.
        threads: of all of them together.
    """

    def __init__(self, package: Path, streams: int, threads: int) -> None:
        with zipfile.ZipFile(package) as archive:
            self._metadata = _metadata(archive)
            self._codes = [_Code(archive) for _ in range(streams)]
        self._threads = threads // streams

    def get_metadata(self) -> Mapping[str, str]:
        """What AOTInductor noted of the machine it compiled for."""
        return self._metadata

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Read the constants from where they lie: they must live as long as this does."""
        for code in self._codes:
            code.load_constants(constants)

    def takes_tracks(self, count: int) -> bool:
        """Whether each of ``count`` tracks gets as many of the streams."""
        return len(self._codes) % count == 0

    def run(self, inputs: Sequence[Tensor], track: Track | None = None) -> Tensor:
        """The one output of contiguous ``inputs``, whose rows the streams share evenly.

        Args:
            track: whose streams alone run, and share the rows; all of them where it is None.

        Raises:
            RuntimeError: the code failed; torch has written why on standard error.
        """
        whole = Track(0, 1) if track is None else track
        mine = slice(len(self._codes) * whole.index // whole.count, len(self._codes) * (whole.index + 1) // whole.count)
        codes = self._codes[mine]
        if track is not None and len(codes) == 1:
            return codes[0].run(inputs)
        parts = zip(*(tensor.chunk(len(codes)) for tensor in inputs), strict=True)
        threads = _threads(len(self._codes), self._threads, os.getpid())[mine]
        running = [thread.submit(code.run, part) for thread, code, part in zip(threads, codes, parts, strict=True)]
        # Every stream, also when one fails: what it reads must not be freed under it.
        failed = [error for error in [each.exception() for each in running] if error is not None]
        if failed:
            raise failed[0]
        return torch.cat([each.result() for each in running])


class _Code:
    """One instance of a package's compiled code."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        with tempfile.TemporaryDirectory() as folder:  # mapped, the file need not stay
            self._library = ctypes.CDLL(archive.extract(_library(archive), folder))
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", b"")
        delete = getattr(self._library, f"{_PREFIX}Delete")
        weakref.finalize(self, delete, self._container).atexit = False
        self._names = dict(self._name_of_constants())

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        held = _handles(constants.values())
        pairs = (_Pair * len(held))()
        for pair, name, each in zip(pairs, constants, held, strict=True):
            pair.name, pair.handle = self._names[name], _pointer_of(each, None)
        count = ctypes.c_size_t(len(held))
        try:
            self._call("UpdateUserManagedConstantBufferPairs", self._container, pairs, count, False, True)
        finally:
            _tensors(held)  # it has taken references of its own

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            held = _handles(inputs)  # the code takes them over
            given = (ctypes.c_void_p * len(held))(*[_pointer_of(each, None) for each in held])
            made = (ctypes.c_void_p * 1)()
            counts = ctypes.c_size_t(len(held)), ctypes.c_size_t(1)
            self._call("Run", self._container, given, counts[0], made, counts[1], None, None)
            return _tensors([_capsule_of(made[0], None, None)])[0]

    def _name_of_constants(self) -> Iterator[tuple[str, bytes]]:
        """The network's name of each constant, and the code's own."""
        count, ours, theirs = ctypes.c_size_t(), ctypes.c_char_p(), ctypes.c_char_p()
        self._call("GetNumConstants", self._container, ctypes.byref(count))
        for index in range(count.value):
            self._call("GetConstantName", self._container, ctypes.c_size_t(index), ctypes.byref(theirs))
            self._call("GetConstantOriginalFQN", self._container, ctypes.c_size_t(index), ctypes.byref(ours))
            yield (ours.value or b"").decode(), theirs.value or b""

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"{_PREFIX}{name}")(*arguments):
            raise RuntimeError(f"compiled code failed in {name}; torch has written why on standard error")


def _handles(tensors: Iterable[Tensor]) -> list[Any]:
    """References to tensors as the C interface takes them, in capsules."""
    made: list[Any] = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    return made


def _tensors(handles: list[Any]) -> list[Tensor]:
    """The tensors of such references, which end. (The call for one alone leaks it.)"""
    taken: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)
    return taken


class _Pair(ctypes.Structure):
    """``AOTInductorConstantMapEntry``."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


def _library(archive: zipfile.ZipFile) -> str:
    return _only(archive, ".so")


def _metadata(archive: zipfile.ZipFile) -> dict[str, str]:
    found: dict[str, str] = json.loads(archive.read(_only(archive, ".wrapper_metadata.json")))
    return found


def _only(archive: zipfile.ZipFile, ending: str) -> str:
    found = [name for name in archive.namelist() if name.endswith(ending)]
    if len(found) != 1:
        raise EngineError(f"{archive.filename} holds {len(found)} files *{ending}, not one")
    return found[0]


@cache
def _threads(streams: int, threads: int, process: int) -> list[ThreadPoolExecutor]:
    """One Python thread a stream, each of which computes with ``threads`` threads.

    Args:
        streams, threads: how many.
        process: this one's id: threads are not there any more in one that was forked.
    """

    def begin() -> None:
        torch.get_num_threads()  # which sets a new thread's number to the process's, once
        torch.set_num_threads(threads)

    before = torch.get_num_threads()
    pools = [ThreadPoolExecutor(1, f"stream-{stream}", begin) for stream in range(streams)]
    for pool in pools:
        pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(before)  # for all threads that begin from now on
    return pools
