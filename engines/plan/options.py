"""With what a set of engines is built and loaded: backend, device, dtype, batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.compilers import backend_ladder
from engines.errors import EngineError
from engines.target import parse_device
from rmd.backbones.base import BackboneError
from rmd.dtypes import dtype_name, parse_dtype

DEFAULT_BUCKETS = (1, 2, 4, 8)
_CUDA_BUCKETS = (1, 2, 4, 8, 16)  # a 512 px step of SDXL serves 12 times as many pictures a second at 16 as at 1


@dataclass(frozen=True)
class EngineOptions:
    """What a set of engines is built and loaded with.

    Attributes:
        backend: a resolved backend name.
        device: "cpu" or "cuda", the first GPU.
        dtype: such as "bfloat16"; "auto" becomes the device's own.
        buckets: batch sizes of the denoiser; the decoder takes every other one, and so does the text encoder, but the
            smallest alone where a wider batch would change its rows (see :meth:`Compiler.text_in_one_batch`).
    """

    backend: str
    device: str = "cpu"
    dtype: str = "auto"
    buckets: tuple[int, ...] = DEFAULT_BUCKETS

    def __post_init__(self) -> None:
        parse_device(self.device)
        if not self.buckets or any(bucket < 1 for bucket in self.buckets):
            raise EngineError(f"buckets {list(self.buckets)}: give batch sizes of at least 1, such as 1,2,4,8")
        if list(self.buckets) != sorted(set(self.buckets)):
            object.__setattr__(self, "buckets", tuple(sorted(set(self.buckets))))
        try:
            object.__setattr__(self, "dtype", dtype_name(parse_dtype(self.dtype, self.device)))
        except BackboneError as error:
            raise EngineError(str(error)) from None

    @classmethod
    def resolve(
        cls,
        backend: str = "auto",
        device: str = "cpu",
        dtype: str = "auto",
        buckets: Sequence[int] | None = None,
    ) -> tuple[EngineOptions, str]:
        """Options with the backend chosen, and one sentence about the choice when it is not the first.

        Raises:
            BackendUnavailable: the named backend cannot build here.
        """
        ladder, note = cls.ladder(backend, device, dtype, buckets)
        return ladder[0], note

    @classmethod
    def ladder(
        cls,
        backend: str = "auto",
        device: str = "cpu",
        dtype: str = "auto",
        buckets: Sequence[int] | None = None,
    ) -> tuple[tuple[EngineOptions, ...], str]:
        """As :meth:`resolve`, followed by what "auto" steps down to where that fails.

        Raises:
            BackendUnavailable: the named backend cannot build here.
        """
        names, note = backend_ladder(backend, device)
        sizes = default_buckets(device) if buckets is None else tuple(buckets)
        return tuple(cls(name, device, dtype, sizes) for name in names), note


def default_buckets(device: str) -> tuple[int, ...]:
    """Batch sizes of the denoiser where none are named."""
    return _CUDA_BUCKETS if device.startswith("cuda") else DEFAULT_BUCKETS
