"""The dashboard, the alert rules and what wires them: every name is a metric's, every expression PromQL."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from service.metrics.catalogue import CATALOGUE, Metric

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana/errata.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SCRAPE = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
# What Prometheus puts there itself.
OWN = Metric("gauge", "up", "")
OWN_LABELS = {"job", "instance", "le"}


def targets() -> list[tuple[str, str, str]]:
    """Title, expression and legend of everything that is drawn."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "5m"), target["legendFormat"])
        for panel in PANELS
        for target in panel.get("targets", ())
    ]


EXPRESSIONS = {
    **{f"{title}: {expression[:60]}": expression for title, expression, _ in targets()},
    **{rule["alert"]: rule["expr"] for rule in RULES},
}


def nodes(expression: promql.Expr) -> Iterator[promql.Expr]:
    """An expression and all in it."""
    yield expression
    inner: list[Any] = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for found in [*inner, *getattr(expression, "args", ())]:
        if isinstance(found, promql.Expr):
            yield from nodes(found)


def metric_of(name: str) -> Metric:
    if name == OWN.name:
        return OWN
    if name in CATALOGUE:
        assert CATALOGUE[name].kind != "histogram", f"{name} has no series of that name"
        return CATALOGUE[name]
    base, _, part = name.rpartition("_")
    assert part in {"bucket", "count", "sum"}, f"there is no metric {name}"
    assert CATALOGUE[base].kind == "histogram"
    return CATALOGUE[base]


def selectors(expression: str) -> list[promql.VectorSelector]:
    return [node for node in nodes(promql.parse(expression)) if isinstance(node, promql.VectorSelector)]


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_every_name_and_label_is_a_metrics(expression: str) -> None:
    found = selectors(expression)
    assert found
    known: set[str] = set()
    for selector in found:
        metric = metric_of(selector.name)
        assert {matcher.name for matcher in selector.matchers.matchers} <= {*metric.labels, *OWN_LABELS}
        for matcher in selector.matchers.matchers:
            if metric.kept and matcher.name == metric.labels[0]:
                assert matcher.value in metric.kept
        known |= {*metric.labels, *OWN_LABELS}
    for node in nodes(promql.parse(expression)):
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= known


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_what_only_grows_is_asked_for_its_rate_and_what_does_not_is_not(expression: str) -> None:
    over_time = [
        node.vector_selector for node in nodes(promql.parse(expression)) if isinstance(node, promql.MatrixSelector)
    ]
    for selector in selectors(expression):
        grows = metric_of(selector.name).kind in {"counter", "histogram"}
        assert grows == (str(selector) in map(str, over_time)), selector.name


def test_the_walk_sees_all_of_an_expression() -> None:
    expression = 'sum by (le) (rate(a_bucket{x="1"}[5m])) / (max(b) > 3) or histogram_quantile(0.5, c) - -d'
    assert {selector.name for selector in selectors(expression)} == {"a_bucket", "b", "c", "d"}


def test_every_metric_is_drawn_or_watched() -> None:
    named = {metric_of(selector.name).name for expression in EXPRESSIONS.values() for selector in selectors(expression)}
    assert named == {*CATALOGUE, OWN.name}


def test_legends_name_labels_that_are_left() -> None:
    for title, expression, legend in targets():
        labels: set[str] = set()
        for selector in selectors(expression):
            labels |= set(metric_of(selector.name).labels)
        for node in nodes(promql.parse(expression)):
            if isinstance(node, promql.AggregateExpr):
                labels &= set(node.modifier.labels) if node.modifier else set()
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels, title


def test_the_dashboard_has_what_grafana_wants() -> None:
    assert DASHBOARD["uid"] == "errata"
    assert DASHBOARD["title"] == "Errata"
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"time", "templating", "annotations", "version"} <= set(DASHBOARD)
    assert "id" not in DASHBOARD, "Grafana gives it"
    assert Counter(panel["id"] for panel in PANELS).most_common(1)[0][1] == 1
    source = yaml.safe_load((ROOT / "docker/grafana/datasource.yml").read_text())["datasources"][0]
    for panel in PANELS:
        assert panel["title"]
        assert panel["type"] in {"row", "stat", "timeseries"}
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert cells
        assert all(0 <= x < 24 for x, _ in cells), panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_says_when_how_bad_and_what(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Errata[A-Z]\w+", rule["alert"])
    assert timedelta(0) < promql.parse_duration(rule["for"]) <= timedelta(minutes=15)
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert rule["annotations"]["summary"]
    for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
        assert label in metric_of(selectors(rule["expr"])[0].name).labels
    compared = promql.parse(rule["expr"])
    assert isinstance(compared, promql.BinaryExpr)
    assert str(compared.op) in {"==", ">", ">="}, "a rule without a comparison fires for ever"


def test_what_must_wake_somebody_is_watched() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    assert {rule["alert"] for rule in RULES} >= {
        "ErrataNoReadyNode",
        "ErrataNoTrainWorker",
        "ErrataEditsWaitTooLong",
        "ErrataRunsFail",
        "ErrataVersionRejected",
        "ErrataRedisAway",
        "ErrataChecksumMismatch",
        "ErrataWrongAnswer",
        "ErrataGatewayErrors",
    }


def test_prometheus_reads_the_rules_and_scrapes_the_service() -> None:
    [job] = SCRAPE["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("errata", "/metrics")
    assert job["static_configs"] == [{"targets": ["service:8000"]}]
    assert COMPOSE["services"]["service"]["ports"][0].endswith(":8000")
    [key] = COMPOSE["services"]["prometheus"]["secrets"]
    assert job["authorization"] == {"credentials_file": f"/run/secrets/{key}"}
    assert COMPOSE["secrets"][key] == {"file": "metrics.key"}, "not the operator's"
    assert "metrics.key" in (ROOT / ".gitignore").read_text().splitlines()
    [rules] = SCRAPE["rule_files"]
    mounted = {config["source"]: config["target"] for config in COMPOSE["services"]["prometheus"]["configs"]}
    assert mounted == {"scrape": "/etc/prometheus/prometheus.yml", "rules": rules}


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    mounted = {config["source"]: config["target"] for config in COMPOSE["services"]["grafana"]["configs"]}
    assert mounted["datasource"].startswith("/etc/grafana/provisioning/datasources/")
    assert mounted["dashboards"].startswith("/etc/grafana/provisioning/dashboards/")
    [provider] = yaml.safe_load((ROOT / "docker/grafana/dashboards.yml").read_text())["providers"]
    assert Path(mounted["dashboard"]).parent == Path(provider["options"]["path"])
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == mounted["dashboard"]
    source = yaml.safe_load((ROOT / "docker/grafana/datasource.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


def test_every_mounted_file_exists() -> None:
    used = {config["source"] for service in COMPOSE["services"].values() for config in service.get("configs", ())}
    assert used == set(COMPOSE["configs"])
    for config in COMPOSE["configs"].values():
        assert (ROOT / config["file"]).is_file()
