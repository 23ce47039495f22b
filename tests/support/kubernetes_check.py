"""Check Kubernetes files strictly: unknown keys, missing keys, types, ranges. usage: kubernetes_check.py FILE...

Prints {file: [problem]} as JSON. Run by the interpreter of ``.venv-launch``. The shapes are those of Kubeflow's own packages,
kubeflow-trainer-api (TrainJob) and kubeflow-training with kubernetes (PyTorchJob, ConfigMap), turned into JSON schemas that
forbid unknown keys, as ``kubectl apply --validate=strict`` does. These packages leave ranges out; RANGES adds those of the
CRDs, of the operators' webhooks, and of what an operator can carry out, as far as they matter to our files.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
from typing import Any

import jsonschema
import yaml

QUANTITY = {"type": ["string", "number"], "pattern": r"^[+-]?[0-9]+(\.[0-9]*)?([KMGTPE]i|[mkMGTPE]|[eE][+-]?[0-9]+)?$"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
SECONDS = {"type": "integer", "minimum": 0}

RANGES: dict[tuple[str, str], dict[str, Any]] = {
    # TrainJob, trainer.kubeflow.org/v1alpha1
    ("TrainerV1alpha1TrainJob", "apiVersion"): {"const": "trainer.kubeflow.org/v1alpha1"},
    ("TrainerV1alpha1TrainJobSpec", "activeDeadlineSeconds"): COUNT,
    ("TrainerV1alpha1Trainer", "numNodes"): COUNT,
    ("TrainerV1alpha1Trainer", "numProcPerNode"): COUNT,
    ("TrainerV1alpha1RuntimeRef", "kind"): {"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]},
    ("TrainerV1alpha1PodSpecPatch", "terminationGracePeriodSeconds"): SECONDS,
    # PyTorchJob, kubeflow.org/v1
    ("KubeflowOrgV1PyTorchJob", "apiVersion"): {"const": "kubeflow.org/v1"},
    ("KubeflowOrgV1PyTorchJobSpec", "nprocPerNode"): {"type": "string", "pattern": "^(auto|cpu|gpu|[1-9][0-9]*)$"},
    ("KubeflowOrgV1PyTorchJobSpec", "pytorchReplicaSpecs"): {
        "propertyNames": {"enum": ["Master", "Worker"]},
        "properties": {"Master": {"properties": {"replicas": {"const": 1}}}},
        "required": ["Master"],
    },
    ("KubeflowOrgV1ReplicaSpec", "replicas"): {**COUNT},
    ("KubeflowOrgV1ReplicaSpec", "restartPolicy"): {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    ("KubeflowOrgV1ReplicaSpec", "template"): {  # the operator finds its container by this name
        "properties": {
            "spec": {"properties": {"containers": {"contains": {"properties": {"name": {"const": "pytorch"}}}}}}
        }
    },
    ("KubeflowOrgV1RunPolicy", "cleanPodPolicy"): {"enum": ["All", "Running", "None"]},
    ("KubeflowOrgV1RunPolicy", "backoffLimit"): SECONDS,
    ("KubeflowOrgV1RunPolicy", "ttlSecondsAfterFinished"): SECONDS,
    ("V1PodSpec", "terminationGracePeriodSeconds"): SECONDS,
    ("V1Container", "imagePullPolicy"): {"enum": ["Always", "IfNotPresent", "Never"]},
    ("V1ResourceRequirements", "requests"): {"additionalProperties": QUANTITY},
    ("V1ResourceRequirements", "limits"): {"additionalProperties": QUANTITY},
    ("V1Container", "name"): NAME,
    ("V1Volume", "name"): NAME,
    ("V1ObjectMeta", "name"): NAME,
    ("IoK8sApimachineryPkgApisMetaV1ObjectMeta", "name"): NAME,
    ("V1ConfigMap", "apiVersion"): {"const": "v1"},
}


def trainjob_schema() -> dict[str, Any]:
    """Return the schema of a TrainJob: that of the pydantic model, with unknown keys forbidden."""
    from kubeflow_trainer_api import models

    schema: dict[str, Any] = models.TrainerV1alpha1TrainJob.model_json_schema(by_alias=True)
    for name, shape in {"TrainerV1alpha1TrainJob": schema, **schema["$defs"]}.items():
        if name.endswith("Quantity"):
            shape.clear()
            shape.update(QUANTITY)
        elif "properties" in shape:
            shape["additionalProperties"] = False
            for key, value in shape["properties"].items():
                # null is as good as leaving a key out; our files do that, and messages are the clearer for it
                kinds = [kind for kind in value.get("anyOf", ()) if kind != {"type": "null"}]
                shape["properties"][key] = _narrow(name, key, kinds[0] if len(kinds) == 1 else value)
    return schema


def swagger_schema(name: str) -> dict[str, Any]:
    """Return the schema of one of the generated classes of kubeflow-training or kubernetes, and of all that it refers to."""
    found: dict[str, Any] = {}
    _add_class(name, found)
    return {"$ref": f"#/$defs/{name}", "$defs": found}


def _add_class(name: str, found: dict[str, Any]) -> None:
    if name in found:
        return
    owner: Any = None
    for module in ("kubeflow.training.models", "kubernetes.client.models"):
        owner = owner or getattr(importlib.import_module(module), name, None)
    if owner is None:
        found[name] = {}  # the API's free forms, such as IntOrString
        return
    shape: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": {}}
    found[name] = shape
    for attribute, kind in owner.openapi_types.items():
        key = owner.attribute_map[attribute]
        shape["properties"][key] = _narrow(name, key, _of_kind(kind, found))
    # the setters refuse None for what is required
    wanted = re.findall(r"client_side_validation and (\w+) is None", inspect.getsource(owner))
    shape["required"] = [owner.attribute_map[attribute] for attribute in dict.fromkeys(wanted)]


def _of_kind(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    plain = {
        "str": "string",
        "int": "integer",
        "bool": "boolean",
        "float": "number",
        "object": None,
        "datetime": "string",
    }
    if kind in plain:
        return {"type": plain[kind]} if plain[kind] else {}
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": _of_kind(match[1], found)}
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": _of_kind(match[1], found)}
    _add_class(kind, found)
    return {"$ref": f"#/$defs/{kind}"}


def _narrow(name: str, key: str, shape: dict[str, Any]) -> dict[str, Any]:
    extra = RANGES.get((name, key))
    if extra is None:
        return shape
    USED.add((name, key))
    if "additionalProperties" in extra:  # in place of the type that the class gives
        return {"type": "object", **extra}
    return {"allOf": [shape, extra]}


USED: set[tuple[str, str]] = set()


@functools.cache
def schemas() -> dict[str, dict[str, Any]]:
    """Return the schema of each kind. AssertionError where a range is of a key that is no longer there."""
    found = {
        "TrainJob": trainjob_schema(),
        "PyTorchJob": swagger_schema("KubeflowOrgV1PyTorchJob"),
        "ConfigMap": swagger_schema("V1ConfigMap"),
    }
    assert RANGES.keys() == USED, f"ranges of unknown keys: {RANGES.keys() - USED}"
    return found


def problems_of(text: str) -> list[str]:
    """Return what is wrong with a file of one or several documents."""
    known, found = schemas(), []
    for document in yaml.safe_load_all(text):
        kind = document.get("kind")
        if kind not in known:
            found.append(f"kind is {kind!r}; one of {', '.join(known)} is needed")
            continue
        if not document.get("metadata", {}).get("name"):
            found.append(f"{kind}: no metadata.name")
        for error in jsonschema.Draft202012Validator(known[kind]).iter_errors(document):
            found.append(f"{kind}: {error.json_path}: {error.message}")
    return found


if __name__ == "__main__":
    checked = {}
    for path in sys.argv[1:]:
        with open(path) as file:
            checked[path] = problems_of(file.read())
    print(json.dumps(checked))
