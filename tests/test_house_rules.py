"""Who may import whom, and what may lie in the repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rmd", "training", "engines", "server", "bench", "cli", "loadtest", "deploy")
ALLOWED = {
    "rmd": set(),
    "training": {"rmd"},
    "engines": {"rmd"},
    "server": {"rmd", "engines"},
    "bench": {"rmd", "engines", "server"},
    "cli": {"rmd", "training", "engines", "server", "bench"},
    "loadtest": set(),
    "deploy": {"server"},
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


def imported_modules(source: str) -> set[str]:
    """Full names of the modules that a module imports, and of what it takes out of them; not those for types alone."""
    tree, names = ast.parse(source), set[str]()
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


HTTP = ("fastapi", "starlette", "uvicorn", "httpx")
WALLS = {
    # The scheduler decides, and knows of no device and no client: what drives it may be an engine or a simulator.
    "server/core": (
        "torch",
        *HTTP,
        "server.device",
        "server.front",
        "server.http",
        "server.films",
        "server.start",
        "server.telemetry",
    ),
    # An engine process hears of the world through its door only.
    "server/device": (
        *HTTP,
        "server.front",
        "server.http",
        "server.films",
        "server.start",
        "server.telemetry",
        "engines.build",
    ),
    "server/front": ("torch", *HTTP, "server.http"),
    "server/telemetry": ("torch", *HTTP, "server.device", "server.front", "server.http", "server.films"),
    # Engines: weights, then compilers, then plans and running, then building; who serves needs none of the last.
    "engines/weights": ("engines.compilers", "engines.plan", "engines.run", "engines.build"),
    "engines/compilers": ("engines.store", "engines.plan", "engines.run", "engines.build"),
    "engines/plan": ("engines.run", "engines.build"),
    "engines/run": ("engines.build",),
}


@pytest.mark.parametrize("room", WALLS)
def test_no_arrow_points_the_wrong_way_between_rooms(room: str) -> None:
    for module in modules_of(room):
        for name in imported_modules(module.read_text()):
            for forbidden in WALLS[room]:
                assert name != forbidden and not name.startswith(f"{forbidden}."), f"{module.relative_to(ROOT)}: {name}"


def test_the_front_and_the_scheduler_start_without_torch() -> None:
    """Seconds of every start, and hundreds of megabytes beside every engine."""
    for modules in (
        "server.core.loop, server.core.policies",
        "server.front.service, server.http.app, server.start.run",
    ):
        script = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0, modules


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_are_small(package: str) -> None:
    lengths = {module.relative_to(ROOT): len(module.read_text().splitlines()) for module in modules_of(package)}
    assert {module: length for module, length in lengths.items() if length > 400} == {}


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
