"""Who may import whom, and what may lie in the repository."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rmd", "training", "engines", "server", "cli", "loadtest")
ALLOWED = {
    "rmd": set(),
    "training": {"rmd"},
    "engines": {"rmd"},
    "server": {"rmd", "engines"},
    "cli": {"rmd", "training", "engines", "server"},
    "loadtest": set(),
}


def imported_packages(source: str) -> set[str]:
    """Top-level names a module imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_house_allows(package: str) -> None:
    for module in modules_of(package):
        foreign = imported_packages(module.read_text()) & set(PACKAGES) - {package} - ALLOWED[package]
        assert not foreign, f"{module.relative_to(ROOT)} imports {sorted(foreign)}"


def test_the_rule_sees_an_import_inside_a_function() -> None:
    assert imported_packages("def f():\n    from server.http.app import x\n") == {"server"}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_reads_pickles_or_runs_remote_code(package: str) -> None:
    for module in modules_of(package):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert imported_packages(ast.unparse(node)).isdisjoint({"pickle", "dill", "joblib"}), module
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert "trust_remote_code" not in keywords, module
            if ast.unparse(node.func) == "torch.load":
                weights_only = keywords.get("weights_only")
                assert isinstance(weights_only, ast.Constant) and weights_only.value is True, module


def test_no_pickled_weights_are_committed() -> None:
    if not (ROOT / ".git").exists():  # an unpacked source archive has no index to list
        tracked = [str(path) for path in (ROOT / "models").rglob("*")]
    else:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    assert not [name for name in tracked if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"))]
