"""The Helm chart as far as it can be checked without Helm: its values' schema, its README, its one source of rules."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from server.core.costs import CostTable
from server.core.policies import POLICIES, make_policy
from server.objects.place import read_place

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/rmd"
SETS = sorted((CHART / "ci").glob("*-values.yaml"))
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def validate(values: dict[str, Any]) -> None:
    Draft202012Validator(SCHEMA).validate(values)


def test_the_schema_is_one_and_takes_the_chart_s_own_values() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    validate(VALUES)


@pytest.mark.parametrize("file", SETS, ids=lambda file: file.stem)
def test_every_set_of_values_is_taken(file: Path) -> None:
    assert len(SETS) >= 5
    validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"serverz": []}, "serverz"),
        ({"image": {"tags": "1"}}, "tags"),
        ({"image": {"digest": "latest"}}, "latest"),
        ({"server": {"gpu": 1}}, "gpu"),
        ({"servers": [{"hardware": "cpu"}]}, "name"),
        ({"servers": [{"name": "a", "settings": {"queue_item": 64}}]}, "queue_item"),
        ({"server": {"settings": {"queue_items": "many"}}}, "many"),
        ({"server": {"settings": {"policy_": "fifo"}}}, "policy_"),
        ({"server": {"settings": {"backend": "egaer"}}}, "egaer"),
        ({"server": {"settings": {"api_keys": "secret"}}}, "api_keys"),
        ({"hardware": [{"name": "a", "engines": {"built": True}}]}, "built"),
        ({"networkPolicy": {"enable": False}}, "enable"),
        ({"server": {"autoscaling": {"maxReplica": 2}}}, "maxReplica"),
        ({"server": {"strategy": {"rollingUpdate": {"maxSurges": 1}}}}, "maxSurges"),
    ],
)
def test_a_typo_is_refused_by_its_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        validate(values)


def of(path: str, value: Any) -> dict[str, Any]:
    """Values with one at a path such as ``server.host``; entries of ``hardware`` need a name."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value if "hardware" not in value else {"hardware": [{"name": "a", **value["hardware"]}]}


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ("server.host", ["", "a", "a.example.org", "4a.xn--p1ai"], ["a..example", "10.0.0.1", ".a", "a.", "A", "::1"]),
        ("objects.secret", ["", "a", "a-1.b"], ["a..b", "a.", "-a"]),
        ("hardware.gpuProduct", ["", "NVIDIA-H200", "A100-SXM4-80GB_x.1"], ["NVIDIA H200", "a-", "a" * 64]),
        ("hardware.nodeSelector.zone", ["a", ""], ["a b"]),
        ("server.tmpSize", ["8Gi", "1.5Gi", "512Ki", "1e9", "100m", 5], ["1.2.3Gi", "1ki", ".", "Gi", "8 Gi", -1]),
        ("server.resources.limits.memory", ["8Gi", "8G"], ["1.2.3Gi", "8GB"]),
        ("server.checkpoints", [["/models/a"]], [["/models/a,/models/b"], [""]]),
        ("server.strategy.rollingUpdate.maxSurge", [1, "25%"], ["all", -1, 1.5]),
        ("server.strategy.rollingUpdate", [None, {}], ["25%"]),
    ],
)  # fmt: skip
def test_what_kubernetes_would_refuse_is_refused_before(path: str, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        validate(of(path, value))
    for value in wrong:
        with pytest.raises(ValidationError):
            validate(of(path, value))


def taken(read: Callable[[], object]) -> bool:
    try:
        read()
    except (ValueError, ValidationError):
        return False
    return True


@pytest.mark.parametrize(
    "text",
    [
        *POLICIES, "lifo", "", "fifo:8", "stagewise:1.5", "stagewise:", "stagewise:x", "dynamic:8", "dynamic:8:0.02",
        "dynamic:0", "dynamic:8:0.02:1", "dynamic:8:-1", "continuous:4", "continuous:4.5", "continuous:4:1",
    ],
)  # fmt: skip
def test_policies_are_the_server_s(text: str) -> None:
    told = of("server.settings.policy", text)
    assert taken(lambda: validate(told)) is taken(lambda: make_policy(text, CostTable({})))


@pytest.mark.parametrize(
    "text",
    [
        "videos", "/films", "a:b", "s3://", "s3:///films", "s3://films", "gs://films/all", "az://films?region=a",
        "s3://films?endpoint=http://minio:9000&region=eu-1", "http://films", "s3://me:word@films", "s3://?region=a",
    ],
)  # fmt: skip
def test_places_are_the_server_s(text: str) -> None:
    told = of("server.settings.objects", text)
    assert taken(lambda: validate(told)) is taken(lambda: read_place(text))


def test_the_schema_knows_the_server_s_settings() -> None:
    expected = runpy.run_path(str(ROOT / "scripts/chart_schema.py"))["settings_schema"]()
    assert SCHEMA["$defs"]["settings"] == expected, "run `python scripts/chart_schema.py`"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value


def documented() -> dict[str, str]:
    """The README's table: each value's path and default."""
    rows = [line.split("|") for line in (CHART / "README.md").read_text().splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): row[2].strip(" `") for row in rows}


def test_the_readme_names_every_value_and_its_default() -> None:
    told = documented()
    assert {path: json.dumps(default) for path, default in leaves(VALUES)} == {
        path: default for path, default in told.items() if "[]" not in path
    }
    entries = {name for name in told if name.startswith("hardware[].")}
    known = dict(leaves(SCHEMA["$defs"]["hardware"]["properties"]["engines"]["properties"])).keys()
    engines = {f"hardware[].engines.{name.split('.')[0]}" for name in known}
    rest = {f"hardware[].{name}" for name in SCHEMA["$defs"]["hardware"]["properties"]} - {"hardware[].engines"}
    assert entries == engines | rest


def test_rules_and_dashboard_are_the_ones_of_compose() -> None:
    assert (CHART / "files/rules.yml").resolve() == ROOT / "deploy/prometheus/rules.yml"
    assert (CHART / "files/rmd.json").resolve() == ROOT / "deploy/grafana/dashboards/rmd.json"
