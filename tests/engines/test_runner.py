from __future__ import annotations

import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from engines.build.checkpoint import build_checkpoint
from engines.build.measure import measure
from engines.build.worker import build_in_processes
from engines.compilers import get_compiler
from engines.compilers.eager import EagerCompiler, EagerEngine
from engines.errors import (
    BackendUnavailable,
    EngineCorrupt,
    EngineError,
    EngineInputError,
    EngineMismatch,
    EngineMissing,
    NotEnoughMemory,
)
from engines.manifest import MANIFEST, Manifest
from engines.plan.checkpoint import CheckpointPlan, missing_engines, plan_checkpoint
from engines.plan.memory import MemoryPlan, meta_copy, weight_bytes, workspace_bytes
from engines.plan.options import EngineOptions
from engines.run import exhaustion
from engines.run.choice import loadable_options
from engines.run.executor import EngineExecutor
from engines.run.exhaustion import is_out_of_memory
from engines.spec import EngineSpec, WeightsMode
from engines.store import EngineStore
from engines.target import package_version
from engines.weights.bank import WeightBank
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_decoder, write_tiny_folder
from rmd.checkpoint import CheckpointFolder
from rmd.sampler import sample
from rmd.size import Size
from tests.engines.conftest import Net, net_inputs, net_spec

SIZE = Size(64, 64)


def executor_of(net: nn.Module, buckets: dict[int, float | None], padded: bool = True) -> EngineExecutor:
    """Engines of ``net`` at these batches, with these recorded latencies."""
    bank = WeightBank(net)
    compiler = get_compiler("eager")
    engines = {}
    for batch, seconds in buckets.items():
        manifest = compiler.build(net, net_spec(net, "eager", batch), Path()).updated(
            latency_seconds={batch: seconds} if seconds else {}
        )
        engines[batch] = compiler.load(manifest, Path(), bank)
    return EngineExecutor({("denoiser", "64x64"): engines}, {"denoiser": bank}, "eager", padded)


def test_rows_are_served_by_the_cheapest_buckets(net: nn.Module) -> None:
    batching = executor_of(net, {1: 1.0, 2: 1.2, 4: 1.6})
    assert [batching.split(("denoiser", "64x64"), rows) for rows in (1, 2, 3, 4, 5, 9)] == [
        (1,), (2,), (4,), (4,), (4, 1), (4, 4, 1),
    ]  # fmt: skip
    costly = executor_of(net, {1: 1.0, 2: 2.1, 4: 4.5})
    assert costly.split(("denoiser", "64x64"), 4) == (1, 1, 1, 1)
    assert executor_of(net, {1: None, 4: None}).split(("denoiser", "64x64"), 6) == (4, 1, 1)
    # Seconds beside rows would make the one timed engine look as if it cost nothing.
    partly = executor_of(net, {1: 0.01, 2: None, 4: None})
    assert partly.split(("denoiser", "64x64"), 4) == (4,)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("padded", [True, False])
def test_any_number_of_rows_gives_what_eager_gives(net: nn.Module, rows: int, padded: bool) -> None:
    executor = executor_of(net, {2: 1.0, 4: 1.1}, padded)
    inputs = net_inputs(rows)
    output = executor.run("denoiser", SIZE, inputs)
    assert output.shape == (rows, 8, 16)
    assert torch.allclose(output, net(**inputs), atol=1e-5)


def test_bad_requests_are_named(net: nn.Module) -> None:
    executor = executor_of(net, {1: 1.0})
    with pytest.raises(EngineError, match="unknown component 'unet'; this model has denoiser"):
        executor.run("unet", SIZE, net_inputs(1))
    with pytest.raises(EngineMissing, match="no engine of 'denoiser' at size 32x32; there are 64x64"):
        executor.run("denoiser", Size(32, 32), net_inputs(1))
    with pytest.raises(EngineInputError, match=r"same number of rows.*latents \(2, 8, 16\), timestep \(1,\)"):
        executor.run("denoiser", SIZE, {"latents": torch.zeros(2, 8, 16), "timestep": torch.zeros(1)})
    with pytest.raises(EngineInputError, match="at least 1; got none"):
        executor.run("denoiser", SIZE, {})


class Hungry(Net):
    """Needs a gibibyte a row, at least three quarters of which are never touched."""

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        scratch = torch.empty(latents.shape[0], 1 << 30, dtype=torch.uint8)
        scratch[:, 0] = 1
        return super().forward(latents, timestep) * scratch[:, :1, None]


def test_out_of_memory_falls_back_to_smaller_batches() -> None:
    net = Hungry().eval().requires_grad_(False)
    executor = executor_of(net, {1: 1.0, 2: 1.1, 4: 1.2})
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (5 << 29), hard))  # room for two rows
    try:
        output = executor.run("denoiser", SIZE, net_inputs(4))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert executor.buckets("denoiser", SIZE) == (1, 2)
    assert torch.allclose(output, Net().eval()(**net_inputs(4)), atol=1e-5)


def test_other_failures_are_not_taken_for_a_lack_of_memory(net: nn.Module) -> None:
    class Broken(Net):
        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            if latents.abs().sum() > 1e6:
                raise RuntimeError("the device was lost")
            return super().forward(latents, timestep)

    executor = executor_of(Broken().eval(), {1: 1.0, 2: 1.1})
    with pytest.raises(RuntimeError, match="device was lost"):
        executor.run("denoiser", SIZE, {**net_inputs(2), "latents": torch.full((2, 8, 16), 1e6)})
    assert executor.buckets("denoiser", SIZE) == (1, 2)


def test_an_error_that_does_not_say_why_is_a_lack_of_memory_where_the_allocator_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AOTInductor's runtime of torch 2.11 names its own source line, whatever has happened."""
    mute = RuntimeError("run_func_(...) API call failed at model_container_runner.cpp, line 138")
    assert not is_out_of_memory(mute)
    refused = [2, 0]
    monkeypatch.setattr(exhaustion, "_seen", {0: 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: {"num_ooms": refused[index]})
    assert not is_out_of_memory(mute), "those were others' failures"
    refused[1] += 1
    assert is_out_of_memory(mute) and not is_out_of_memory(mute)
    refused[0] += 1
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))
    for text in ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(text))


# ---- whole checkpoints -----------------------------------------------------------------------------------------------


def test_a_plan_covers_all_sizes_and_components(tiny_checkpoint: Path) -> None:
    plan = plan_checkpoint(tiny_checkpoint, "inductor", dtype="float32", buckets=(4, 1, 2, 2))
    titles = {engine.spec.title for engine in plan.engines}
    assert {f"denoiser {size} batch {batch}" for size in ("32x32", "64x64") for batch in (1, 2, 4)} <= titles
    assert {"decoder 64x64 batch 1", "decoder 64x64 batch 4", "decoder 32x32 batch 1"} <= titles
    assert {f"{name} batch 1" for name in ("text_encoder", "text_encoder_2", "text_encoder_3")} <= titles
    assert len({engine.spec.key for engine in plan.engines}) == len(plan.engines)
    with pytest.raises(EngineError, match="unknown component 'unet'; this model has denoiser, decoder"):
        plan.spec("unet", None, 1)


@pytest.mark.parametrize(("family", "last"), [("embedded", True), ("wan-1.3b", False)])
def test_a_pictures_decoder_is_laid_out_alike_in_plan_and_service(family: str, last: bool, tmp_path: Path) -> None:
    folder = write_tiny_folder(family, tmp_path / family)
    planned = CheckpointPlan.read(folder, EngineOptions("eager", "cpu", "float32", (1,)))
    backbone, checkpoint = load_checkpoint(folder, dtype=torch.float32)
    before = [p.clone() for p in backbone.component_modules()["decoder"].parameters()]
    served = CheckpointPlan(checkpoint, planned.options, backbone)
    assert [e.spec.key for e in planned.engines] == [e.spec.key for e in served.engines]
    after = list(served.modules["decoder"].parameters())
    assert any(not p.is_contiguous() for p in after) == last
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_one_engine_serves_all_batches_of_a_size_where_the_backend_has_profiles(tiny_checkpoint: Path) -> None:
    options = EngineOptions("eager", "cpu", "float32", (1, 2, 4))
    plan = CheckpointPlan.read(tiny_checkpoint, options)
    titles = [engine.spec.title for engine in plan.engines]
    assert len(set(titles)) == len(titles) == 2 + 2 + 3  # denoiser and decoder at two sizes, three text encoders
    assert {"denoiser 64x64 batch 1, 2, 4", "decoder 32x32 batch 1, 4", "text_encoder batch 1, 4"} <= set(titles)
    inputs = next(engine.spec.inputs for engine in plan.engines if engine.spec.title.startswith("denoiser 64x64"))
    assert {spec.shape[0] for spec in inputs} == {4}


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_weights_are_counted_once_a_size(tiny_checkpoint: Path, backend: str) -> None:
    def weights(*buckets: int) -> int:
        return CheckpointPlan.read(tiny_checkpoint, EngineOptions(backend, "cpu", buckets=buckets)).memory().weights[
            "denoiser"
        ]  # fmt: skip

    def workspace(backend: str, *buckets: int) -> int:
        return CheckpointPlan.read(tiny_checkpoint, EngineOptions(backend, "cpu", buckets=buckets)).memory().workspace

    assert workspace(backend, 1, 2, 4) > workspace(backend, 4) > workspace("eager", 4), "contexts keep their own"
    assert workspace("eager", 1, 2, 4) == workspace("eager", 4), "and CUDA graphs share one pool"
    plan = CheckpointPlan.read(tiny_checkpoint, EngineOptions(backend, "cpu", buckets=(1,)))
    module = plan.modules["denoiser"]
    assert weights(1) == weights(1, 2, 4, 8) == 2 * weight_bytes(module)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sd3", "bfloat16"), ("sd3", "float16"), ("pixart", "float16"), ("wan-1.3b", "bfloat16"), ("wan-1.3b", "float16")],
)
def test_a_plan_without_weights_has_the_keys_and_dtype_of_the_loaded_model(
    name: str, dtype: str, tmp_path: Path
) -> None:
    folder = write_tiny_folder(name, tmp_path / name)
    options = EngineOptions("inductor", "cpu", dtype, (1,))
    empty = CheckpointPlan.read(folder, options)
    backbone, checkpoint = load_checkpoint(folder, dtype=getattr(torch, dtype))
    loaded = CheckpointPlan(checkpoint, options, backbone)
    assert [engine.spec.key for engine in empty.engines] == [engine.spec.key for engine in loaded.engines]
    # Wan's modulation tables and T5's last products stay float32 beside the rest.
    assert {engine.spec.dtype for engine in loaded.engines if engine.spec.component != "decoder"} == {dtype}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buckets": (0,)}, EngineError, r"buckets \[0\]: give batch sizes of at least 1"),
        ({"buckets": ()}, EngineError, "give batch sizes"),
        ({"backend": "tensorrt"}, BackendUnavailable, "'tensorrt' is not available"),
        ({"backend": "onnx"}, BackendUnavailable, "unknown backend 'onnx'"),
        ({"dtype": "int8"}, EngineError, "use auto, bfloat16, float16, float32"),
        ({"device": "gpu"}, BackendUnavailable, "unknown device 'gpu'; use cpu or cuda"),
        ({"device": "cuda"}, BackendUnavailable, "torch sees no CUDA device; use --device cpu"),
    ],
)
def test_bad_options_give_one_clear_error(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_checkpoint(tiny_checkpoint, tmp_path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_engines_draw_what_the_network_draws(tiny_checkpoint: Path, eager_store: Path) -> None:
    backbone, checkpoint = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    conditioning = backbone.encode_prompts(["a red rocket", "a tree", "x"])
    expected = sample(backbone, checkpoint.default_cascade, conditioning, [1, 2, 3])
    pictures = backbone.decode(expected, checkpoint.default_cascade.full_size)

    served, _ = load_checkpoint(tiny_checkpoint, dtype=torch.float32, weights=False)
    served.executor = EngineExecutor.open(tiny_checkpoint, eager_store, "eager", dtype="float32", buckets=(1, 2))
    again = sample(
        served, checkpoint.default_cascade, served.encode_prompts(["a red rocket", "a tree", "x"]), [1, 2, 3]
    )
    assert torch.allclose(again, expected, atol=1e-4)
    assert torch.allclose(served.decode(again, checkpoint.default_cascade.full_size), pictures, atol=1e-3)


def test_engines_of_a_small_decoder_stand_beside_those_of_the_full_one(
    tiny_checkpoint: Path, eager_store: Path, tmp_path: Path
) -> None:
    decoder = write_tiny_decoder("sd3", tmp_path / "small")
    options: dict[str, Any] = {"dtype": "float32", "buckets": (1, 2)}
    with pytest.raises(EngineMissing, match=f"--decoder {decoder}"):
        EngineExecutor.open(tiny_checkpoint, eager_store, "eager", decoder=decoder, **options)
    store = shutil.copytree(eager_store, tmp_path / "store")
    built = build_checkpoint(tiny_checkpoint, store, "eager", decoder=decoder, **options)
    assert {manifest.spec.component for manifest in built.built} == {"decoder"} and built.reused > 0
    small, _ = load_checkpoint(tiny_checkpoint, dtype=torch.float32, decoder=decoder)
    full, _ = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    latents = torch.randn(1, *small.latent_shape(SIZE))
    for backbone, choice in ((small, decoder), (full, "full"), (full, None)):
        executor = EngineExecutor.open(tiny_checkpoint, store, "eager", decoder=choice, **options)
        found = executor.run("decoder", SIZE, {"latents": latents})
        assert torch.allclose(found, backbone.run("decoder", SIZE, {"latents": latents}), atol=1e-5)
    executor = EngineExecutor.open(tiny_checkpoint, store, "eager", decoder=decoder, **options)
    executor.refit(write_tiny_folder("sd3", tmp_path / "other", seed=1))  # other denoiser, the same small decoder
    found = executor.run("decoder", SIZE, {"latents": latents})
    assert torch.allclose(found, small.run("decoder", SIZE, {"latents": latents}), atol=1e-5)


def test_engines_that_are_made_on_the_spot_need_no_store(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As eager ones are on a GPU, where they are CUDA graphs."""
    assert get_compiler("eager").on_the_spot("cuda") and get_compiler("eager").capabilities("cuda").profiles
    assert not any(get_compiler(name).on_the_spot("cuda") for name in ("inductor", "tensorrt", "tensorrt_rtx"))
    monkeypatch.setattr(EagerCompiler, "on_the_spot", lambda compiler, device: True)
    store = tmp_path / "store"
    executor = EngineExecutor.open(tiny_checkpoint, store, "eager", dtype="float32", buckets=(1, 2))
    backbone, _ = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    inputs = backbone.example_inputs("denoiser", SIZE, 3)
    assert torch.allclose(executor.run("denoiser", SIZE, inputs), backbone.run("denoiser", SIZE, inputs), atol=1e-5)
    assert executor.buckets("denoiser", SIZE) == (1, 2) and not store.exists()


def test_a_new_checkpoint_is_taken_without_a_restart(tiny_checkpoint: Path, eager_store: Path, tmp_path: Path) -> None:
    executor = EngineExecutor.open(tiny_checkpoint, eager_store, "eager", dtype="float32", buckets=(1, 2))
    other = write_tiny_folder("sd3", tmp_path / "other", seed=1)
    backbone, _ = load_checkpoint(other, dtype=torch.float32)
    inputs = backbone.example_inputs("denoiser", SIZE, 2)
    assert not torch.allclose(executor.run("denoiser", SIZE, inputs), backbone.run("denoiser", SIZE, inputs), atol=1e-3)
    executor.refit(other)
    assert torch.allclose(executor.run("denoiser", SIZE, inputs), backbone.run("denoiser", SIZE, inputs), atol=1e-5)
    with pytest.raises(EngineError, match="unknown component 'unet'"):
        executor.refit({"unet": {}})
    config = other / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 9.0}))
    record = json.loads((other / "cascade.json").read_text())
    del record["weights"]  # which would have refused the changed file
    (other / "cascade.json").write_text(json.dumps(record))
    with pytest.raises(EngineMismatch, match="its decoder is another network or has other settings"):
        executor.refit(other)


def test_the_teachers_weights_run_through_the_same_engines(
    tiny_checkpoint: Path, eager_store: Path, tmp_path: Path
) -> None:
    teacher = write_tiny_folder("sd3", tmp_path / "teacher", seed=2)
    executor = EngineExecutor.open(
        tiny_checkpoint, eager_store, "eager", dtype="float32", buckets=(1, 2), weights_from=teacher
    )
    backbone, _ = load_checkpoint(teacher, dtype=torch.float32)
    inputs = backbone.example_inputs("denoiser", SIZE, 1)
    assert torch.allclose(executor.run("denoiser", SIZE, inputs), backbone.run("denoiser", SIZE, inputs), atol=1e-5)


def test_engines_that_hold_weights_refuse_anothers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT's plans do: the teacher must not be drawn with the student's weights without a word."""
    monkeypatch.setattr(WeightsMode, "inside", property(lambda mode: True))
    store, teacher = tmp_path / "store", write_tiny_folder("sd3", tmp_path / "teacher", seed=2)
    build_checkpoint(tiny_checkpoint, store, "eager", dtype="float32", buckets=(1,))
    with pytest.raises(EngineMismatch, match=r"hold the weights of .* \(decoder, denoiser, .*\) and cannot run an"):
        EngineExecutor.open(tiny_checkpoint, store, "eager", dtype="float32", buckets=(1,), weights_from=teacher)


def test_a_bucket_that_does_not_fit_at_the_start_is_left_out(
    tiny_checkpoint: Path, eager_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmup = EagerEngine.warmup

    def limited(engine: EagerEngine, runs: int = 2) -> None:
        if engine.manifest.spec.component == "denoiser" and engine.batch > 1:
            raise torch.OutOfMemoryError("out of memory")
        warmup(engine, runs)

    monkeypatch.setattr(EagerEngine, "warmup", limited)
    executor = EngineExecutor.open(tiny_checkpoint, eager_store, "eager", dtype="float32", buckets=(1, 2))
    assert executor.buckets("denoiser", SIZE) == (1,)
    backbone, _ = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    inputs = backbone.example_inputs("denoiser", SIZE, 2)
    assert torch.allclose(executor.run("denoiser", SIZE, inputs), backbone.run("denoiser", SIZE, inputs), atol=1e-5)


def test_missing_and_damaged_engines_name_the_command(tiny_checkpoint: Path, eager_store: Path, tmp_path: Path) -> None:
    command = (
        rf"rmd build --checkpoint {tiny_checkpoint} --engines .* --backend eager .*--buckets 1,2 "
        rf"--threads {torch.get_num_threads()}"
    )
    with pytest.raises(EngineMissing, match=rf"engines are not in .* Build them: {command}"):
        EngineExecutor.open(tiny_checkpoint, tmp_path, "eager", dtype="float32", buckets=(1, 2))
    copy = tmp_path / "copy"
    shutil.copytree(eager_store, copy)
    next(copy.glob(f"*/{MANIFEST}")).write_text("{")
    with pytest.raises(EngineCorrupt, match="is not JSON"):
        EngineExecutor.open(tiny_checkpoint, copy, "eager", dtype="float32", buckets=(1, 2))


def record(store: EngineStore, spec: EngineSpec) -> None:
    """Put an engine without files into the store; it can be found there, not run."""
    store.build(spec.key, lambda folder: Manifest(spec, {}, spec.inputs, spec.inputs[0], spec.weights_mode))


def test_missing_engines_say_what_those_at_hand_were_built_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    torch.set_num_threads(2)
    options = EngineOptions("inductor", "cpu", "float32", (1,))
    built = next(e.spec for e in CheckpointPlan.read(tiny_checkpoint, options).engines if e.component == "denoiser")
    spec = replace(built, versions={**built.versions, "diffusers": "0.1"})
    record(store, spec)
    torch.set_num_threads(1)
    here = package_version("diffusers")
    with pytest.raises(
        EngineMissing, match=rf"--threads 1\. .* built for diffusers 0.1, here {here}; threads 2, here 1"
    ):
        EngineExecutor.from_plan(CheckpointPlan.read(tiny_checkpoint, options), store)


def test_without_a_compiler_built_engines_are_loaded_and_else_eager_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from torch._inductor import config

    folder, store = CheckpointFolder.read(tiny_checkpoint), EngineStore(tmp_path)
    arguments: tuple[str, str, tuple[int, ...]] = ("cpu", "float32", (1,))
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        options, note = loadable_options(folder, store, "auto", *arguments)
        assert options.backend == "eager" and "no C++ compiler" in note
        with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler"):
            loadable_options(folder, store, "inductor", *arguments)
        for engine in CheckpointPlan(folder, EngineOptions("inductor", *arguments)).engines:
            record(store, engine.spec)
        for backend in ("auto", "inductor"):
            assert loadable_options(folder, store, backend, *arguments)[0].backend == "inductor"
        assert loadable_options(folder, store, "eager", *arguments)[0].backend == "eager"


def test_a_build_goes_on_where_it_stopped_and_reports(tiny_checkpoint: Path, eager_store: Path, tmp_path: Path) -> None:
    shutil.copytree(eager_store, tmp_path / "store")
    store = EngineStore(tmp_path / "store")
    plan = plan_checkpoint(tiny_checkpoint, "eager", dtype="float32", buckets=(1, 2))
    store.prune([plan.engines[0].spec.key, plan.engines[1].spec.key])
    seen = []
    said: list[str] = []
    report = build_checkpoint(
        tiny_checkpoint, store, "eager", seen.append, dtype="float32", buckets=(1, 2), announce=said.append
    )
    assert [progress.done for progress in seen] == [0, 1, 2] and seen[-1].remaining == 0
    assert len(report.built) == 2 and report.reused == len(plan.engines) - 2
    assert all(manifest.latency_seconds and manifest.relative_l2 == 0.0 for manifest in report.built)
    assert "memory plan for cpu" in said[0]
    assert missing_engines(plan, store) == []
    assert len(measure(plan, store)) == len(plan.engines)
    # As a build leaves it that is interrupted before it times what it has built.
    untimed = store.get(plan.engines[2].spec.key)
    assert untimed is not None
    store.update(untimed.updated(latency_seconds={}))
    assert build_checkpoint(tiny_checkpoint, store, "eager", dtype="float32", buckets=(1, 2)).built == ()
    timed = store.get(untimed.key)
    assert timed is not None and timed.latency_seconds


def test_processes_build_into_one_store(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    plan = plan_checkpoint(tiny_checkpoint, "eager", dtype="float32", buckets=(1,))
    wanted = list(plan.engines[:2])
    results = list(build_in_processes(plan, store, wanted, 2))
    assert {engine.spec.title for engine, error in results if error is None} == {engine.spec.title for engine in wanted}
    assert set(store.keys()) == {engine.spec.key for engine in wanted}


def test_a_workers_failure_reaches_the_parent(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_checkpoint(tiny_checkpoint, "eager", dtype="float32", buckets=(1,))
    wrong = replace(plan.engines[0], spec=replace(plan.engines[0].spec, graph="0"))
    [(engine, error)] = build_in_processes(plan, EngineStore(tmp_path), [wrong], 1)
    assert engine is wrong and isinstance(error, EngineError)
    assert re.search(r"the worker plans .* its parent as", str(error))
    assert EngineStore(tmp_path).keys() == []


def test_a_memory_plan_that_does_not_fit_is_refused() -> None:
    plan = MemoryPlan({"denoiser": 3 << 20}, 2 << 20, 1 << 20, 6 << 20, "cuda:0")
    plan.check()
    assert plan.total == 5 << 20 and "loaded: 5 MiB, while building 1 MiB more" in plan.describe()
    with pytest.raises(NotEnoughMemory, match=r"need 6 MiB and cuda:0 has 5 MiB free; build smaller buckets"):
        replace(plan, available=5 << 20).check()


def test_a_network_is_taken_to_the_meta_device_without_copying_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net()
    module.tied = module.up
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: pytest.fail("a weight is copied"))
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda self, memo: pytest.fail("a buffer is copied"))
    copied = meta_copy(module)
    assert {tensor.device.type for tensor in [*copied.parameters(), *copied.buffers()]} == {"meta"}
    assert copied.tied is copied.up and copied.up.weight is not module.up.weight  # type: ignore[attr-defined]
    assert [p.shape for p in copied.parameters()] == [p.shape for p in module.parameters()]
    assert module.up.weight.device.type == "cpu"


def test_workspace_does_not_count_the_scores_of_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, value=x)

    heads, tokens = 8, 1000
    counted = workspace_bytes(Attention(), {"x": torch.zeros(1, heads, tokens, 4)})
    assert counted < heads * tokens * tokens, "its scores alone would be four times that"


def test_workspace_counts_what_lives_at_once() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10):
                x = x * self.weight
            return x

    size = 1000 * 4
    assert size <= workspace_bytes(Chain(), {"x": torch.zeros(1000)}) <= 3 * size
