"""Dtypes by name, and which one a device is fast in."""

from __future__ import annotations

import pytest
import torch

from rmd.backbones.base import BackboneError
from rmd.dtypes import dtype_name, native_dtype, parse_dtype


def test_a_cpu_that_only_emulates_bfloat16_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert native_dtype("cpu") == (torch.bfloat16 if supported else torch.float32)
    for answer, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=answer: answer)
        assert native_dtype("cpu") == parse_dtype("auto", "cpu") == dtype
    assert native_dtype("cuda") == torch.bfloat16
    assert dtype_name(parse_dtype("float16", "cpu")) == "float16"
    with pytest.raises(BackboneError, match="use auto, bfloat16"):
        parse_dtype("int8", "cpu")
