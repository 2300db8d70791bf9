from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from torch import nn
from typer.testing import CliRunner

from cli.engines import app
from engines.compilers import get_compiler
from engines.compilers.inductor.engine import PACKAGE
from engines.errors import EngineCorrupt, EngineError, EngineMismatch, NotEnoughDisk
from engines.manifest import MANIFEST, FileRecord, Manifest
from engines.store import EngineStore
from engines.target import Target, this_machine
from tests.engines.conftest import net_spec

HERE = this_machine("cpu")


def eager_builder(net: nn.Module):  # type: ignore[no-untyped-def]
    spec = net_spec(net, "eager")

    def builder(folder: Path) -> Manifest:
        (folder / "note.txt").write_text("something to record")
        return get_compiler("eager").build(net, spec, folder)

    return spec.key, builder


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".locks")


def test_a_build_is_published_whole_and_used_again(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    assert store.get(key) is None and not store.has(key)
    manifest = store.build(key, builder)
    assert manifest.files["note.txt"].bytes == len("something to record")
    assert leftovers(tmp_path) == [key]

    def never(folder: Path) -> Manifest:
        raise AssertionError("built twice")

    assert store.build(key, never) == manifest == store.get(key)


def test_a_failed_build_leaves_nothing(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)

    def fails(folder: Path) -> Manifest:
        (folder / "half").write_text("half")
        raise EngineError("no converter for this operator")

    with pytest.raises(EngineError, match="no converter"):
        store.build("k", fails)
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing_and_says_so(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)

    def fills_the_disk(folder: Path) -> Manifest:
        (folder / "half").write_text("half")
        (folder / "rest").symlink_to("/dev/full")  # the kernel's own "no space left on device"
        (folder / "rest").write_bytes(b"x" * 100_000)
        raise AssertionError("the disk was not full")

    with pytest.raises(NotEnoughDisk, match=r"no space left .* build again: what is complete is kept"):
        store.build(key, fills_the_disk)
    assert leftovers(tmp_path) == []
    assert store.build(key, builder).key == key


def test_a_dead_builders_leftovers_do_not_matter(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    working = tmp_path / f".building-{key}"
    working.mkdir(parents=True)
    (working / "half").write_text("half")
    assert "half" not in store.build(key, builder).files
    working.mkdir()
    store.prune([])
    assert leftovers(tmp_path) == [key]


def test_two_processes_at_once_make_one_engine(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from tests.engines.conftest import Net, net_spec
        from engines.compilers import get_compiler
        from engines.store import EngineStore
        root, log, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
        net = Net().eval()
        spec = net_spec(net, "eager")
        def builder(folder):
            with log.open("a") as file:
                file.write(name + "\\n")
            time.sleep(1.0)
            (folder / "builder.txt").write_text(name)
            return get_compiler("eager").build(net, spec, folder)
        (root.parent / f"ready-{name}").touch()
        while len(list(root.parent.glob("ready-*"))) < 2:
            time.sleep(0.01)
        EngineStore(root).build(spec.key, builder)
    """)
    root, log = tmp_path / "store", tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, root, log, name], env=environment) for name in ("one", "two")
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    builders = log.read_text().split()
    assert len(builders) == 1
    (manifest,) = EngineStore(root).list()
    assert (EngineStore(root).folder(manifest.key) / "builder.txt").read_text() == builders[0]


def test_a_sound_store_verifies(store: tuple[EngineStore, Manifest]) -> None:
    assert store[0].verify() == []
    store[0].check(store[1], HERE, "rmd build")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "1 bytes too many"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "was altered"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_is_refused_with_the_way_out(  # type: ignore[no-untyped-def]
    store: tuple[EngineStore, Manifest], damage, message: str
) -> None:
    engines, manifest = store
    damage(engines.folder(manifest.key) / PACKAGE)
    with pytest.raises(EngineCorrupt, match=rf"engine.pt2 .*{message}.*rmd engines prune .*--broken && rmd build --x"):
        engines.check(manifest, HERE, "rmd build --x")
    (problem,) = engines.verify()
    assert problem.broken and problem.key == manifest.key and message in problem.message


def test_a_file_is_read_again_once_it_was_touched(
    store: tuple[EngineStore, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, manifest = store
    of, read = FileRecord.of, list[str]()
    monkeypatch.setattr(FileRecord, "of", classmethod(lambda kind, path: (read.append(path.name), of(path))[1]))
    engines.check(manifest, HERE, "rmd build")
    assert sorted(read) == sorted(manifest.files)
    read.clear()
    engines.check(manifest, HERE, "rmd build")
    assert read == [], "a plan of a large network has gigabytes"
    assert engines.verify() == [] and sorted(read) == sorted(manifest.files)
    path = engines.folder(manifest.key) / PACKAGE
    content = path.read_bytes()
    path.write_bytes(b"x" + content[1:])
    with pytest.raises(EngineCorrupt, match="was altered"):
        engines.check(manifest, HERE, "rmd build")
    (engines.root / ".locks" / f"{manifest.key}.read").write_text("{")
    path.write_bytes(content)
    engines.check(manifest, HERE, "rmd build")


def test_a_truncated_engine_is_built_again(store: tuple[EngineStore, Manifest], net: nn.Module) -> None:
    engines, manifest = store
    (engines.folder(manifest.key) / PACKAGE).write_bytes(b"")
    assert not engines.has(manifest.key)
    _, builder = eager_builder(net)
    with pytest.raises(EngineError, match=r"where .* was asked for"):
        engines.build(manifest.key, builder)  # it did call the builder, which here makes another engine


@pytest.mark.parametrize(
    ("target", "versions", "message"),
    [
        (replace(HERE, instruction_set=HERE.instruction_set + " avx99"), {}, "CPU instructions avx99"),
        (Target("cuda", HERE.platform, "", "9.0", "13.0", "580"), {}, "device cuda, here cpu"),
        (replace(HERE, platform="darwin-arm64"), {}, "platform darwin-arm64"),
        (HERE, {"torch": "1.0"}, "torch 1.0, here 2"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    store: tuple[EngineStore, Manifest], target: Target, versions: dict[str, str], message: str
) -> None:
    engines, manifest = store
    foreign = replace(
        manifest, spec=replace(manifest.spec, target=target, versions={**manifest.spec.versions, **versions})
    )
    with pytest.raises(EngineMismatch, match=rf"{message}.* Build it for this machine: rmd build --x"):
        engines.check(foreign, HERE, "rmd build --x")


def test_engines_for_another_device_are_foreign_and_damage_to_them_is_seen(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    store.build(key, builder)
    here = net_spec(net, "eager")
    there = replace(here, target=Target("cuda", HERE.platform, "", "9.9", "1.0", "1", "a GPU"))

    def as_if_on_a_gpu(folder: Path) -> Manifest:
        (folder / "note.txt").write_text("a plan")
        return replace(get_compiler("eager").build(net, here, folder), spec=there)

    store.build(there.key, as_if_on_a_gpu)
    (problem,) = store.verify()
    assert problem.key == there.key and not problem.broken and "was built for" in problem.message
    (store.folder(there.key) / "note.txt").write_text("A plan")
    assert store.has(there.key), "lengths alone do not tell"
    (problem,) = store.verify()
    assert problem.broken and "was altered" in problem.message
    assert "1 engines removed" in CliRunner().invoke(app, ["prune", "--broken", "--engines", str(tmp_path)]).output
    store.build(there.key, as_if_on_a_gpu)
    assert "1 engines removed" in CliRunner().invoke(app, ["prune", "--foreign", "--engines", str(tmp_path)]).output
    assert store.keys() == [key]


def test_pruning_removes_what_is_named_and_nothing_else(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    store.build(key, builder)
    assert store.prune(["absent"]) == []
    assert store.keys() == [key]
    assert store.prune([key]) == [key]
    assert leftovers(tmp_path) == [] and store.list() == []


def test_folders_that_are_no_engines_are_left_alone(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    store.build(key, builder)
    for name in ("embedded", key[:-1], key.upper() + "0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    assert store.keys() == [key] and store.verify() == []
    pruned = CliRunner().invoke(app, ["prune", "--all", "--broken", "--engines", str(tmp_path)])
    assert "1 engines removed" in pruned.output
    assert store.prune(["embedded"]) == []
    assert leftovers(tmp_path) == sorted(["embedded", key[:-1], key.upper() + "0"])


def test_an_engine_that_is_being_built_is_not_pruned(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    store.build(key, builder)
    with FileLock(tmp_path / ".locks" / f"{key}.lock"):
        assert store.prune([key]) == []
    assert store.keys() == [key]
    assert store.prune([key], lambda known: False) == [] and store.keys() == [key]


def test_an_engine_that_another_prune_took_meanwhile_is_no_error(net: nn.Module, tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    key, builder = eager_builder(net)
    store.build(key, builder)

    class Gone(EngineStore):
        def _lock(self, key: str, timeout: float = -1) -> FileLock:
            shutil.rmtree(self.folder(key), ignore_errors=True)
            return super()._lock(key, timeout)

    assert Gone(tmp_path).prune([key]) == []
    manifest = store.build(key, builder)
    with pytest.raises(EngineError, match="is not in"):
        Gone(tmp_path).update(manifest)


def test_measurements_are_replaced_and_files_are_not(store: tuple[EngineStore, Manifest]) -> None:
    engines, manifest = store
    engines.update(manifest.updated(latency_seconds={2: 0.5}))
    again = engines.get(manifest.key)
    assert again is not None and again.latency_seconds == {2: 0.5} and again.files == manifest.files
    assert engines.verify() == []
    with pytest.raises(EngineError, match="is not in"):
        EngineStore(engines.root / "other").update(manifest)


def test_a_store_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "none")
    assert store.list() == [] and store.keys() == [] and store.verify() == [] and store.prune([]) == []
    assert not (tmp_path / "none" / MANIFEST).exists()
