"""Which attention kernel training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def training_attention(device_type: str = "cpu", tokens: int = 0) -> Iterator[None]:
    """On the CPU, attention of up to 128 tokens as plain products: their backward is 3 to 5 times as fast.

    Measured on two cores with AMX, 4 heads of 64, forward and backward: 88 tokens 29 against 87 ms at batch 128, 40
    tokens 17 against 94 ms at batch 256. At 280 tokens the fused kernel is 1.15 times as fast. Other devices keep
    PyTorch's choice.
    """
    if device_type != "cpu" or tokens > 128:
        yield
        return
    # Without this the plain products run in float32, which AMX does not speed up.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def scoring_attention() -> Iterator[None]:
    """PyTorch's own choice again, inside :func:`training_attention`: without a backward the fused kernel is faster."""
    with sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    ):
        yield
