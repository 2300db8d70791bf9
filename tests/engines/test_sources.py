"""What makes an engine another one: our own code, the files of its network, variables and options of the compiler."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from engines.compilers import COMPILERS, get_compiler
from engines.compilers.exported import package
from engines.compilers.inductor import settings as told
from engines.compilers.inductor.settings import known_options
from engines.errors import EngineError
from engines.sources import module_digest, with_helpers
from engines.spec import graph_digest
from engines.target import Target
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_decoder, write_tiny_folder
from tests.engines.conftest import Net, net_request, net_spec

# Imported by compilers, and yet without a say in what an engine computes.
WITHOUT_A_SAY = {
    "engines.compilers.base",
    "engines.compilers.engine",
    "engines.compilers.examples",
    "engines.errors",
    "engines.manifest",
    "engines.spec",
    "engines.stopwatch",
    "engines.target",
    "engines.tracks",
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that can be imported, written anew and imported again."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("a_network", "helpers_of_it"):
        sys.modules.pop(name, None)


def digest_of(source: str, folder: Path, name: str = "a_network") -> str:
    (folder / f"{name}.py").write_text(source)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    module_digest.cache_clear()
    with_helpers.cache_clear()
    return graph_digest(importlib.import_module(name).Network())


NETWORK = """
from torch import nn

def twice(x):
    return 2 * x

class Network(nn.Module):
    def forward(self, x):
        return twice(x)
"""


def test_a_function_beside_the_network_is_part_of_it(written: Path) -> None:
    digest = digest_of(NETWORK, written)
    assert digest_of(NETWORK, written) == digest
    assert digest_of(NETWORK.replace("2 * x", "2 * x + 1"), written) != digest


def test_a_function_from_a_neighbouring_file_is_part_of_it() -> None:
    assert "diffusers.models.embeddings" in with_helpers("diffusers.models.transformers.transformer_flux")
    assert with_helpers("torch.nn.modules.linear") == ("torch.nn.modules.linear",)


def test_settings_in_lists_and_the_kind_of_attention_are_part_of_it() -> None:
    def with_setting(name: str, value: object) -> str:
        module = Net()
        setattr(module, name, value)
        return graph_digest(module)

    assert with_setting("skips", [1, 2]) != with_setting("skips", [1, 3])
    assert with_setting("_attn_implementation", "sdpa") != with_setting("_attn_implementation", "eager")
    assert with_setting("_chunk_size", 2) != graph_digest(Net())
    assert with_setting("_seen", 3) == graph_digest(Net())


def test_comments_and_docstrings_of_our_own_code_are_no_part_of_a_key(tmp_path: Path) -> None:
    path = Path(importlib.import_module("engines.build.progress").__file__ or "")
    before = module_digest("engines.build.progress")
    text = path.read_text()
    module = sys.modules["engines.build.progress"]
    changed = tmp_path / "progress.py"
    for source, same in (
        ("# a comment\n" + text.replace("Where a build stands", "Where it stands"), True),
        (text.replace("current: str", "present: str"), False),
    ):
        changed.write_text(source)
        module_digest.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert (module_digest("engines.build.progress") == before) is same
    module_digest.cache_clear()


@pytest.mark.parametrize("name", ["embedded", "embedded-video"])
def test_a_small_decoders_key_holds_its_graphs_file_and_none_that_reads_folders(tmp_path: Path, name: str) -> None:
    """A word in what reads a diffusers folder had every small decoder built anew."""
    folder, small = write_tiny_folder(name, tmp_path / "tiny"), write_tiny_decoder(name, tmp_path / "small")
    backbone, _ = load_checkpoint(folder, dtype=torch.float32, decoder=small, weights=False)
    decoder = backbone.component_modules()["decoder"]
    before = graph_digest(decoder)

    def with_a_line_more(module: str) -> str:
        changed = tmp_path / "changed.py"
        changed.write_text(Path(sys.modules[module].__file__ or "").read_text() + "\nONE_MORE = 1\n")
        module_digest.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[module], "__file__", str(changed))
            digest = graph_digest(decoder)
        module_digest.cache_clear()
        return digest

    readers = ("folder", "decoders", "random_weights", "family", "registry")
    for module in (*(f"rmd.backbones.{reader}" for reader in readers), "rmd.weight_files", "rmd.checkpoint"):
        assert with_a_line_more(module) == before, module
    assert with_a_line_more(type(decoder).__module__) != before
    assert with_a_line_more("diffusers.models.autoencoders.vae") != before


@pytest.mark.parametrize("name", COMPILERS)
def test_every_module_that_a_compiler_needs_has_a_say_or_is_known_to_have_none(name: str) -> None:
    kind = COMPILERS[name]
    found, todo = set[str](), [kind.__module__]
    while todo:
        module = todo.pop()
        if module in found or module in WITHOUT_A_SAY or not module.startswith("engines"):
            continue
        found.add(module)
        tree = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text())
        todo += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert found - {"engines.compilers.tensorrt.rtx"} == set(kind.sources)


def test_variables_for_the_compiler_are_part_of_the_key(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    key = net_spec(net).key
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "1")
    assert net_spec(net).key == key, "workers have those, and make the same engines"
    monkeypatch.setenv("TORCHINDUCTOR_CPP_WEIGHT_PREPACK", "0")
    assert net_spec(net).settings["TORCHINDUCTOR_CPP_WEIGHT_PREPACK"] == "0" and net_spec(net).key != key
    assert net_spec(net, "eager").key == net_spec(net, "eager").key


def test_options_that_this_torch_does_not_have_are_left_out_of_key_and_build(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Older versions lack the one for the host's instructions, and refuse to hear of it."""
    asked = {"freezing": True, "cpp.threads": 1, "cpp.no_such_option": 2, "no_such_part.option": 3}
    assert known_options(asked) == {"freezing": True, "cpp.threads": 1}
    gpu = Target("cuda", "linux-x86_64", "", "9.0", "13.0", "580", "a GPU")
    request = net_request(net)
    request = type(request)(**{**vars(request), "target": gpu})
    settings = get_compiler("inductor").settings(request)
    assert settings["inductor.cpp.march"] == "" and "host" not in settings
    monkeypatch.setattr(told, "_ANY_HOST", {"cpp.no_such_option": ""})
    older = get_compiler("inductor").settings(request)
    assert "inductor.cpp.no_such_option" not in older and older["host"], "then its host code is for this processor"
    program = torch.export.export(nn.Linear(2, 2).requires_grad_(False), (torch.ones(1, 2),))
    monkeypatch.setattr("engines.compilers.exported._NEEDED", ("cpp.no_such_option",))
    with pytest.raises(EngineError, match=r"has no option 'cpp\.no_such_option', which keeps weights outside"):
        package(program, tmp_path / "engine.pt2", {"freezing": True})
