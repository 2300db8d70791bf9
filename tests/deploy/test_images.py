"""The image and the compose files: what is installed is held to digests, and the tools that read them find nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.telemetry.machine import COMMIT_VARIABLE

ROOT = Path(__file__).parents[2]
LOCKS = {name: ROOT / f"deploy/image/{name}.txt" for name in ("requirements", "torch-cpu", "torch-cuda")}
PINNED = re.compile(r"^([\w.-]+)==(\S+)(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of digests of every package of a lock file."""
    found = PINNED.findall(LOCKS[name].read_text())
    return {canonicalize_name(each): (version, rest.count("--hash=sha256:")) for each, version, rest in found}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_file_has_a_digest(name: str) -> None:
    packages = locked(name)
    assert packages and all(digests for _, digests in packages.values())


@pytest.mark.parametrize("torch", ["torch-cpu", "torch-cuda"])
def test_the_lock_files_hold_what_the_project_asks_for(torch: str) -> None:
    packages = {**locked("requirements"), **locked(torch)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        version, _ = packages.get(canonicalize_name(requirement.name), ("", 0))
        told = f"{requirement} is not what deploy/image has ({version or 'nothing'}): python scripts/lock_image.py"
        assert version and requirement.specifier.contains(version), told
    assert not locked("requirements").keys() & locked(torch).keys()


def test_the_image_is_given_all_that_it_copies() -> None:
    """.dockerignore lets in what it names alone."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"rmd", "bench", "deploy/image/requirements.txt"} <= sources
    for source in sources:
        assert any(source == name or source.startswith(f"{name}/") for name in let_in), source
        assert list(ROOT.glob(source)), source


def test_the_image_tells_the_commit_that_it_was_built_from() -> None:
    """It is no checkout, so the server could only say "unknown"."""
    final = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    given = final.index(f"ARG {COMMIT_VARIABLE}=")
    assert final.index(f"ENV {COMMIT_VARIABLE}=${{{COMMIT_VARIABLE}}}") > given
    assert f'revision="${{{COMMIT_VARIABLE}}}"' in final[given:]
    server = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["rmd"]
    assert server["build"]["args"][COMMIT_VARIABLE] == "${RMD_COMMIT:-unknown}"


def run(*command: str) -> str:
    """The output of one of the tools that come with this Python, which must be content."""
    tool = shutil.which(command[0], path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip(f"needs {command[0]}: pip install -e '.[kubernetes]'")
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint_finds_nothing() -> None:
    run("hadolint", "Dockerfile")


def test_compose_lint_finds_nothing_that_is_not_explained() -> None:
    run("compose-lint", "check", "--fail-on", "low", "docker-compose.yml")


def test_two_servers_share_their_stores_behind_the_balancer() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    one, two, balancer = (services[name] for name in ("one", "two", "balancer"))
    assert one == two and not one.get("ports") and one["stop_grace_period"] == services["rmd"]["stop_grace_period"]
    assert set(one["depends_on"]) == {"postgres", "s3"} <= set(services)
    assert "@postgres/" in one["environment"]["RMD_VIDEO_DATABASE"]
    assert "endpoint=http://s3:8333" in one["environment"]["RMD_OBJECTS"]
    assert "-s3.port=8333" in services["s3"]["command"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert one["environment"][name] == services["s3"]["environment"][name]
    asked = set(re.findall(r'"\$\{(RMD_\w+)-', (ROOT / "deploy/haproxy/haproxy.cfg").read_text()))
    assert asked == set(balancer["environment"])
    assert balancer["environment"]["RMD_ONE"] == "one:8000" and balancer["environment"]["RMD_TWO"] == "two:8000"
