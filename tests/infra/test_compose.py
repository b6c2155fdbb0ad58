"""`infra/compose.yaml`: known fields only, real commands, secrets by reference, nothing published but to loopback."""

from __future__ import annotations

import configparser
import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.command_lines import parse_command
from tests.support.manifests import COMPOSE

INFRA = Path(__file__).resolve().parents[2] / "infra"
TEXT = (INFRA / "compose.yaml").read_text()
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)


def words(service: str) -> list[str]:
    command = CONFIG["services"][service]["command"]
    return shlex.split(command) if isinstance(command, str) else command


def test_it_is_valid() -> None:
    jsonschema.validate(CONFIG, COMPOSE)
    services = CONFIG["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        assert set(service.get("secrets", [])) <= set(CONFIG["secrets"]), name
        for needed, how in service.get("depends_on", {}).items():
            checked = (
                "healthcheck" in services[needed] or "build" in services[needed]
            )  # the image has a check of its own
            assert how["condition"] != "service_healthy" or checked, f"{name} waits for {needed}, which has no check"


@pytest.mark.parametrize("path", ["service", "services.head.enviroment", "services.mlflow.healthcheck.intervall"])
def test_unknown_fields_are_refused(path: str) -> None:
    changed: Any = copy.deepcopy(CONFIG)
    node, (*above, name) = changed, path.split(".")
    for part in above:
        node = node[part]
    node[name] = {}
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(changed, COMPOSE)


def test_commands_are_those_of_the_programs() -> None:
    head, worker, gpu = (parse_command(words(name)) for name in ("head", "worker", "gpu-worker"))
    assert head["head"] and head["num_cpus"] == 0 and head["block"]
    assert worker["address"] == gpu["address"] == f"head:{head['port']}"
    assert head["metrics_export_port"] == worker["metrics_export_port"]
    server = parse_command(words("mlflow"))
    assert server["app_name"] == "basic-auth" and "*" not in server["allowed_hosts"]
    compile(words("bucket")[-1], "bucket", "exec")


def test_only_loopback_is_published() -> None:
    for name, service in CONFIG["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["networks"] == ["cluster"], name


def test_ray_asks_for_a_token_and_secrets_come_from_outside() -> None:
    for name in ("head", "worker", "gpu-worker"):
        assert CONFIG["services"][name]["environment"]["RAY_AUTH_MODE"] == "token"
    for service in CONFIG["services"].values():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY", key):
                assert re.fullmatch(r"\$\{\w+:\?.*\}|/run/secrets/\w+", value), f"{key}: {value}"
    needed = set(re.findall(r"\$\{(\w+):\?", TEXT)) | {
        entry["environment"] for entry in CONFIG["secrets"].values() if "environment" in entry
    }
    example = (INFRA / "compose.env.example").read_text()
    assert needed <= set(re.findall(r"^(\w+)=$", example, re.MULTILINE)), "infra/compose.env.example leaves some out"
    ignored = (INFRA.parent / ".gitignore").read_text().split()
    assert {"/infra/.env", "/infra/s3-identities.json"} <= set(ignored)


def test_the_stores_of_mlflow_name_their_driver() -> None:
    """SQLAlchemy 2.1 takes `postgresql://` for psycopg 3, which the extra `server` does not hold."""
    texts = [file.read_text() for file in INFRA.rglob("*") if file.suffix in (".yaml", ".ini")]
    stores = [uri for text in texts for uri in re.findall(r"postgresql[^:]*://\S+", text)]
    assert len(stores) == 4 and {uri.strip('"}') for uri in stores} == {
        "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
    }
    _, config_map = yaml.safe_load_all((INFRA / "kuberay" / "base" / "environment.yaml").read_text())
    texts = [config_map["data"]["auth.ini"], (INFRA / "mlflow-auth.ini").read_text()]
    assert len({text.split("[mlflow]")[1].strip() for text in texts}) == 1
    # MLflow's default is none: it hashes the password of each request anew, of which a training makes hundreds
    auth = configparser.ConfigParser()
    auth.read_string(texts[1])
    assert 0 < auth.getint("mlflow", "auth_cache_ttl_seconds") <= 300
