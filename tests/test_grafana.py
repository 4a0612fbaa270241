"""The Grafana dashboard can be imported, and shows the metrics that there are, all of them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.metrics import METRICS

ROOT = Path(__file__).parents[1]
# The metrics that the dashboard may show, and the labels of each beside those of Serve.
COUNTERS, GAUGES, HISTOGRAMS = (
    {name: set(metric.labels) for name, metric in METRICS.items() if metric.kind == kind}
    for kind in ("counter", "gauge", "histogram")
)
SERVE_LABELS = {"deployment", "replica", "application"}
ROWS = ["Speculation", "Latency", "Engine", "Exchange", "Router"]


def series() -> dict[str, set[str]]:
    """The names under which Ray exports the metrics, and the labels of each."""
    found = {f"ray_{name}_total": labels for name, labels in COUNTERS.items()}
    found |= {f"ray_{name}": labels for name, labels in GAUGES.items()}
    for name, labels in HISTOGRAMS.items():
        found |= {f"ray_{name}_bucket": labels | {"le"}, f"ray_{name}_sum": labels, f"ray_{name}_count": labels}
    return {name: labels | SERVE_LABELS for name, labels in found.items()}


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "configs/grafana.json").read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    assert board["uid"]
    assert board["refresh"]
    assert board["schemaVersion"] >= 38  # Grafana 10
    [source] = [variable for variable in board["templating"]["list"] if variable["type"] == "datasource"]
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    sources = [place["datasource"] for panel in panels() for place in (panel, *panel["targets"])]
    assert all(found == {"type": "prometheus", "uid": "${datasource}"} for found in sources)


def test_the_dashboard_has_its_rows_in_order() -> None:
    assert [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"] == ROWS


def test_every_panel_says_what_it_shows() -> None:
    for panel in panels():
        assert panel["title"]
        assert panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in (
            (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


def test_every_expression_is_about_the_metrics_that_there_are() -> None:
    for expression in expressions():
        names = set(re.findall(r"ray_\w+", expression))
        assert names
        assert names <= series().keys()


def test_every_metric_is_on_some_panel() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"ray_\w+", expression)}
    exported = {name: {f"ray_{name}_total"} for name in COUNTERS}
    exported |= {name: {f"ray_{name}"} for name in GAUGES}
    exported |= {name: {f"ray_{name}_{part}" for part in ("bucket", "sum", "count")} for name in HISTOGRAMS}
    assert [name for name, names in exported.items() if not names & shown] == []


def test_every_metric_is_grouped_and_selected_by_labels_that_it_has() -> None:
    for expression in expressions():
        sums = re.findall(r"sum(?: by \(([^)]*)\))? \(|sum\(", expression)
        grouped = re.findall(r"sum(?: by \(([^)]*)\) )?\((?:rate\()?(ray_\w+){([^}]*)}", expression)
        assert len(grouped) == len(sums) == len(re.findall(r"ray_\w+", expression)), expression
        for group, name, selector in grouped:
            labels = {label.strip() for label in group.split(",") if label}
            assert labels | set(re.findall(r"(\w+)=", selector)) <= series()[name], expression
            assert ("le" in labels) == name.endswith("_bucket")


def test_legends_name_labels_that_remain() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in group.split(",")}
            assert named <= kept, panel["title"]


def test_expressions_are_balanced_and_use_no_unknown_variable() -> None:
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    for expression in expressions():
        assert set(re.findall(r"\$(\w+)", expression)) <= variables
        for opening, closing in ("()", "[]", "{}"):
            assert expression.count(opening) == expression.count(closing)
