"""The manifests of `infra/kuberay`, built by kustomize and checked without a cluster."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.command_lines import parse_command
from tests.support.manifests import check_manifest, pod_templates

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
FOLDERS = ("overlays/cpu", "overlays/gpu", "train", "raycronjob")

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, whose kustomize builds them, is absent"
)


@cache
def built(folder: str) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(KUBERAY / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(folder: str, kind: str) -> list[dict[str, Any]]:
    return [document for document in built(folder) if document["kind"] == kind]


def ray_pods() -> list[dict[str, Any]]:
    """Pod templates that start Ray."""
    documents = [document for folder in FOLDERS for document in built(folder) if document["apiVersion"] == "ray.io/v1"]
    return [
        pod for document in documents for pod in pod_templates(document) if pod["metadata"]["labels"]["role"] == "ray"
    ]


def every_pod() -> list[dict[str, Any]]:
    return [pod for folder in FOLDERS for document in built(folder) for pod in pod_templates(document)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_valid(folder: str) -> None:
    documents = built(folder)
    assert documents
    for document in documents:
        check_manifest(document)


def test_every_file_is_built_by_some_kustomization() -> None:
    named = {"kustomization.yaml"}
    for file in KUBERAY.rglob("kustomization.yaml"):
        content = yaml.safe_load(file.read_text())
        named |= {name for name in content["resources"] if name.endswith(".yaml")}
        named |= {patch["path"] for patch in content.get("patches", [])}
    assert {file.name for file in KUBERAY.rglob("*.yaml")} == named


@pytest.mark.parametrize(
    ("folder", "kind", "path"),
    [
        ("overlays/gpu", "RayCluster", "spec.maxReplicas"),
        ("overlays/gpu", "RayCluster", "spec.workerGroupSpecs.1.minReplica"),
        ("overlays/gpu", "RayCluster", "spec.headGroupSpec.template.spec.containers.0.envfrom"),
        ("train", "RayJob", "spec.backOffLimit"),
        ("train", "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.toleration"),
        ("raycronjob", "RayCronJob", "spec.concurrencyPolicy"),
        ("overlays/cpu", "CronJob", "spec.jobTemplate.spec.backofflimit"),
        ("overlays/cpu", "NetworkPolicy", "spec.ingres"),
    ],
)
def test_unknown_fields_are_refused(folder: str, kind: str, path: str) -> None:
    document = copy.deepcopy(of_kind(folder, kind)[0])
    *above, name = path.split(".")
    node: Any = document
    for part in above:
        node = node[int(part)] if part.isdigit() else node[part]
    node[name] = 1
    with pytest.raises(jsonschema.ValidationError, match=name):
        check_manifest(document)


def test_the_version_of_ray_is_that_of_the_image() -> None:
    (locked,) = re.findall(r"^ray==(\S+)", (ROOT / "infra" / "requirements.lock").read_text(), re.MULTILINE)
    texts = [file.read_text() for file in KUBERAY.rglob("*.yaml")]
    versions = {version for text in texts for version in re.findall(r"rayVersion: (\S+)", text)}
    assert versions == {locked}


def test_heads_do_no_work_and_gpus_come_and_go() -> None:
    (cluster,) = of_kind("overlays/gpu", "RayCluster")
    (job,), (cron,) = of_kind("train", "RayJob"), of_kind("raycronjob", "RayCronJob")
    for spec in (cluster["spec"], job["spec"]["rayClusterSpec"], cron["spec"]["jobTemplate"]["rayClusterSpec"]):
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in str(head["template"]), "a GPU of a head would be paid for and idle"
        assert spec["authOptions"]["mode"] == "token"
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert groups["gpu"]["minReplicas"] == 0 and groups["gpu"]["maxReplicas"] > 1 and groups["cpu"]["minReplicas"] > 0
    (small,) = of_kind("overlays/cpu", "RayCluster")
    assert "nvidia.com/gpu" not in str(small)


def test_a_training_is_repeated_and_an_evaluation_is_not() -> None:
    (job,), (cron,), (ray_cron,) = (
        of_kind("train", "RayJob"),
        of_kind("overlays/cpu", "CronJob"),
        of_kind("raycronjob", "RayCronJob"),
    )
    assert job["spec"]["backoffLimit"] > 0
    pods = cron["spec"]["jobTemplate"]["spec"]
    assert pods["backoffLimit"] == 0 and pods["template"]["spec"]["restartPolicy"] == "Never"
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    template = ray_cron["spec"]["jobTemplate"]
    assert template["backoffLimit"] == 0 and template["submitterConfig"]["backoffLimit"] == 0


def test_the_workers_of_a_training_fit_its_cluster() -> None:
    (job,) = of_kind("train", "RayJob")
    experiment = parse_command(job["spec"]["entrypoint"].split())
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == experiment.train.workers
    assert experiment.train.gpu == "yes" and experiment.storage.startswith("s3://") and experiment.name


def test_commands_are_those_of_the_programs() -> None:
    (cron,), (ray_cron,) = of_kind("overlays/cpu", "CronJob"), of_kind("raycronjob", "RayCronJob")
    words = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
    for options in (parse_command(words), parse_command(ray_cron["spec"]["jobTemplate"]["entrypoint"].split())):
        assert options.once and options.promote and options.reference == "models:/street@champion"
        assert options.out.startswith("s3://") and options.data.root.startswith("s3://")
    (server,) = of_kind("overlays/cpu", "Deployment")
    served = parse_command(server["spec"]["template"]["spec"]["containers"][0]["args"])
    assert served["app_name"] == "basic-auth" and "*" not in served["allowed_hosts"]
    with pytest.raises(ValueError, match="referenze"):
        parse_command([word.replace("--reference", "--referenze") for word in words])


def test_secrets_are_only_named() -> None:
    named = set()
    for pod in every_pod():
        for container in pod["spec"]["containers"]:
            for entry in container.get("env", []):
                secret = re.search(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY", entry["name"])
                assert not (secret and "value" in entry), f"{entry['name']} has its value in the file"
                named.add(entry.get("valueFrom", {}).get("secretKeyRef", {}).get("name"))
            named |= {entry.get("secretRef", {}).get("name") for entry in container.get("envFrom", [])}
        named |= {volume.get("secret", {}).get("secretName") for volume in pod["spec"].get("volumes", [])}
    assert named - {None} == {"panoptic-ray", "panoptic-client", "panoptic-server", "panoptic-s3"}
    assert not [document for folder in FOLDERS for document in of_kind(folder, "Secret")]
    (environment, _) = of_kind("overlays/cpu", "ConfigMap")[::-1]
    assert not re.search(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY", str(environment["data"]))


def test_pods_run_without_privileges() -> None:
    for pod in every_pod():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True and security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, container["name"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"requests", "limits"} <= set(container["resources"]), container["name"]
    for pod in ray_pods():  # Ray's object store lies there; Kubernetes' default is 64 MiB
        heads = [c for c in pod["spec"]["containers"] if c["name"] == "ray-head"]
        assert heads or any(v.get("emptyDir", {}).get("medium") == "Memory" for v in pod["spec"]["volumes"])


def test_every_port_is_reached_by_those_that_need_it_alone() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("overlays/cpu", "NetworkPolicy")}
    assert policies["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for service in of_kind("overlays/cpu", "Service"):
        name = service["metadata"]["name"]
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        (rule,) = policies[name]["ingress"]
        assert [port["port"] for port in rule["ports"]] == [port["port"] for port in service["spec"]["ports"]]
        assert policies[name]["podSelector"]["matchLabels"] == service["spec"]["selector"]
    labels = [pod["metadata"]["labels"] for pod in every_pod()]
    for policy in policies.values():
        chosen = policy["podSelector"].get("matchLabels", {})
        assert any(chosen.items() <= entry.items() for entry in labels), f"no pod has the labels {chosen}"
