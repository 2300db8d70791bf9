"""The front's side of an engine: a process of its own, and the door to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from server.core.messages import Began, Command, Message, Pixels, Stop, pack, unpack_batches, unpack_message
from server.core.stages import ALL, Stages
from server.device.settings import RECORD, EngineSettings
from server.start.settings import ServerSettings

Received = tuple[Message, memoryview | None]


class EngineLink(Protocol):
    """One running engine, wherever it runs. ``socket`` is to be polled and used by one thread."""

    socket: zmq.Socket[bytes]

    def send(self, command: Command) -> None:
        """Give an engine something to do."""

    def receive(self, timeout: float = 0.0) -> Received | None:
        """Return the next message, and the pixels that came with it; None after ``timeout`` seconds."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""

    def last_batches(self) -> Sequence[Began]:
        """Return the batches that run, or ran when it died."""

    def kill(self) -> None:
        """End it at once, whatever it does."""

    def stop(self, timeout: float) -> None:
        """Let it end after the batch that runs; end it at once after ``timeout`` seconds."""

    def close(self) -> None:
        """Give the door up."""


class Line:
    """A socket to one engine, and its language."""

    def __init__(self, kind: int) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 0)
        self._received: deque[Received] = deque()

    def send(self, command: Command) -> None:
        """Give the engine something to do. Where it has died, nothing happens: what it had is handed out again."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(pack(command))

    def receive(self, timeout: float = 0.0) -> Received | None:
        """Return the next message, and the pixels that came with it; None after ``timeout`` seconds.

        Raises:
            msgspec.DecodeError: the engine speaks another version's language.
        """
        if not self._received:
            if not self.socket.poll(int(1000 * timeout)):
                return None
            frames = iter(self.socket.recv_multipart(copy=False))
            for frame in frames:
                message = unpack_message(frame.bytes)
                self._received.append((message, next(frames).buffer if isinstance(message, Pixels) else None))
        return self._received.popleft()

    def close(self) -> None:
        """Give the socket up."""
        self.socket.close()


class Doorway(Line):
    """The socket that one engine connects to, at an address nobody else knows of."""

    def __init__(self) -> None:
        super().__init__(zmq.PAIR)
        self._folder = tempfile.mkdtemp(prefix="rmd-")  # 0700
        self.address = f"ipc://{self._folder}/door"
        self.socket.bind(self.address)

    def last_batches(self) -> Sequence[Began]:
        """Return the batches that run, or ran when the engine died, as it wrote down itself."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            content = Path(self._folder, f"door{RECORD}").read_bytes()
            return unpack_batches(content[4 : 4 + int.from_bytes(content[:4], "big")])
        return ()

    def close(self) -> None:
        """Give the address up."""
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


class EngineProcess(Doorway):
    """An engine in a process of its own; see :class:`EngineLink`."""

    module = "server.device.process"

    def __init__(self, settings: ServerSettings, device: str, stages: Stages = ALL) -> None:
        super().__init__()
        device, visible = own_device(device, os.environ)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        policies = {**thread_policy(os.environ), **memory_policy(os.environ, device)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            env={**policies, **os.environ, **visible, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.pid = self.process.pid
        assert self.process.stdin is not None
        line = msgspec.json.encode(engine_settings(settings, device, self.address, stages)) + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has died already, which whoever watches it will see

    @classmethod
    def start(cls, settings: ServerSettings, device: str) -> EngineProcess:
        """Start one; it says when it is ready."""
        return cls(settings, device)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End it at once, even where it is stopped or hangs."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for long: nobody waits for that
            self.process.wait(1.0)

    def stop(self, timeout: float = 5.0) -> None:
        """Let it end after the batch that runs; end it at once after ``timeout`` seconds."""
        if self.running:
            self.send(Stop())
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()


def engine_settings(settings: ServerSettings, device: str, address: str, stages: Stages = ALL) -> EngineSettings:
    """Return what one engine has to know."""
    return EngineSettings(
        address=address,
        parent=os.getpid(),
        checkpoints=tuple((str(folder), model_id) for folder, model_id in settings.models),
        engines=str(settings.engines),
        backend=settings.backend,
        device=device,
        dtype=settings.dtype,
        buckets=settings.buckets,
        threads=settings.threads,
        decoder=settings.decoder,
        serve_teacher=settings.serve_teacher,
        measure_teacher=settings.measure_teacher,
        max_batch=settings.max_batch,
        policy=settings.policy,
        film_seconds=settings.video_deadline_seconds,
        prompt_megabytes=settings.prompt_megabytes,
        log_level=settings.log_level,
        log_format=settings.log_format,
        tracks=settings.tracks,
        stages=stages,
    )


def own_device(device: str, environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the device as its process calls it, and the environment in which it sees no other GPU.

    Raises:
        ValueError: there is no GPU of that number.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return device, {}
    listed = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",")] if listed else []
    if not index.isdecimal() or (names and int(index) >= len(names)):
        raise ValueError(f"device {device!r}: CUDA_VISIBLE_DEVICES lists {len(names)} GPUs, counted from 0")
    return kind, {"CUDA_VISIBLE_DEVICES": names[int(index)] if names else index}


def thread_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return how libraries' threads are to behave, unless the environment says.

    OpenMP's wait for each other by spinning, for long: beside other work on the same cores, that is time taken from the
    very thread that is waited for. The tokenizer's would share a dozen short texts out among cores that are at work.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys()
    waiting = {} if chosen else {"GOMP_SPINCOUNT": "6000", "KMP_BLOCKTIME": "1"}
    return {"TOKENIZERS_PARALLELISM": "false", **waiting}


def memory_policy(environment: Mapping[str, str], device: str) -> dict[str, str]:
    """Return how glibc is to keep memory that a step has freed, unless the environment names an allocator or its ways.

    Of itself it gives the larger buffers back at once and maps them again for the next step, page by page: batches of
    different widths and sizes in turn spent an eighth of their time on that. Kept, and in huge pages where they may be
    had, they cost nothing again. One arena for all threads: of its own for each, those that compute side by side took a
    ninth longer than two processes do. A GPU's steps need no such memory, and its host's is wanted back after loading.
    """
    if device != "cpu" or any(name in {"GLIBC_TUNABLES", "LD_PRELOAD"} or "MALLOC" in name for name in environment):
        return {}
    kept = {"trim_threshold": 1 << 40, "mmap_max": 0, "top_pad": 64 << 20, "hugetlb": 1, "arena_max": 1}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in kept.items())}
