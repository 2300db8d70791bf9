"""What a lent GPU is asked: whatever a case does, the report keeps what came before, and the others run."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.gpu.backends import backend
from bench.gpu.case import Context, relative_l2
from bench.gpu.cases import CASES, Case, find
from bench.gpu.fp8 import ScaledLinear, scale_linears
from bench.gpu.harness import Settings, main, run_cases, verdict

ROWS = """
    import json, os, signal, sys, time
    def row(**given):
        with open(sys.argv[1], "a") as file:
            print(json.dumps(given), file=file, flush=True)
"""
SCRIPTS = {
    "well": 'row(what="first", ms=1.5, error=2e-3)\nrow(what="second", failed="out of memory | here")',
    "crashing": 'row(what="before", ms=2.0)\nprint("here it dies", flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)',
    "hanging": """
        import subprocess
        row(what="before", ms=3.0)
        child = subprocess.Popen(["sleep", "600"])
        row(what="child", pid=child.pid)
        with open(sys.argv[1], "a") as file:
            file.write('{"what": "half-wri')
            file.flush()
            time.sleep(600)
    """,
    "raising": 'raise RuntimeError("no such kernel")',
}


def script(case: Case, rows: Path) -> Sequence[str]:
    return [sys.executable, "-c", textwrap.dedent(ROWS) + textwrap.dedent(SCRIPTS[case.name]), str(rows)]


def test_a_case_that_crashes_or_hangs_costs_its_own_later_rows_alone(tmp_path: Path) -> None:
    cases = [Case(name, 1, 2.0 if name == "hanging" else 60.0, "nothing", "") for name in SCRIPTS]
    ends: list[str] = []
    run_cases(cases, Settings("cpu", "tiny", tmp_path), script, ends.append)
    content = json.loads((tmp_path / "gpu-1.json").read_text())
    found = {entry["case"]: entry for entry in content["cases"]}
    assert {name: entry["ended"] for name, entry in found.items()} == {
        "well": "done",
        "crashing": "died: SIGSEGV",
        "hanging": "stopped after 2 s",
        "raising": "failed with exit code 1",
    }
    assert [len(entry["rows"]) for entry in found.values()] == [2, 1, 2, 0] and len(ends) == 4
    assert found["crashing"]["said"] == ["here it dies"]
    assert "RuntimeError: no such kernel" in found["raising"]["said"][-1]
    child = found["hanging"]["rows"][1]["pid"]
    gone = Path(f"/proc/{child}/stat")
    assert not gone.exists() or gone.read_text().split()[2] == "Z", "what a case started ends with it"
    table = (tmp_path / "gpu-1.md").read_text()
    assert (
        "| well | first | 1.5 | error 0.002 |" in table and "| crashing | *died: SIGSEGV* | | here it dies |" in table
    )


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    content = run_cases([Case("well", 2, 60.0, "nothing", "")], Settings("cpu", "tiny", tmp_path, minutes=0.1), script)
    assert content["cases"][0]["ended"] == "not begun: out of time" and (tmp_path / "gpu-2.md").is_file()


def test_the_harness_needs_no_torch_and_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = "import sys, bench.gpu.harness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(case.name in listed for case in CASES)
    with pytest.raises(ValueError, match="no case 'decode'; there are machine, decoder, "):
        find("decode")


@pytest.mark.parametrize(
    ("dead", "said"),
    [
        ("", "works here in every stage"),
        ("compile load run inside replay", "does not compile here"),
        ("load run replay", "the fault is in how they are given"),
        ("run inside replay", "the version's own fault"),
        ("replay", "cannot be recorded"),
    ],
)
def test_the_stages_say_which_suspect_is_left(dead: str, said: str) -> None:
    stages = ("compile", "load", "run", "inside", "replay")
    ended = {f"aoti-{stage}": "died: SIGSEGV" if stage in dead.split() else "done" for stage in stages}
    assert said in verdict(ended)
    assert verdict({**ended, "aoti-replay": "running"}) == ""
    assert verdict({**ended, "aoti-compile": "not begun: out of time"}) == ""


def test_a_backend_is_asked_by_the_interface_that_serves(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), "tiny", tmp_path)
    rows = {row["what"]: row for row in backend(context, "eager")}
    assert list(rows) == ["built for batch 1, 2, 4", "batch 1", "batch 2", "batch 4", "with other weights"]
    assert all(rows[f"batch {batch}"]["relative L2"] == 0.0 for batch in (1, 2, 4))
    assert rows["with other weights"]["relative L2"] == 0.0
    (absent,) = backend(context, "tensorrt")
    assert absent["not here"] == "tensorrt engines run on NVIDIA GPUs, not on the cpu"


def test_fp8_layers_are_as_near_as_their_three_bits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 20), nn.Linear(20, 64, bias=False))
    given = torch.randn(2, 5, 64)
    expected = network(given)
    assert scale_linears(network, 16) == 1 and isinstance(network[0], ScaledLinear), "20 is no multiple of 16"
    assert network(given).shape == expected.shape
    assert 1e-4 < relative_l2(network(given), expected) < 0.05
