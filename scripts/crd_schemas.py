"""Turn CustomResourceDefinitions into the small JSON schemas that tests/deploy holds the chart's custom resources to.

    python scripts/crd_schemas.py CRD.yaml ... --out tests/deploy/crds

Unknown fields are refused. Descriptions, defaults and the status are left out; a pod's template, which Kubernetes' own
schemas describe, is any object here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

KEPT = (
    "type", "properties", "required", "enum", "items", "additionalProperties", "pattern", "minimum", "maximum",
    "minLength", "maxLength", "minItems", "maxItems", "oneOf", "anyOf", "allOf", "not",
)  # fmt: skip


def closed(node: Any) -> Any:
    """The schema with what validates and no more, its objects closed."""
    if not isinstance(node, dict):
        return node
    if "containers" in node.get("properties", {}).get("spec", {}).get("properties", {}):
        return {"type": "object"}
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {word: node[word] for word in KEPT if word in node}
    if "properties" in kept:
        kept["properties"] = {name: closed(inner) for name, inner in kept["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    for word in ("items", "additionalProperties", "not"):
        if word in kept:
            kept[word] = closed(kept[word])
    return kept


def schema_of(definition: dict[str, Any], source: str) -> dict[str, Any]:
    """The schema of the definition's stored version."""
    names, group = definition["spec"]["names"], definition["spec"]["group"]
    version = next(each for each in definition["spec"]["versions"] if each["storage"])
    root = closed(version["schema"]["openAPIV3Schema"])
    root["properties"].pop("status", None)
    root["properties"]["metadata"] = {"type": "object"}
    root["required"] = ["apiVersion", "kind", "metadata", "spec"]
    root["properties"]["apiVersion"] = {"const": f"{group}/{version['name']}"}
    root["properties"]["kind"] = {"const": names["kind"]}
    return {"$comment": source, **root}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("definitions", nargs="+", type=Path)
    parser.add_argument("--source", required=True, help="repository and commit, kept in the schema")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    for file in options.definitions:
        for definition in filter(None, yaml.safe_load_all(file.read_text())):
            schema = schema_of(definition, options.source)
            name = definition["spec"]["names"]["singular"]
            (options.out / f"{name}.json").write_text(json.dumps(schema, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
