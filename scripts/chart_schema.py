"""Write the server's settings into the chart's values.schema.json, so that Helm refuses a misspelt or wrong one.

python scripts/chart_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.compilers import BACKENDS
from server.start.settings import ServerSettings

SCHEMA = Path(__file__).parents[1] / "deploy/helm/rmd/values.schema.json"
# The chart sets these by values of its own; secrets come from Secrets.
OWN = {
    "host", "port", "checkpoint", "engines", "device", "devices", "videos", "allow_open", "api_keys", "video_database",
}  # fmt: skip
_NUMBER = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
# What the server refuses at its start is refused before anything is installed. Helm's patterns know no look-ahead.
BOUNDS: dict[str, dict[str, Any]] = {
    "backend": {"enum": list(BACKENDS)},
    "policy": {
        "pattern": rf"^(stagewise(:{_NUMBER})?|fifo|dynamic(:[1-9][0-9]*(:{_NUMBER})?)?|continuous(:[1-9][0-9]*)?)$"
    },
    "objects": {"anyOf": [{"not": {"pattern": "://"}}, {"pattern": "^(s3|gs|az)://[^/?#@:]+([/?#:][^@]*)?$"}]},
}


def settings_schema() -> dict[str, Any]:
    """The JSON schema of `settings`: the names, types and bounds of the server's own."""
    properties = ServerSettings.model_json_schema()["properties"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {**_plain(field), **BOUNDS.get(name, {})} for name, field in properties.items() if name not in OWN
        },
    }


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without its default, and without null, by which Helm says that a value is left out."""
    choices = [choice for choice in field.get("anyOf", []) if choice.get("type") != "null"]
    merged = {**field, **choices[0]} if len(choices) == 1 else field
    return {word: value for word, value in merged.items() if word not in ("title", "default", "format", "anyOf")}


def main() -> None:
    schema = json.loads(SCHEMA.read_text())
    schema["$defs"]["settings"] = settings_schema()
    SCHEMA.write_text(json.dumps(schema, indent=1) + "\n")


if __name__ == "__main__":
    main()
