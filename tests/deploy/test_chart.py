"""The Helm chart as far as it can be checked without Helm: its values' schema, its README, its one source of rules."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

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
        ({"server": {"settings": {"api_keys": "secret"}}}, "api_keys"),
        ({"hardware": [{"name": "a", "engines": {"built": True}}]}, "built"),
        ({"networkPolicy": {"enable": False}}, "enable"),
        ({"server": {"autoscaling": {"maxReplica": 2}}}, "maxReplica"),
    ],
)
def test_a_typo_is_refused_by_its_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        validate(values)


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
