"""Which fields a RayJob has, as compact JSON: `kuberay_names.json`, of KubeRay 1.7's `ray.io/v1`.

    {"name": "string", "name*": ...required, "list": [item], "map": {"<any>": value},
     "choice": "=one|another", "shared": "#Definition"}

Made from the operator's definition by

    python tests/support/kuberay_names.py ray.io_rayjobs.yaml > tests/support/kuberay_names.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

NAMES = Path(__file__).with_suffix(".json")
_EITHER = "integer|string"


def validation_schema(root: str) -> dict[str, Any]:
    """A JSON schema that refuses unknown fields, as the API server drops them."""
    names = json.loads(NAMES.read_text())
    definitions = {name: _schema_of(value) for name, value in names.items()}
    return {"$ref": f"#/$defs/{root}", "$defs": definitions}


def _schema_of(names: Any) -> dict[str, Any]:
    if isinstance(names, list):
        return {"type": "array", "items": _schema_of(names[0])}
    if isinstance(names, dict):
        if "<any>" in names:
            return {"type": "object", "additionalProperties": _schema_of(names["<any>"])}
        return {
            "type": "object",
            "properties": {name.rstrip("*"): _schema_of(value) for name, value in names.items()},
            "required": [name.rstrip("*") for name in names if name.endswith("*")],
            "additionalProperties": False,
        }
    if names.startswith("#"):
        return {"$ref": f"#/$defs/{names[1:]}"}
    if names.startswith("="):
        return {"enum": names[1:].split("|")}
    return {} if names == "any" else {"type": names.split("|")}


def names_of(definition: dict[str, Any]) -> dict[str, Any]:
    """The names in an operator's definition of a custom resource, pods and containers once."""
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    shared = {
        "PodTemplate": properties["spec"]["properties"]["submitterPodTemplate"],
    }
    shared["Pod"] = shared["PodTemplate"]["properties"]["spec"]
    shared["Container"] = shared["Pod"]["properties"]["containers"]["items"]
    found = {name: _names_of(value, shared, {name}) for name, value in shared.items()}
    spec = _names_of(properties["spec"], shared, set())
    job = {"apiVersion": "string", "kind": "string", "metadata": "object", "spec": spec}
    return {"RayJob": job, **found}


def _names_of(schema: dict[str, Any], shared: dict[str, Any], inside: set[str]) -> Any:
    for name, value in shared.items():
        if name not in inside and schema == value:
            return f"#{name}"
    if schema.get("x-kubernetes-int-or-string"):
        return _EITHER
    if "enum" in schema:
        return "=" + "|".join(schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return [_names_of(schema["items"], shared, set())]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        required = schema.get("required", ())
        return {
            name + "*" * (name in required): _names_of(value, shared, set())
            for name, value in sorted(schema["properties"].items())
        }
    if isinstance(values := schema.get("additionalProperties"), dict):
        return {"<any>": _names_of(values, shared, set())}
    return kind


def main() -> None:
    """Prints the names in the file of a definition, one shared part a line."""
    definition = yaml.load(
        Path(sys.argv[1]).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
        for name, value in names_of(definition).items()
    ]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
