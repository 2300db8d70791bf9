"""What every compiler must do, on real compiled code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.build.one import build_engine
from engines.compilers import BACKENDS, choose_backend, get_compiler
from engines.compilers.engine import Engine
from engines.compilers.inductor.settings import own_kernels
from engines.errors import BackendUnavailable, EngineAccuracyError, EngineError, EngineInputError
from engines.manifest import Manifest
from engines.run.accuracy import _exact_convolutions, relative_l2
from engines.store import EngineStore
from engines.weights.bank import WeightBank
from tests.engines.conftest import Net, net_inputs, net_request, net_spec
from tests.engines.rows import check_rows


def load(root: Path, manifest: Manifest, net: nn.Module) -> tuple[Engine, WeightBank]:
    bank = WeightBank(net)
    return get_compiler(manifest.spec.backend).load(manifest, root / manifest.key, bank), bank


@pytest.fixture(params=["inductor", "eager"])
def engine(request: pytest.FixtureRequest, compiled: tuple[Path, Manifest], net: nn.Module, tmp_path: Path) -> Engine:
    root, manifest = compiled
    if request.param == "eager":
        root = tmp_path
        manifest = build_engine(get_compiler("eager"), EngineStore(root), net, net_spec(net, "eager"))
    return load(root, manifest, net)[0]


def test_an_engine_computes_what_its_network_does(engine: Engine, net: nn.Module) -> None:
    engine.warmup()
    assert relative_l2(engine, net) <= 1e-5
    inputs = net_inputs(2)
    assert torch.allclose(engine.run(inputs), net(**inputs), atol=1e-5)
    strided = {**inputs, "latents": inputs["latents"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(engine.run(strided), engine.run(inputs))


def test_one_row_of_a_wider_tensor_is_taken(tmp_path: Path, net: nn.Module) -> None:
    manifest = build_engine(get_compiler("inductor"), EngineStore(tmp_path), net, net_spec(net, batch=1))
    engine = load(tmp_path, manifest, net)[0]
    inputs = net_inputs(1)
    row = torch.empty_strided((1, 8, 16), (2496, 16, 1)).copy_(inputs["latents"])
    assert row.is_contiguous() and row.stride(0) == 2496
    assert torch.equal(engine.run({**inputs, "latents": row}), engine.run(inputs))


def test_own_matrix_kernels_are_for_tiles_or_for_no_bf16_instructions_at_all() -> None:
    xeon, epyc, laptop = "amx_bf16 amx_tile avx512_bf16", "avx512_bf16 avx512f", "avx2 fma"
    assert [own_kernels("bfloat16", cpu) for cpu in (xeon, epyc, laptop)] == [True, False, True]
    assert own_kernels("float32", epyc)


def test_the_batch_does_not_change_a_bit_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other components and kernels: tests_slow/test_rows.py."""
    check_rows(tmp_path, "denoiser", True, monkeypatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 8, 17)}, r"'latents' is \(2, 8, 17\) .*expected \(2, 8, 16\)"),
        ({"latents": torch.zeros(2, 7, 16)}, r"'latents' is \(2, 7, 16\)"),
        ({"latents": torch.zeros(2, 8, 16, dtype=torch.bfloat16)}, r"'latents' is .* torch.bfloat16 on cpu, expected"),
        ({"timestep": torch.zeros(2, dtype=torch.float64)}, r"'timestep' is \(2,\) torch.float64"),
        ({"prompt": torch.zeros(2)}, "does not take prompt"),
    ],
)
def test_wrong_inputs_are_named(engine: Engine, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(EngineInputError, match=message):
        engine.run({**net_inputs(2), **change})


def test_missing_inputs_are_named(engine: Engine) -> None:
    with pytest.raises(EngineInputError, match="lacks timestep"):
        engine.run({"latents": torch.zeros(2, 8, 16)})


def test_a_compiled_engine_takes_its_own_batch_only(compiled: tuple[Path, Manifest], net: nn.Module) -> None:
    with pytest.raises(EngineInputError, match="expected"):
        load(*compiled, net)[0].run(net_inputs(3))


def test_weights_are_replaced_without_building_or_loading(engine: Engine, net: nn.Module) -> None:
    other = Net(seed=3).eval().requires_grad_(False)
    before = engine.run(net_inputs(2)).clone()
    engine.refit(dict(other.named_parameters()))
    after = engine.run(net_inputs(2))
    assert torch.allclose(after, other(**net_inputs(2)), atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


def test_every_batch_of_one_engine_is_checked_and_shares_its_weights(net: nn.Module, tmp_path: Path) -> None:
    compiler = get_compiler("eager")
    spec = compiler.plan(replace(net_request(net, batch=4), batches=(4, 1)))
    assert spec.batches == (1, 4) and spec.title == "denoiser 64x64 batch 1, 4"
    engine, _ = load(tmp_path, build_engine(compiler, EngineStore(tmp_path), net, spec), net)
    one = engine.at(1)
    assert (engine.batch, one.batch, engine.at(4)) == (4, 1, engine)
    assert torch.allclose(one.run(net_inputs(1)), net(**net_inputs(1)), atol=1e-5)
    with pytest.raises(EngineError, match="runs at batch 4, not 2"):
        engine.at(2)
    other = Net(seed=3).eval().requires_grad_(False)
    engine.refit(dict(other.named_parameters()))
    assert torch.allclose(one.run(net_inputs(1)), other(**net_inputs(1)), atol=1e-5)


def test_inputs_of_another_batch_than_the_widest_profile_are_refused(net: nn.Module) -> None:
    with pytest.raises(EngineError, match="have batch 2, the widest profile 4"):
        get_compiler("eager").plan(replace(net_request(net, batch=2), batches=(1, 4)))


def test_the_comparison_with_eager_leaves_cudnn_on() -> None:
    """``cudnn.flags`` would switch it off meanwhile: both sides would run on kernels that never serve."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    for exact in (True, False):
        with _exact_convolutions(exact):
            assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == before[:3]
            assert cudnn.allow_tf32 == (before[3] and not exact)
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before


def test_an_engine_that_is_unloaded_says_so(engine: Engine) -> None:
    assert engine.memory().shared > 0
    engine.unload()
    with pytest.raises(EngineError, match="unloaded"):
        engine.run(net_inputs(2))


def test_the_package_holds_no_weights_and_two_engines_share_one_copy(
    compiled: tuple[Path, Manifest], net: nn.Module
) -> None:
    root, manifest = compiled
    assert manifest.weights_mode == "packed" and manifest.embedded_bytes == 0
    bank = WeightBank(net)
    first = get_compiler("inductor").load(manifest, root / manifest.key, bank)
    held = bank.memory()
    second = get_compiler("inductor").load(manifest, root / manifest.key, bank)
    assert bank.memory() == held
    bank.refit(dict(Net(seed=9).named_parameters()))
    assert torch.equal(first.run(net_inputs(2)), second.run(net_inputs(2)))


def test_equal_parameters_are_told_apart(compiled: tuple[Path, Manifest], net: nn.Module) -> None:
    """Both biases of the network that was compiled are zero; giving one of them values must not move the other."""
    engine, bank = load(*compiled, net)
    state = {name: tensor.clone() for name, tensor in net.named_parameters()}
    state["up.bias"] = torch.linspace(-2, 2, 64)
    bank.refit(state)
    expected = Net().eval()
    expected.load_state_dict(state, strict=False)
    assert torch.allclose(engine.run(net_inputs(2)), expected(**net_inputs(2)), atol=1e-5)


class Folded(nn.Module):
    """A constant of the graph mixes two parameters, so that no recipe explains it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.few = nn.Linear(16, 4)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.nn.functional.linear(latents, self.a.weight @ self.b.weight) + timestep[:, None, None]
        return self.few(hidden)


def test_weights_that_cannot_be_traced_are_shared_unpacked(tmp_path: Path) -> None:
    module = Folded().eval().requires_grad_(False)
    spec = net_spec(module)
    assert spec.weights_mode == "packed"
    manifest = build_engine(get_compiler("inductor"), EngineStore(tmp_path), module, spec)
    assert manifest.weights_mode == "shared" and "not packed" in manifest.note
    engine, bank = load(tmp_path, manifest, module)
    other = Folded().eval().requires_grad_(False)
    bank.refit(dict(other.named_parameters()))
    # Also the bias of 4 values, which inductor would write into the code as numbers.
    assert torch.allclose(engine.run(net_inputs(2)), other(**net_inputs(2)), atol=1e-4)


class Drifting(Net):
    """Not the network its spec was planned for: its output depends on how often it ran."""

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        self.scale *= 1.1
        return super().forward(latents, timestep)


def test_an_engine_that_differs_from_eager_is_not_published(tmp_path: Path) -> None:
    module = Drifting().eval().requires_grad_(False)
    store = EngineStore(tmp_path)
    with pytest.raises(EngineAccuracyError, match=r"differs from eager by .* not published"):
        build_engine(get_compiler("eager"), store, module, net_spec(module, "eager"))
    assert store.keys() == []


def test_without_a_compiler_auto_means_eager_and_says_so() -> None:
    from torch._inductor import config

    assert choose_backend("auto", "cpu") == ("inductor", "")
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        backend, note = choose_backend("auto", "cpu")
        assert backend == "eager"
        assert note == "using eager: inductor is not available (no C++ compiler (no-such-compiler) is installed)"
        with pytest.raises(BackendUnavailable, match=r"'inductor' is not available: no C\+\+ compiler .*: eager"):
            choose_backend("inductor", "cpu")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_is_unavailable_here_with_the_reason(backend: str) -> None:
    assert "run on NVIDIA GPUs" in get_compiler(backend).capabilities("cpu").reason
    reason = get_compiler(backend).capabilities("cuda").reason
    assert "is not installed" in reason or "no CUDA device" in reason
    with pytest.raises(BackendUnavailable, match="Use one of: inductor, eager"):
        choose_backend(backend, "cpu")


def test_tensorrt_is_told_not_to_make_masks_causal(net: nn.Module) -> None:
    spec = get_compiler("tensorrt").plan(net_request(net))
    assert spec.settings["attn_bias_is_causal"] is False and spec.settings["require_full_compilation"] is True
    assert spec.weights == "digest"  # inside the plan, so part of its key


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match=f"unknown backend 'onnx'; known are {', '.join(BACKENDS)}"):
        choose_backend("onnx", "cpu")
    with pytest.raises(BackendUnavailable, match="use cpu or cuda"):
        choose_backend("auto", "meta")
