"""Schemas for the files of `infra/`: those of Kubernetes come from a package, KubeRay's and Compose's are ours.

Each lists the fields that we use, with their types, and refuses every other one.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.33"
"""The oldest version for which the manifests are checked."""

STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
STRINGS = {"type": "array", "items": STRING}
MAP = {"type": "object", "additionalProperties": STRING}
SECONDS = {"type": "integer", "minimum": 0}


def fields(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """An object with these fields, some of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEMPLATE = {"type": "object", "required": ["spec"], "properties": {"metadata": {}, "spec": {"type": "object"}}}
"""A pod's template, which Kubernetes' own schema checks."""

NODES = fields(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=STRING,
    replicas=SECONDS,
    minReplicas=SECONDS,
    maxReplicas=SECONDS,
    idleTimeoutSeconds=SECONDS,
    rayStartParams=MAP,
    template=TEMPLATE,
)

CLUSTER = fields(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=STRING,
    authOptions=fields("mode secretName", mode={"enum": ["token"]}, secretName=STRING),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=SECONDS,
        resources={"type": "object"},
        securityContext={"type": "object"},
    ),
    headGroupSpec=fields(
        "rayStartParams template", serviceType={"enum": ["ClusterIP"]}, rayStartParams=MAP, template=TEMPLATE
    ),
    workerGroupSpecs={"type": "array", "items": NODES, "minItems": 1},
)

JOB = fields(
    "entrypoint rayClusterSpec backoffLimit shutdownAfterJobFinishes",
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    backoffLimit=SECONDS,
    preRunningDeadlineSeconds=SECONDS,
    activeDeadlineSeconds=SECONDS,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=SECONDS,
    submitterConfig=fields("backoffLimit", backoffLimit=SECONDS),
    submitterPodTemplate=TEMPLATE,
    rayClusterSpec=CLUSTER,
)

CRON_JOB = fields("schedule jobTemplate", schedule=STRING, timeZone=STRING, suspend=BOOLEAN, jobTemplate=JOB)

METADATA = fields("name namespace", name=STRING, namespace=STRING, labels=MAP)

KUBERAY = {
    kind: fields("apiVersion kind metadata spec", apiVersion=STRING, kind=STRING, metadata=METADATA, spec=spec)
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB), ("RayCronJob", CRON_JOB))
}
"""Schemas by kind, of KubeRay 1.7."""


def pod_templates(node: Any) -> list[dict[str, Any]]:
    """Every pod template below a node: what has a `spec` with containers."""
    if isinstance(node, list):
        return [template for entry in node for template in pod_templates(entry)]
    if not isinstance(node, dict):
        return []
    own = [node] if isinstance(node.get("spec"), dict) and "containers" in node["spec"] else []
    return own + [template for entry in node.values() for template in pod_templates(entry)]


def check_manifest(document: dict[str, Any]) -> None:
    """Check a manifest by the schemas, unknown fields refused, KubeRay's pods by Kubernetes' own.

    Raises:
        jsonschema.ValidationError: names the path and the field.
    """
    if document["apiVersion"].startswith("ray.io/"):
        jsonschema.validate(document, KUBERAY[document["kind"]])
        for template in pod_templates(document):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": template.get("metadata", {}),
                "spec": template["spec"],
            }
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


SCALARS = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
CONDITION = {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
COMMAND = {"anyOf": [STRING, STRINGS]}

SERVICE = fields(
    "image networks",
    image=STRING,
    build=fields("context dockerfile target", context=STRING, dockerfile=STRING, target=STRING, args=SCALARS),
    command=COMMAND,
    environment=SCALARS,
    ports=STRINGS,
    volumes=STRINGS,
    networks=STRINGS,
    secrets=STRINGS,
    profiles=STRINGS,
    shm_size=STRING,
    restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},
    cap_drop=STRINGS,
    security_opt=STRINGS,
    depends_on={"type": "object", "additionalProperties": fields("condition", condition=CONDITION)},
    healthcheck=fields(
        test=COMMAND, interval=STRING, timeout=STRING, retries=SECONDS, start_period=STRING, disable=BOOLEAN
    ),
    deploy=fields(
        resources=fields(
            reservations=fields(
                devices={
                    "type": "array",
                    "items": fields(
                        "capabilities", driver=STRING, count={"type": ["string", "integer"]}, capabilities=STRINGS
                    ),
                }
            )
        )
    ),
)

COMPOSE = {
    "type": "object",
    "properties": {
        "name": STRING,
        "services": {"type": "object", "additionalProperties": SERVICE},
        "networks": {"type": "object", "additionalProperties": fields()},
        "volumes": {"type": "object", "additionalProperties": fields()},
        "secrets": {"type": "object", "additionalProperties": fields(file=STRING, environment=STRING)},
    },
    "patternProperties": {"^x-": {}},
    "required": ["name", "services"],
    "additionalProperties": False,
}
"""Of the Compose specification, what we use."""
