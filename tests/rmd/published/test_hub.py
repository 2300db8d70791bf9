"""Checkpoints and bases by their hub names, from a hub on this machine: fetched once, cut, offline, gated, absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmd.backbones.tiny import write_tiny_folder
from rmd.published.hub import is_hub_name
from rmd.weight_files import loaded_digests
from tests.rmd.published.hub_server import COMMIT, Hub, serving

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("embedded", tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[Hub]:
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    (pickled / "training_state.pt").write_bytes(b"\x80\x02}")
    plain = tmp_path / "plain"
    shutil.copytree(model, plain, ignore=shutil.ignore_patterns("cascade.json"))
    alone = tmp_path / "alone"
    shutil.copytree(model, alone)
    (alone / "transformer" / "diffusion_pytorch_model.safetensors").rename(alone / "transformer" / "model.bin")
    folders = {"me/tiny": model, "me/pickled": pickled, "me/plain": plain, "me/alone": alone}
    with serving(folders) as running:
        running.gated.add("me/secret")
        yield running


def fetch(hub: Hub, home: Path, source: str, offline: bool = False) -> str:
    """`checkpoint_folder` in a process of its own, since the client reads its settings when it is imported."""
    script = (
        "import sys\n"
        "from rmd.published.hub import HubError, checkpoint_folder\n"
        "try:\n"
        "    folder = checkpoint_folder(sys.argv[1])\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(folder)\n"
        "except (HubError, FileNotFoundError) as error:\n"
        "    print(f'{type(error).__name__}: {error}')\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, source], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def same(folder: str, model: Path) -> bool:
    names = sorted(p.relative_to(model) for p in model.rglob("*") if p.is_file())
    found = sorted(p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file())
    return names == found and all((Path(folder) / name).read_bytes() == (model / name).read_bytes() for name in names)


def test_names() -> None:
    assert is_hub_name("me/tiny@v1") and is_hub_name("hub:me/tiny") and is_hub_name(Path("me/tiny@main"))
    assert not is_hub_name("me/tiny") and not is_hub_name("models/embedded") and not is_hub_name("a/b/c@v1")


def test_fetched_once_then_offline(hub: Hub, model: Path, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path / "home", "me/tiny@v1")
    assert Path(folder).name == COMMIT and same(folder, model)
    hub.asked.clear()
    assert fetch(hub, tmp_path / "home", "me/tiny@v1", offline=True) == folder
    assert fetch(hub, tmp_path / "home", f"me/tiny@{COMMIT}") == folder
    assert not [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    said = fetch(hub, tmp_path / "other", "me/tiny@v1", offline=True)
    assert said.startswith("HubError: me/tiny could not be fetched from the hub (")


def test_a_cut_transfer_keeps_whole_files(hub: Hub, model: Path, tmp_path: Path) -> None:
    large = "transformer/diffusion_pytorch_model.safetensors"
    hub.cut[large] = 100
    said = fetch(hub, tmp_path / "home", "me/tiny@v1")
    assert said.startswith("HubError: me/tiny ") and "run this again, which goes on with the files" in said
    assert fetch(hub, tmp_path / "home", "me/tiny@v1", offline=True).startswith("HubError: me/tiny was fetched in part")
    hub.cut.clear()
    whole = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*/*")}
    hub.asked.clear()
    assert same(fetch(hub, tmp_path / "home", "me/tiny@v1"), model)
    again = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert any(large in line for line in again) and len(again) <= len(list(model.rglob("*.*"))) - len(whole)


def run_beside_a_hub(script: str, base: Path, folder: Path) -> str:
    """Run a script in an interpreter of its own that finds ``base`` as me/base on a hub; return what it prints."""
    with serving({"me/base": base}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_base_is_fetched_with_what_says_its_licence(tmp_path: Path) -> None:
    """And with nothing that an import does not read: pickles, other variants, other tools' forms."""
    base = write_tiny_folder("pixart", tmp_path / "base")
    past = {"base": {"name": "first", "licence": "mit", "sha256": {}}, "network": None, "loras": []}
    record = json.loads((base / "cascade.json").read_text())
    record["distillation"] = {"method": "import", "preset": "pixart-lcm", "imported": past}
    (base / "cascade.json").write_text(json.dumps(record))
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n# A base\n")
    (base / "LICENSE.md").write_text("Use it well.")
    for other in (
        "transformer/model.onnx",
        "vae/diffusion_pytorch_model.bin",
        "all.safetensors",
        "vae_1_0/config.json",
    ):
        (base / other).parent.mkdir(exist_ok=True)
        (base / other).write_bytes(b"x")
    script = (
        "from pathlib import Path\n"
        "from rmd.published.gathering import ImportRequest\n"
        "from rmd.published.importing import import_model\n"
        "print(import_model(ImportRequest('me/base@v1', 'pixart-lcm', Path('out'))).record['imported']['base'])\n"
    )
    said = run_beside_a_hub(script, base, tmp_path)
    assert f"'revision': '{COMMIT}', 'licence': 'openrail++'" in said
    assert f"'distillation': {record['distillation']}" in said
    assert "Use it well." in (tmp_path / "out" / "NOTICE").read_text()
    assert "| base | me/base at 0123456789" in (tmp_path / "out" / "README.md").read_text()
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/**/*")}
    assert not fetched & {"model.onnx", "diffusion_pytorch_model.bin", "all.safetensors", "vae_1_0"}


def test_a_checkpoint_as_teacher_is_fetched_whole_with_its_steps(tmp_path: Path) -> None:
    """Its `cascade.json` names how it is sampled, and files beside the networks."""
    base = write_tiny_folder("pixart", tmp_path / "base")
    shutil.copy(base / "vae" / "diffusion_pytorch_model.safetensors", base / "pytorch_lora_weights.safetensors")
    record = json.loads((base / "cascade.json").read_text())
    record["teacher"] |= {"steps": 7, "guidance_scale": 2.5}
    record["weights"] = loaded_digests(base)
    (base / "cascade.json").write_text(json.dumps(record))
    script = (
        "import torch\n"
        "from pathlib import Path\n"
        "from training.distill.teacher import Teacher\n"
        "teacher = Teacher.open(Path('me/base@v1'), 'pixart', torch.float32, weights=False)\n"
        "print(teacher.steps, teacher.guidance_scale, sorted(teacher.cascades))\n"
    )
    said = run_beside_a_hub(script, base, tmp_path)
    assert said.strip() == "7 2.5 ['0+4', '2+2']"


def test_gated_absent_and_no_such_revision(hub: Hub, tmp_path: Path) -> None:
    assert "me/secret is gated: agree to its licence" in fetch(hub, tmp_path, "me/secret@main")
    assert "me/nothing is not on the hub, or is private" in fetch(hub, tmp_path, "me/nothing@main")
    assert "me/tiny has no revision 'v9'" in fetch(hub, tmp_path, "me/tiny@v9")


def test_pickles_are_not_fetched_and_plain_models_are_no_checkpoints(hub: Hub, model: Path, tmp_path: Path) -> None:
    assert same(fetch(hub, tmp_path / "home", "me/pickled@main"), model)
    assert not [line for line in hub.asked if "training_state" in line]
    said = fetch(hub, tmp_path / "home", "me/alone@main")
    assert said.startswith("HubError: me/alone holds transformer/model.bin, a pickled file") and "convert it" in said
    said = fetch(hub, tmp_path / "home", "me/plain@main")
    assert said.startswith("FileNotFoundError: me/plain@main holds no cascade.json") and "rmd import --base" in said
