"""The dashboard and the alerts name metrics that are exported, and Prometheus takes the alerts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.cluster.gauges import EVALUATION, PREFIX, TRAINING
from tests.support.manifests import MAP, STRING, fields

INFRA = Path(__file__).resolve().parents[2] / "infra"
DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana" / "panoptic.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]

RULE = fields(
    "alert expr for labels annotations", alert=STRING, expr=STRING, **{"for": STRING}, labels=MAP, annotations=MAP
)
GROUP = fields("name rules", name=STRING, interval=STRING, rules={"type": "array", "items": RULE, "minItems": 1})
RULE_FILE = fields("groups", groups={"type": "array", "items": GROUP, "minItems": 1})
"""Prometheus' format of alerting rules."""

PANEL = fields(
    "id type title datasource gridPos fieldConfig targets options",
    id={"type": "integer"},
    type={"enum": ["timeseries", "stat", "bargauge"]},
    title=STRING,
    datasource=fields("type uid", type={"const": "prometheus"}, uid=STRING),
    gridPos=fields("x y w h", **{key: {"type": "integer", "minimum": 0, "maximum": 100} for key in "xywh"}),
    fieldConfig=fields("defaults overrides", defaults={"type": "object"}, overrides={"type": "array"}),
    targets={
        "type": "array",
        "minItems": 1,
        "items": fields(
            "refId expr legendFormat", refId=STRING, expr=STRING, legendFormat=STRING, datasource={"type": "object"}
        ),
    },
    options={"type": "object"},
)


def exported() -> set[str]:
    """Ours, and those that Ray's own reporter declares for a machine."""
    reporter = pytest.importorskip("ray.dashboard.modules.reporter.reporter_agent", reason="a private module of Ray")
    return {f"{PREFIX}{name}" for name in (*TRAINING, *EVALUATION, *reporter.METRICS_GAUGES)}


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_exported() -> None:
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "run"]
    texts = [*expressions(), variable["query"]["query"]]
    names = {name for text in texts for name in named(text)}
    assert names and names <= exported(), names - exported()
    assert all(named(text) for text in texts)


def test_every_metric_of_an_alert_is_exported() -> None:
    for rule in RULES:
        names = named(rule["expr"])
        assert names and names <= exported(), rule["alert"]


def test_every_gauge_of_ours_is_watched() -> None:
    """On the dashboard or in an alert: a figure that nobody looks at is not worth its label."""
    watched = {name for text in [*expressions(), *(rule["expr"] for rule in RULES)] for name in named(text)}
    unwatched = {f"{PREFIX}{name}" for name in (*TRAINING, *EVALUATION)} - watched
    assert unwatched <= {"ray_panoptic_checkpoint_step"}


def test_the_dashboard_has_the_form_of_grafanas() -> None:
    for panel in DASHBOARD["panels"]:
        jsonschema.validate(panel, PANEL)
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(set(places)) == len(places)
    (source,) = yaml.safe_load((INFRA / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"] is True
    assert DASHBOARD["uid"] and DASHBOARD["schemaVersion"] >= 39


def test_the_alerts_have_the_form_of_prometheus() -> None:
    jsonschema.validate(ALERTS, RULE_FILE)
    assert {"RunStalled", "EvaluationStale"} <= {rule["alert"] for rule in RULES}
    with pytest.raises(jsonschema.ValidationError, match="expression"):
        jsonschema.validate({"groups": [{"name": "x", "rules": [{**RULES[0], "expression": "1"}]}]}, RULE_FILE)


TIMES = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      # the worker of `dead` ends at minute 60, in step 30 of 100; that of `done` in step 100 of 100; `well` goes on
      - {{series: 'ray_panoptic_progress_timestamp_seconds{{run="dead", WorkerId="a"}}', values: '0+60x60 stale'}}
      - {{series: 'ray_panoptic_step{{run="dead", WorkerId="a"}}', values: '0+0.5x60 stale'}}
      - {{series: 'ray_panoptic_steps{{run="dead", WorkerId="a"}}', values: '100x60 stale'}}
      - {{series: 'ray_panoptic_progress_timestamp_seconds{{run="done", WorkerId="b"}}', values: '0+60x60 stale'}}
      - {{series: 'ray_panoptic_step{{run="done", WorkerId="b"}}', values: '40+1x60 stale'}}
      - {{series: 'ray_panoptic_steps{{run="done", WorkerId="b"}}', values: '100x60 stale'}}
      - {{series: 'ray_panoptic_progress_timestamp_seconds{{run="well", WorkerId="c"}}', values: '0+60x3000'}}
      - {{series: 'ray_panoptic_step{{run="well", WorkerId="c"}}', values: '0+0.01x3000'}}
      - {{series: 'ray_panoptic_steps{{run="well", WorkerId="c"}}', values: '100x3000'}}
      - {{series: 'ray_panoptic_checkpoint_timestamp_seconds{{run="well", WorkerId="c"}}', values: '0x3000'}}
      - {{series: 'ray_panoptic_data_wait_ratio{{run="well", WorkerId="c"}}', values: '0.05x3000'}}
      - {{series: 'ray_panoptic_evaluation_timestamp_seconds{{model="m"}}', values: '60x3 stale'}}
    alert_rule_test:
      - {{eval_time: 80m, alertname: RunStalled, exp_alerts: []}}
      - eval_time: 100m
        alertname: RunStalled
        exp_alerts:
          - exp_labels: {{severity: page, run: dead}}
            exp_annotations:
              summary: dead has had no log line for 40m 0s
              action: python jobs/status.py dead tells whether its driver lives; the same command goes on
      - {{eval_time: 230m, alertname: CheckpointStale, exp_alerts: []}}
      - eval_time: 300m
        alertname: CheckpointStale
        exp_alerts:
          - exp_labels: {{severity: ticket, run: well}}
            exp_annotations:
              summary: well trains, and its last checkpoint is 5h 0m 0s old
              action: lower train.validate_every, or see why the store does not take checkpoints
      - {{eval_time: 300m, alertname: DataStarved, exp_alerts: []}}
      - {{eval_time: 30h, alertname: EvaluationStale, exp_alerts: []}}
      - eval_time: 37h
        alertname: EvaluationStale
        exp_alerts:
          - exp_labels: {{severity: ticket, model: m}}
            exp_annotations:
              summary: m was last evaluated 1d 12h 59m 0s ago
              action: see the log of the CronJob, the timer or cron
"""
"""Metrics in time, and the alerts that they raise, in the form of promtool's tests."""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is absent")
def test_prometheus_raises_the_alerts(tmp_path: Path) -> None:
    for command in (["check", "rules", "alerts.yaml"], ["check", "config", "prometheus.yaml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=INFRA / "prometheus", capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "times.yaml"
    file.write_text(TIMES.format(alerts=INFRA / "prometheus" / "alerts.yaml"))
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
