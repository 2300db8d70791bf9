"""Batches that threads share in equal parts."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.build.one import build_engine
from engines.compilers import get_compiler
from engines.compilers.inductor.engine import PACKAGE
from engines.compilers.inductor.streams import LEAST_ROWS, StreamedCode, _threads, streams_of
from engines.errors import EngineError, EngineInputError
from engines.manifest import Manifest
from engines.run.buckets import BucketExecutor
from engines.store import EngineStore
from engines.tracks import Track, current_track, enter_track
from engines.weights.bank import WeightBank
from tests.engines.conftest import Net, net_inputs, net_request, net_spec


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineStore, Manifest]:
    """An engine of :class:`Net` of batch 4 in two streams."""
    torch.set_num_threads(2)
    store, module = EngineStore(tmp_path_factory.mktemp("streams")), Net().eval().requires_grad_(False)
    return store, build_engine(get_compiler("inductor"), store, module, net_spec(module, batch=4))


def outside(manifest: Manifest, folder: Path) -> tuple[StreamedCode, dict[str, Tensor]]:
    """The code of an engine, and constants for it."""
    engine = get_compiler("inductor").load(manifest, folder, WeightBank(Net()))
    constants = {name: tensor.clone() for name, tensor in engine._constants.items()}  # type: ignore[attr-defined]
    engine.unload()
    return StreamedCode(folder / PACKAGE, 2, 2), constants


@pytest.mark.parametrize(
    ("threads", "batch", "streams"), [(1, 8, 1), (2, 1, 1), (2, 8, 2), (3, 2, 1), (6, 4, 2), (16, 8, 8), (16, 2, 2)]
)
def test_streams_share_rows_and_threads_evenly(threads: int, batch: int, streams: int) -> None:
    assert streams_of(threads, batch) == streams
    assert threads % streams == batch % streams == 0


@pytest.mark.parametrize(
    ("threads", "batch", "streams"), [(2, 2, 1), (2, 4, 1), (2, 8, 2), (16, 8, 2), (16, 16, 4), (6, 8, 2), (1, 8, 1)]
)
def test_streams_of_onednns_products_have_four_rows_or_more(threads: int, batch: int, streams: int) -> None:
    assert streams_of(threads, batch, LEAST_ROWS) == streams


def test_a_batch_in_streams_has_the_bits_of_one_thread(
    streamed: tuple[EngineStore, Manifest], compiled: tuple[Path, Manifest], net: nn.Module
) -> None:
    store, manifest = streamed
    assert manifest.streams == 2 and manifest.output.shape[0] == 4 and not manifest.note
    compiler, inputs = get_compiler("inductor"), net_inputs(4)
    whole = compiler.load(manifest, store.folder(manifest.key), WeightBank(net)).run(inputs)
    alone = compiler.load(compiled[1], compiled[0] / compiled[1].key, WeightBank(net))
    assert alone.manifest.streams == 1
    halves = [alone.run({name: tensor[i : i + 2] for name, tensor in inputs.items()}) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))


def test_streams_leave_the_process_its_threads(streamed: tuple[EngineStore, Manifest], net: nn.Module) -> None:
    store, manifest = streamed
    get_compiler("inductor").load(manifest, store.folder(manifest.key), WeightBank(net)).run(net_inputs(4))
    assert torch.get_num_threads() == 2
    assert [thread.submit(torch.get_num_threads).result() for thread in _threads(2, 1, os.getpid())] == [1, 1]


def test_other_weights_reach_every_stream(streamed: tuple[EngineStore, Manifest], net: nn.Module) -> None:
    store, manifest = streamed
    engine = get_compiler("inductor").load(manifest, store.folder(manifest.key), WeightBank(net))
    other = Net(seed=1).eval()
    engine.refit(dict([*other.named_parameters(), *other.named_buffers()]))
    with torch.no_grad():
        torch.testing.assert_close(engine.run(net_inputs(4)), other(**net_inputs(4)), rtol=1e-5, atol=1e-5)


def test_what_was_computed_is_freed(streamed: tuple[EngineStore, Manifest]) -> None:
    store, manifest = streamed
    code, constants = outside(manifest, store.folder(manifest.key))
    code.load_constants(constants)
    output = code._codes[0].run([net_inputs(2)[item.name] for item in manifest.inputs])
    freed = weakref.ref(output)
    del output
    gc.collect()
    assert freed() is None


def test_a_failed_run_says_so_and_the_next_one_is_right(streamed: tuple[EngineStore, Manifest]) -> None:
    store, manifest = streamed
    code, constants = outside(manifest, store.folder(manifest.key))
    code.load_constants(constants)
    inputs = [net_inputs(4)[item.name] for item in manifest.inputs]
    expected = code.run(inputs)
    with pytest.raises(RuntimeError, match="compiled code failed"):
        code.run([tensor[:2] for tensor in inputs])
    assert torch.equal(code.run(inputs), expected)


class Doubling(Net):
    """With an operator that only its library knows."""

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        doubled: Tensor = torch.ops.rmd_tests.double(super().forward(latents, timestep))
        return doubled


def test_code_that_calls_other_operators_stays_in_one_piece(tmp_path: Path) -> None:
    @torch.library.custom_op("rmd_tests::double", mutates_args=())
    def double(value: Tensor) -> Tensor:
        return 2 * value

    double.register_fake(torch.empty_like)
    module, compiler = Doubling().eval().requires_grad_(False), get_compiler("inductor")
    store, spec = EngineStore(tmp_path), compiler.plan(net_request(module, 2))
    assert spec.settings["streams"] == 2
    manifest = build_engine(compiler, store, module, spec)
    assert manifest.streams == 1 and "operators" in manifest.note
    output = compiler.load(manifest, store.folder(manifest.key), WeightBank(module)).run(net_inputs(2))
    torch.testing.assert_close(output, module(**net_inputs(2)), rtol=1e-5, atol=1e-5)


def test_two_tracks_run_at_once_each_with_streams_of_its_own(
    streamed: tuple[EngineStore, Manifest], net: nn.Module
) -> None:
    store, manifest = streamed
    bank = WeightBank(net)
    engine = get_compiler("inductor").load(manifest, store.folder(manifest.key), bank)
    assert engine.takes_tracks(2) and not engine.takes_tracks(3)
    executor = BucketExecutor({("denoiser", None): {4: engine}}, {"denoiser": bank}, "inductor", True)
    assert executor.takes_tracks(2) and not executor.takes_tracks(3)
    rows = (1, 2, 3, 5)
    inputs = {count: net_inputs(count) for count in rows}
    whole = {count: executor.run("denoiser", None, inputs[count]) for count in rows}
    tracks = [ThreadPoolExecutor(1, f"track {i}", enter_track, (Track(i, 2), 1)) for i in range(2)]
    runs = [
        (count, tracks[i].submit(executor.run, "denoiser", None, inputs[count]))
        for _ in range(25)
        for i in (0, 1)
        for count in rows
    ]
    assert all(torch.equal(run.result(), whole[count]) for count, run in runs)
    assert [track.submit(torch.get_num_threads).result() for track in tracks] == [1, 1]
    assert torch.get_num_threads() == 2 and current_track() is None
    with pytest.raises(EngineInputError, match=r"expected \(2, 8, 16\)"):
        tracks[0].submit(engine.run, net_inputs(4), Track(0, 2)).result()


def test_an_engine_in_one_piece_is_run_by_one_thread_at_a_time(compiled: tuple[Path, Manifest], net: nn.Module) -> None:
    engine = get_compiler("inductor").load(compiled[1], compiled[0] / compiled[1].key, WeightBank(net))
    assert not engine.takes_tracks(2)
    with pytest.raises(EngineError, match="takes no tracks"):
        engine.run(net_inputs(1), Track(0, 2))
