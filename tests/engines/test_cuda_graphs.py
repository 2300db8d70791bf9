"""Engines in CUDA graphs; the graphs themselves are stood in for, what is recorded runs for real."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.compilers import get_compiler
from engines.compilers.eager import EagerEngine
from engines.errors import EngineError, EngineInputError
from engines.run.cuda_graphs import GraphedEngine
from engines.weights.bank import WeightBank
from tests.engines.conftest import Net, net_inputs, net_spec
from tests.engines.recorder import Recorder, recorder

__all__ = ["recorder"]


def graphed(net: nn.Module, batch: int = 2, bank: WeightBank | None = None) -> GraphedEngine:
    compiler = get_compiler("eager")
    manifest = compiler.build(net, net_spec(net, "eager", batch), Path())
    return GraphedEngine(compiler.load(manifest, Path(), bank or WeightBank(net)))


def test_a_replay_computes_with_what_it_is_given_now(net: nn.Module, recorder: Recorder) -> None:
    engine = graphed(net)
    engine.warmup(1)
    first, second = net_inputs(2), {name: value + 1 for name, value in net_inputs(2).items()}
    kept = engine.run(first)
    other = engine.run(second)
    assert torch.allclose(kept, net(**first), atol=1e-6), "the next replay does not overwrite it"
    assert torch.allclose(other, net(**second), atol=1e-6)
    assert len(recorder.recorded) == 1 and recorder.recorded[0][0].replays == 3
    with pytest.raises(EngineInputError, match="expected"):
        engine.run(net_inputs(1))  # the network itself would take it, the recording does not


def test_all_graphs_share_one_pool_and_other_threads_may_go_on(net: nn.Module, recorder: Recorder) -> None:
    engines = [graphed(net, batch) for batch in (1, 2, 4)]
    for engine in engines:
        engine.warmup(1)
    assert recorder.pools == 1 and {pool for _, pool, _ in recorder.recorded} == {(1, 0)}
    assert {mode for _, _, mode in recorder.recorded} == {"thread_local"}
    outputs = [engine.run(net_inputs(batch)) for engine, batch in zip(engines, (1, 2, 4), strict=True)]
    for output, batch in zip(outputs, (1, 2, 4), strict=True):
        assert torch.allclose(output, net(**net_inputs(batch)), atol=1e-6)
    for engine in engines:
        engine.unload()
    graphed(net).warmup(1)
    assert recorder.pools == 2, "the first went with its last graph"


def test_new_weights_in_place_need_no_new_recording(net: nn.Module, recorder: Recorder) -> None:
    engine = graphed(net)
    engine.warmup(1)
    other = Net(seed=3).eval().requires_grad_(False)
    engine.refit(dict(other.named_parameters()))
    assert torch.allclose(engine.run(net_inputs(2)), other(**net_inputs(2)), atol=1e-6)
    assert len(recorder.recorded) == 1


def test_weights_that_have_moved_are_recorded_again(net: nn.Module, recorder: Recorder) -> None:
    """As torch-tensorrt moves a network that it converts: to the CPU, and back to other addresses."""
    engine = graphed(net)
    engine.warmup(1)
    for parameter in net.parameters():
        parameter.data = 2 * parameter.data
    gc.collect()
    assert torch.allclose(engine.run(net_inputs(2)), net(**net_inputs(2)), atol=1e-6)
    assert len(recorder.recorded) == 2 and recorder.pools == 2


def test_a_recording_that_fails_holds_nothing(net: nn.Module, recorder: Recorder) -> None:
    engine = graphed(net)
    empty = engine.memory().private
    recorder.failing = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(net_inputs(2))
    assert engine.memory().private == empty
    recorder.failing = None
    assert torch.allclose(engine.run(net_inputs(2)), net(**net_inputs(2)), atol=1e-6)
    assert engine.memory().private > empty and recorder.pools == 2
    engine.unload()
    with pytest.raises(EngineError, match="unloaded"):
        engine.run(net_inputs(2))


def test_weights_are_checked_before_any_is_changed(net: nn.Module) -> None:
    class Fixed(EagerEngine):
        def check_refit(self, state: Mapping[str, Tensor]) -> None:
            raise EngineError(f"holds its weights for good, not these {len(state)}")

    manifest = get_compiler("eager").build(net, net_spec(net, "eager"), Path())
    with pytest.raises(EngineError, match="for good, not these 1"):
        GraphedEngine(Fixed(manifest, WeightBank(net))).check_refit({"shift": torch.zeros(16)})
