"""What tests need of a custom resource's definition: `python prune.py CRD.yaml VERSION [FIELD.PATH...] > KIND.json`.

Descriptions and status go. A pod's specification, which is nine tenths of such a file, becomes an empty schema: tests
hold pods against Kubernetes' own. A FIELD.PATH that bundles do not use may only be empty.
"""

import json
import sys
from typing import Any

import yaml

_KEPT = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string")


def main() -> None:
    """Read a definition, write the schema of one version on a line for each field."""
    path, version, *unused = sys.argv[1:]
    with open(path, encoding="utf-8") as stream:  # noqa: PTH123
        crd = yaml.load(stream, Loader=yaml.CSafeLoader)
    found = next(each for each in crd["spec"]["versions"] if each["name"] == version)
    schema = pruned(found["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    for field in unused:
        here = schema
        *parents, last = field.split(".")
        for parent in parents:
            here = here["properties"][parent]
        here["properties"][last] = {"type": "object", "maxProperties": 0}
    print(json.dumps(schema, separators=(",", ":")).replace('},"', '},\n"'))  # noqa: T201


def pruned(node: Any) -> Any:
    """The part of a schema that accepts and refuses."""
    if isinstance(node, list):
        return [pruned(each) for each in node]
    if not isinstance(node, dict):
        return node
    fields = node.get("properties")
    if isinstance(fields, dict) and {"containers", "nodeSelector"} <= fields.keys():
        return {}
    kept = {k: v for k, v in node.items() if k not in ("description", "default", "properties")}
    kept = {k: pruned(v) for k, v in kept.items() if not k.startswith("x-kubernetes") or k in _KEPT}
    return kept | (
        {"properties": {name: pruned(field) for name, field in fields.items()}} if fields is not None else {}
    )


if __name__ == "__main__":
    main()
