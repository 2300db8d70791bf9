"""The load test against a real server: arrivals do not wait for replies, and every reply is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rmd.backbones.tiny import tiny_cascades, write_tiny_folder
from rmd.cascade_file import write_cascade_json
from server.device.model import DeviceModel
from tests.server.conftest import load_on_cpu, make_settings
from tests.server.house import House, serving

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeviceModel:
    folder = write_tiny_folder("sd3", tmp_path_factory.mktemp("load") / "tiny")
    write_cascade_json(folder, backbone="sd3", cascades=tiny_cascades("sd3"), default="2+2")
    return load_on_cpu(make_settings(folder, max_batch=2))


def start(house: House, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(LOCUSTFILE),
        "--headless",
        "--host",
        house.url,
        "--json",
        "-t",
        "3s",
    ]
    environment = {**os.environ, "RMD_API_KEY": "secret"}
    return subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    output, _ = process.communicate(timeout=120)
    account, _, stats = output.partition("[")
    (route,) = json.loads("[" + stats)
    return route, account


def test_people_arrive_while_nothing_is_answered_and_all_are_waited_for(model: DeviceModel, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, api_keys="secret")
    with serving(model, settings) as house:
        house.gate.close()
        process = start(house, "-u", "2", "-r", "2", "--rate", "4", "--schedule", "2+2")
        house.until(lambda: house.service.admission.items >= 6, "six who wait at once, of two users")
        time.sleep(4)  # longer than the test lasts: nobody comes any more, and nobody has been answered
        assert house.metric("rmd_pictures_total") == 0 and house.service.admission.items >= 6
        house.gate.open()
        route, account = finish(process)
        assert route["num_failures"] == 0 and route["num_requests"] == house.metric(
            "rmd_pictures_total", schedule="2+2"
        )
    assert f"schedule 2+2: {route['num_requests']} pictures" in account and "batches at 32x32" in account


def test_refusals_are_failures_by_name(model: DeviceModel, tmp_path: Path) -> None:
    with serving(model, make_settings(tmp_path, api_keys="other")) as house:
        process = start(house, "-u", "1", "--rate", "5")
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "401 invalid_api_key" in output + errors
