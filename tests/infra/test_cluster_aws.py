"""`infra/cluster-aws.yaml` by Ray's schema of a cluster, its nodes by AWS's own model of an instance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

from tests.support.command_lines import commands_of, parse_command

CONFIG: dict[str, Any] = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "infra" / "cluster-aws.yaml").read_text()
)


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with Ray's defaults, after Ray's checks."""
    util = pytest.importorskip("ray.autoscaler._private.util", reason="a private module of Ray")
    prepared = util.prepare_config(copy.deepcopy(config))
    util.validate_config(prepared)
    return prepared


def test_it_is_valid_for_ray() -> None:
    prepared = validated(CONFIG)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    with pytest.raises(Exception, match="idle_timeout"):
        validated({**CONFIG, "idle_timeout": 5})


@pytest.mark.parametrize("name", CONFIG["available_node_types"])
def test_its_machines_are_valid_for_aws(name: str) -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    node = CONFIG["available_node_types"][name]["node_config"]
    counts = {"MinCount": 1, "MaxCount": 1}
    assert not ParamValidator().validate({**node, **counts}, model.input_shape).has_errors()
    assert ParamValidator().validate({**node, **counts, "Ebs": 1}, model.input_shape).has_errors()
    assert set(node) <= set(model.input_shape.members)


def test_workers_are_spot_and_the_head_is_not() -> None:
    head, gpu = (CONFIG["available_node_types"][name] for name in ("head", "gpu"))
    assert "InstanceMarketOptions" not in head["node_config"] and head["resources"] == {"CPU": 0}
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} and gpu["min_workers"] == 0


def test_ray_is_started_with_a_token_and_its_own_options() -> None:
    for key, nodes in (("head_start_ray_commands", "head"), ("worker_start_ray_commands", "worker")):
        script = "; ".join(CONFIG[key])
        assert "RAY_AUTH_MODE=token" in script, nodes
        parsed = [parse_command(words) for words in commands_of(script)]
        assert len(parsed) == 2, nodes
        assert parsed[1]["head"] is (nodes == "head") and parsed[1]["metrics_export_port"] == 8080
        if nodes == "head":
            assert parsed[1]["dashboard_host"] == "127.0.0.1" and parsed[1]["num_cpus"] == 0
    assert "/home/ray/.ray/auth_token" in CONFIG["file_mounts"]
