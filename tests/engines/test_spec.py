from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from engines.compilers import get_compiler
from engines.errors import BackendUnavailable, EngineCorrupt, EngineError
from engines.manifest import MANIFEST, Manifest
from engines.spec import EngineSpec, WeightsMode, graph_digest
from engines.target import Target, parse_device, this_machine
from tests.engines.conftest import Net, net_request, net_spec


def test_the_same_network_gives_the_same_key_whatever_its_weights(net: nn.Module) -> None:
    assert net_spec(net).key == net_spec(Net(seed=5)).key
    assert net_spec(net).key == net_spec(Net().to("meta")).key


def test_the_network_itself_is_part_of_the_key(net: nn.Module) -> None:
    assert graph_digest(net) != graph_digest(Net(scale=2.0))
    other = Net()
    other.down = nn.Linear(64, 16, bias=False)
    assert graph_digest(net) != graph_digest(other)


@pytest.mark.parametrize(
    "change",
    [
        {"component": "decoder"},
        {"size": "128x128"},
        {"batches": (4,)},
        {"batches": (1, 2)},
        {"dtype": "bfloat16"},
        {"backend": "eager"},
        {"weights_mode": WeightsMode.EMBEDDED},
        {"graph": "0"},
        {"inputs": ()},
        {"versions": {"torch": "0"}},
        {"settings": {"freezing": False}},
        {"weights": "0"},
        {"code": "0"},
        {"target": Target("cpu", "linux-x86_64", "avx2")},
        {"target": Target("cuda", "linux-x86_64", "", "9.0", "13.0", "580")},
        {"target": Target("cuda", "linux-x86_64", "", "9.0", "13.0", "590")},
    ],
)
def test_every_part_changes_the_key(net: nn.Module, change: dict[str, object]) -> None:
    spec = net_spec(net)
    assert replace(spec, **change).key != spec.key  # type: ignore[arg-type]


def test_embedded_weights_are_part_of_the_key_and_shared_ones_are_not(net: nn.Module) -> None:
    request = net_request(net)
    other = replace(request, weights="another digest")
    shared, inside = get_compiler("inductor"), get_compiler("tensorrt")
    assert shared.plan(request).weights is None and shared.plan(request).key == shared.plan(other).key
    assert inside.plan(request).weights == "digest" and inside.plan(request).key != inside.plan(other).key


def test_the_number_of_threads_is_part_of_a_cpu_engine(net: nn.Module) -> None:
    one = net_spec(net).key
    torch.set_num_threads(2)
    assert net_spec(net).key != one


def test_a_spec_survives_its_record(net: nn.Module) -> None:
    spec = net_spec(net)
    again = EngineSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.key == spec.key and again.inputs == spec.inputs and again.title == "denoiser 64x64 batch 2"


def test_inputs_that_disagree_about_the_batch_are_refused(net: nn.Module) -> None:
    request = net_request(net)
    broken = replace(request, inputs={**request.inputs, "timestep": torch.zeros(3)})
    with pytest.raises(EngineError, match="disagree about the batch"):
        get_compiler("inductor").plan(broken)


def test_a_target_names_what_the_machine_lacks() -> None:
    here = this_machine("cpu")
    assert here.differences(here) == []
    built = replace(here, instruction_set=f"{here.instruction_set} avx99")
    assert built.differences(here) == ["CPU instructions avx99, which this CPU lacks"]
    older = replace(here, instruction_set="")
    assert older.differences(here) == []  # more instructions than it needs
    gpu = Target("cuda", here.platform, "", "9.0", "13.0", "580", "NVIDIA H100 PCIe")
    other = replace(gpu, compute_capability="8.9", driver="570")
    assert gpu.differences(other) == ["GPU compute capability 9.0, here 8.9", "GPU driver major version 580, here 570"]
    # Of one capability, and yet a plan of the one may be refused by the other.
    assert gpu.differences(replace(gpu, gpu="NVIDIA H200")) == ["GPU NVIDIA H100 PCIe, here NVIDIA H200"]


def test_engines_take_the_cpu_or_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu") == torch.device("cpu")
    for text in ("cuda:x", ""):
        with pytest.raises(BackendUnavailable, match=r"unknown device .* use cpu or cuda"):
            parse_device(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_device("cuda") == torch.device("cuda") and parse_device("cuda:0").index == 0
    with pytest.raises(BackendUnavailable, match="set CUDA_VISIBLE_DEVICES=1 and --device cuda"):
        parse_device("cuda:1")


def test_the_manifest_says_what_was_built(store: tuple[object, Manifest]) -> None:
    manifest = store[1]
    record = json.loads(manifest.to_json())
    assert record["profiles"] == [{"batch": 2, "guided_requests": 1}]
    assert [entry["name"] for entry in record["inputs"]] == ["latents", "timestep"]
    assert record["output"]["shape"] == [2, 8, 16]
    assert 0 < record["relative_l2"] < 1e-5 or record["relative_l2"] == 0
    assert record["build_seconds"] > 0 and record["load_seconds"] > 0
    assert set(record["spec"]) == {
        "component", "size", "batches", "dtype", "backend", "weights_mode", "inputs", "graph", "target", "versions",
        "settings", "weights", "code",
    }  # fmt: skip


GUARDED_BUT_EMPTY = json.dumps({"format": 5, "digest": hashlib.sha256(b'{"format":5}').hexdigest()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"format": 1}', "field 'format'"),
        ('{"format": 2}', "field 'format'"),
        ('{"format": 4}', "field 'format'"),
        ('{"format": 5}', "was altered"),
        (GUARDED_BUT_EMPTY, "missing or wrong"),
        (None, "is missing"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(EngineCorrupt, match=message):
        Manifest.read(tmp_path)


def test_a_manifest_of_another_engine_is_refused(store: tuple[object, Manifest], tmp_path: Path) -> None:
    folder = tmp_path / ("0" * 32)
    folder.mkdir()
    (folder / MANIFEST).write_text(store[1].to_json())
    with pytest.raises(EngineCorrupt, match="key does not match"):
        Manifest.read(folder)
