"""The page on serving names what there is: metrics, their labels and outcomes, fields, limits, tests; and the dashboard queries them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from tgate_trt.serve.limits import Limits
from tgate_trt.serve.metrics import OUTCOMES, PHASES, Metrics
from tgate_trt.serve.schema import Edit

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "docs" / "serving-dashboard.json").read_text(encoding="utf-8"))


def families() -> dict[str, tuple[str, ...]]:
    """Labels of each metric, by its name in Prometheus' form; histograms without their endings."""
    found = {}
    for name, collector in Metrics().registry._names_to_collectors.items():
        kind, base = collector._type, collector._name
        if name == (f"{base}_total" if kind == "counter" else base):
            found[name] = collector._labelnames
    return found


def test_the_table_of_metrics_is_complete() -> None:
    rows = re.findall(r"^\| `(tgate_\w+)` \| ([^|]*) \| (.*) \|$", PAGE, re.MULTILINE)
    assert {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels, _ in rows} == families()
    meanings = {name: meaning for name, _, meaning in rows}
    assert all(f"`{outcome}`" in meanings["tgate_requests_total"] for outcome in OUTCOMES)
    assert all(f"`{phase}`" in meanings["tgate_phase_seconds_total"] for phase in PHASES)


def test_the_dashboard_queries_every_metric_and_no_other() -> None:
    queries = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"tgate_\w+", queries)}
    assert named == set(families())
    for label in re.findall(r"by \((\w+)\)", queries):
        assert label == "le" or any(label in labels for labels in families().values()), label


def test_the_fields_and_limits_are_named() -> None:
    text, limits = " ".join(PAGE.split()), Limits()
    assert all(f"`{field}`" in text for field in Edit.model_fields)
    assert f"Bodies have {limits.body // 2**20} MiB at most and {limits.body_seconds:g} s to come" in text
    assert f"all that are held at a time {limits.bodies // 2**20} MiB" in text
    assert f"uploaded pictures {limits.pixels // 2**20} Mi pixels, prompts {limits.prompt} characters" in text
    assert f"a request {limits.images} pictures and {limits.steps} steps" in text


def test_the_tests_of_the_faults_exist() -> None:
    faults = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE)
    assert len(faults) >= 10
    for file, name in faults:
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_what_the_page_says_of_the_load_is_in_its_record() -> None:
    results = json.loads((ROOT / "docs" / "results" / "load.json").read_text(encoding="utf-8"))["results"]
    goals = {name: (goal["found"], goal["goal"]) for name, goal in results["goals"].items()}
    met = {
        "errors_at_four": goals["errors_at_four"][0] <= goals["errors_at_four"][1],
        "goodput_at_four": goals["goodput_at_four"][0] >= goals["goodput_at_four"][1],
        "memory_growth": goals["memory_growth"][0] <= goals["memory_growth"][1],
        "p99_at_half": goals["p99_at_half"][0] <= goals["p99_at_half"][1],
    }
    assert met == {"errors_at_four": True, "goodput_at_four": True, "memory_growth": True, "p99_at_half": False}
    assert "three of the four goals were met" in PAGE and "p99 at half the capacity is more than 1.5 times" in " ".join(PAGE.split())
    most = max(point["level"] for point in results["points"] if point["kind"] == "open")
    ours, one = (
        next(p["throughput"] for p in results["points"] if p["kind"] == "open" and p["level"] == most and p["policy"] == policy)
        for policy in ("continuous batching", "one at a time")
    )
    assert ours > one
