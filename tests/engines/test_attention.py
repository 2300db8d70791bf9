"""Attention by two matrix products, as CPU engines compute it where those are oneDNN's."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.compilers.inductor.attention import attention_by_products, fused_attention


def heads(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, 2, 3, tokens, 24, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def test_it_is_attention() -> None:
    query, key, value = heads(70, torch.float64)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).exp()
    expected = scores / scores.sum(-1, keepdim=True) @ value
    found = attention_by_products(query.float(), key.float(), value.float())
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5


def test_bfloat16_costs_it_roundings_alone() -> None:
    low = heads(280, torch.bfloat16)
    query, key, value = (tensor.double() for tensor in low)
    exact = fused_attention(query, key, value)
    found = attention_by_products(*low)
    assert found.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(found - exact) < 0.01 * torch.linalg.vector_norm(exact)


def test_scores_of_many_tokens_are_not_written_out() -> None:
    few, many = heads(1024, torch.bfloat16), heads(1025, torch.bfloat16)
    assert not torch.equal(attention_by_products(*few), fused_attention(*few))
    assert torch.equal(attention_by_products(*many), fused_attention(*many))
