"""Attention as compiled CPU engines compute it: one fused operator of ATen's, or two matrix products.

ATen's fused operator multiplies bfloat16 by MKL. On an EPYC with ``avx512_bf16`` MKL widens to float32, and a
sixth of a loaded server's time went there, the softmax not counted; oneDNN's batched products use those vectors, and
inductor fuses the softmax between them: a 256 px step of eight rows took .85 times its time (two threads), a film's at
144 px .83 times. In float32 the products took 1.1 times the fused operator's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of query, key and value (B, H, N, D) each; the same shape."""

_MOST_TOKENS = 1024
"""The scores of a head are written out: 2 MiB of them. A large picture's would be as much memory as the weights."""


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``scaled_dot_product_attention``, float32 between the products."""
    return F.scaled_dot_product_attention(query, key, value)


def attention_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by batched products, the scores rounded to the inputs' dtype; fused for more than 1,024 tokens."""
    if query.shape[-2] > _MOST_TOKENS:
        return fused_attention(query, key, value)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)
