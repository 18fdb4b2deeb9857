"""Records as tables, the same on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table as RichTable

from tgate_trt.bench import growth
from tgate_trt.bench.kernels import RESOURCES

Rows = list[tuple[str, ...]]
Columns = dict[str, Callable[[Any], str]]
"""By header, a function that shows a row's cell."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: tuple[str, ...]
    rows: Rows
    notes: tuple[str, ...] = ()
    """Sentences on how it was measured."""

    def markdown(self) -> str:
        """This table with its title as a heading."""
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(filter(None, (f"## {self.title}", body, " ".join(self.notes)))) + "\n"

    def rich(self) -> RichTable:
        """This table for a terminal."""
        notes = " ".join(self.notes).replace("*", "")
        table = RichTable(title=self.title, title_justify="left", caption=notes, caption_justify="left", box=None)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def _table(title: str, rows: Iterable[Any], columns: Columns, notes: Iterable[str] = ()) -> Table:
    return Table(title, tuple(columns), [tuple(show(row) for show in columns.values()) for row in rows], tuple(notes))


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """The tables of a record."""
    return list(_BUILDERS[record["what"]](record))


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a record as a page."""
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    head = f"`{record['command']}`\n\n{record['date'][:10]}{commit}. {' '.join(_machine(record))}\n"
    return "\n".join([head, *(table.markdown() for table in tables_of(record))])


def _pictures(record: Mapping[str, Any]) -> Iterator[Table]:
    results: Mapping[str, Any] = record["results"]["settings"]
    settings = record["settings"]
    images = "one picture" if settings["images"] == 1 else f"{settings['images']} pictures"
    subject = _subject(record)
    columns: Columns = {
        "method": lambda row: row["method"],
        "engine": lambda row: row["engine"],
        "p50": lambda row: seconds(row["seconds"]["median"]),
        "p90": lambda row: seconds(row["seconds"]["p90"]),
        "p10 … p90": lambda row: f"{seconds(row['seconds']['p10'])} … {seconds(row['seconds']['p90'])}",
        "images/s": lambda row: f"{row['images_per_second']:.3g}",
        "ratio": lambda row: _ratio(row["ratio"]),
        "bound": lambda row: f"{row['bound']['linear']:.3f}",
        "denoising alone": lambda row: _ratio(row["denoising_ratio"]),
        "of bound": lambda row: "–" if row["bound"]["linear"] == 1 else f"{row['bound']['linear'] / row['denoising_ratio']['median']:.1%}",
        "to the first": lambda row: f"{row['ratio_to_first']['median']:.3f}",
    }
    named = [{"method": name} | row for name, row in results.items()]
    yield _table(f"{images.capitalize()}, {settings['steps']} steps: {subject}", named, columns, _notes_on_pictures(record))
    phases = ("method", *_STEPS, *_REST, "outside the models", "peak memory", "peak GPU memory")
    note = (
        "Peak memory is of a process for each row and of those that it starts, anonymous: weights that stay mapped from their files, as"
        " PyTorch's do, are not included."
    )
    yield Table(f"Where the time goes, medians: {subject}", phases, [_phases(name, row) for name, row in results.items()], (note,))
    if record["results"].get("quality"):
        yield _quality(record)


_STEPS = ("planning step", "fidelity step")
_REST = ("hand-off", "text encoding", "VAE")


def _phases(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    steps = (seconds(row["steps"][part]["median"]) if part in row["steps"] else "–" for part in _STEPS)
    rest = (seconds(row["parts"][part]["median"]) if row["parts"][part]["median"] else "–" for part in _REST)
    outside = f"{seconds(row['outside']['median'])} ({row['outside_share']['median']:.1%})"
    memory = row["memory"] or {}
    return (name, *steps, *rest, outside, *(gigabytes(memory[place]) if memory.get(place) else "–" for place in ("host", "gpu")))


def _notes_on_pictures(record: Mapping[str, Any]) -> Iterator[str]:
    settings, results = record["settings"], record["results"]["settings"]
    scale = "of the model" if settings["guidance_scale"] is None else settings["guidance_scale"]
    yield f"Rounds: {settings['rounds']}, each of all rows in turn, forwards and backwards."
    yield f"Scheduler {settings['scheduler'] or 'of the model'}, guidance scale {scale}."
    yield "**ratio** is that of the time to vanilla's, by the same engine in the same round."
    yield "**bound** is the same ratio of multiply-accumulates in linear and convolution layers."
    engines = dict.fromkeys(row["engine"] for row in results.values())
    if len(engines) > 1:
        yield f"**Not the same engine**: {', '.join(engines)}; ratio compares within an engine, *to the first* across engines."
    if record["machine"]["load_average_before"] > 1:
        yield f"**The machine was not idle**: load average {record['machine']['load_average_before']} at the start."
    if record["subject"]["random_weights"]:
        yield "The weights are random: times are those of the architecture, and pictures have no meaning."


def _quality(record: Mapping[str, Any]) -> Table:
    results: Mapping[str, Any] = record["results"]["quality"]
    first = next(iter(results.values()))
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {}
    if first["semantics"]:
        columns["all attributes right"] = lambda row: _share(row["semantics"]["overall"])
    columns |= {
        "PSNR, dB": lambda row: _estimate(row["likeness"] and row["likeness"]["psnr"], 1),
        "SSIM": lambda row: _estimate(row["likeness"] and row["likeness"]["ssim"], 3),
        "perceptual distance": lambda row: _estimate(row["likeness"] and row["likeness"]["perceptual_distance"], 3),
    }
    if any(row["clip_score"] for row in results.values()):
        columns["CLIP score"] = lambda row: _estimate(row["clip_score"], 2)
    if any(row["fid"] for row in results.values()):
        columns[f"FID to {first['distance_to']}"] = lambda row: _estimate(row["fid"], 1)
    rows: Rows = [(name, *(show(row) for show in columns.values())) for name, row in results.items()]
    notes = (
        f"{first['pictures']} pictures each, of the same prompts and noise; in brackets 95 % intervals. Likeness is to vanilla's pictures.",
    )
    return Table(f"Quality: {_subject(record)}", ("method", *columns), rows, notes)


def _spacings(record: Mapping[str, Any]) -> Iterator[Table]:
    columns: Columns = {
        "spacing": lambda row: row["label"],
        "steps": lambda row: str(row["gates"][0]["steps"]) + ("" if row["strength"] is None else f" of {row['steps']}"),
        "vanilla": lambda row: _share(row["gates"][0]["right"]),
    }
    for place, gate in enumerate(record["settings"]["gates"][1:], start=1):
        columns |= {f"g of {gate}": partial(_planning_of, place), f"right with {gate}": partial(_right_of, place)}
    notes = (
        f"{record['settings']['samples']} captions, the same noise in each row; fully right pictures, in brackets 95 % intervals.",
        "**g** is the number of planning steps.",
    )
    yield _table(f"One gate for every spacing: {_subject(record)}", record["results"], columns, notes)


def _planning_of(place: int, row: Mapping[str, Any]) -> str:
    return str(row["gates"][place]["planning_steps"])


def _right_of(place: int, row: Mapping[str, Any]) -> str:
    return _share(row["gates"][place]["right"])


def _macs(record: Mapping[str, Any]) -> Iterator[Table]:
    models: list[dict[str, Any]] = record["results"]
    columns: Columns = {
        "model": lambda row: row["model"],
        "size": lambda row: f"{row['width']}×{row['height']}",
        "method": lambda row: row["method"],
        "g": lambda row: "–" if row["method"] == "vanilla" else str(row["planning_steps"]),
        "TMACs": lambda row: f"{row['macs']['linear'] / 1e12:,.3f}",
        "paper": lambda row: "–" if row["published"] is None else f"{row['published']:,.3f}",
        "deviation": lambda row: "–" if row["deviation"] is None else f"{row['deviation']:+.3%}",
        "with attention's products": lambda row: f"{(row['macs']['linear'] + row['macs']['sdpa']) / 1e12:,.3f}",
    }
    note = (
        "Linear and convolution layers, counted on the nodes of the cut graphs; the last column adds QKᵀ and AV. The paper names neither "
        "the warm-up of self-attention reuse nor DeepCache's branch: these give its figures. With that branch, no row of a gate at 5 or "
        "10 gives its figure of DeepCache with T-GATE."
    )
    pictures = [cost | picture for cost in models for picture in cost["pictures"]]
    yield _table("Multiply-accumulates of one picture", pictures, columns, (note,))
    columns = {
        "model": lambda cost: cost["model"],
        "TMACs of a full step": lambda cost: f"{cost['vanilla']['linear'] / 1e12:.5f}",
        "of a fidelity step": lambda cost: f"{cost['fidelity']['linear'] / 1e12:.5f}",
        "ratio": lambda cost: f"{cost['fidelity']['linear'] / cost['vanilla']['linear']:.3f}",
        "parameters": lambda cost: f"{cost['parameters']['whole']:,}",
        "in cross-attention": lambda cost: f"{cost['parameters']['cross_attention']:,}",
        "without": lambda cost: f"{cost['parameters']['without_cross_attention']:,}",
        "in the fidelity graph": lambda cost: f"{cost['parameters']['fidelity_graph']:,}",
    }
    yield _table("One step, and parameters", models, columns)


def _growth(record: Mapping[str, Any]) -> Iterator[Table]:
    found = dict(growth.by_parameters(record["results"]))
    columns: Columns = {
        "model": lambda one: one["name"],
        "parameters": lambda one: f"{one['parameters'] / 1e6:,.1f} M",
        "pictures": lambda one: f"{one['size']}²",
        "build": lambda one: f"{one['build']['seconds']:,.0f} s, {one['build']['cpu_seconds']:,.0f} s",
        "its memory": lambda one: gigabytes(one["build"]["memory"]["peak_anonymous"]),
        "on disk": lambda one: gigabytes(one["build"]["disk"]["bundle"]),
        **{f"{graph} step": partial(_step_time, graph) for graph in growth.GRAPHS},
        "memory of a step": lambda one: gigabytes(max(step["memory"]["peak_anonymous"] for step in one["steps"].values())),
    }
    yield _table("Cost of growth", [{"name": name, **one} for name, one in found.items()], columns, _notes_on_growth(found))


def _step_time(graph: str, one: Mapping[str, Any]) -> str:
    step = one["steps"][graph]
    median, low, high = (seconds(step["seconds"][key]) for key in ("median", "p10", "p90"))
    return f"{median} ({low} … {high}), {seconds(step['cpu_seconds']['median'])}"


def _notes_on_growth(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    machines = dict.fromkeys(f"{one['machine']['cpu']}, {one['machine']['cores']} cores" for one in found.values())
    yield f"{'; '.join(machines)}; ONNX Runtime, {growth.PRECISION}, random weights, builds without verification."
    yield "The time of a step is a median, in brackets the 10th to 90th percentile."
    yield "After the comma is processor time, which other work on the machine stretches less."
    yield "Vanilla and planning steps have two rows under guidance, fidelity steps have one."
    yield "Memory is anonymous, at its peak: of a build's whole process tree, and of the process that loads and runs a step."
    loads = (f"{name} {one['machine']['load_average_before']:.1f}, {_highest_load(one):.1f}" for name, one in found.items())
    yield f"Load average before the build, and the highest before a step: {'; '.join(loads)}."


def _highest_load(one: Mapping[str, Any]) -> float:
    return max(float(step["load_average_before"]) for step in one["steps"].values())


def _build(record: Mapping[str, Any]) -> Iterator[Table]:
    results = record["results"]
    memory, disk = results["memory"], results["disk"]
    peaks: Mapping[str, int] = memory["peak_anonymous_of_stages"]
    rows: Rows = [
        (stage, f"{taken:,.1f} s" + (f", {gigabytes(peaks[stage])} anonymous" if stage in peaks else ""))
        for stage, taken in results["stages"].items()
    ]
    rows += [
        ("whole command", f"{results['seconds']:,.1f} s, processor time {results['cpu_seconds']:,.1f} s"),
        ("peak memory, anonymous", _against(memory["peak_anonymous"], disk["denoiser_weights"], "the denoiser's weights")),
        ("peak memory, total", _against(memory["peak_total"], disk["denoiser_weights"], "the denoiser's weights")),
        *([("peak memory of the GPU, all processes", gigabytes(memory["peak_gpu"]))] if memory["peak_gpu"] else []),
        ("weights of the denoiser", gigabytes(disk["denoiser_weights"])),
        ("weights of the whole pipeline", gigabytes(disk["pipeline_weights"])),
        *([("plans on disk", gigabytes(disk["plans"]))] if disk["plans"] else []),
        ("bundle on disk", _against(disk["bundle"], disk["pipeline_weights"], "the pipeline's weights")),
    ]
    yield Table(f"A build: {_subject(record)}", ("stage", "taken"), rows)


def _kernels(record: Mapping[str, Any]) -> Iterator[Table]:
    results = record["results"]
    ways = [case | way | {"way": name} for case in results["cases"] for name, way in case["ways"].items()]
    columns: Columns = {
        "kernel": lambda row: row["kernel"],
        "shape": lambda row: row["what"],
        "way": lambda row: row["way"],
        "GB/s": lambda row: f"{row['gigabytes_per_second']['median']:,.0f}",
        "of a copy": lambda row: f"{row['of_copy']['median']:.1%}",
        "a call": lambda row: seconds(row["seconds"]["median"]),
    }
    if ways:
        yield _table("Kernels", ways, columns)
    elif record["machine"]["gpu"] is None:
        yield Table("Kernels", ("kernel", "GB/s"), [("all", "not measured: there is no NVIDIA GPU here")])
    if results["fusion"]:
        fusion = results["fusion"]
        row = (*(seconds(fusion[name]["median"]) for name in ("unfused", "fused")), _ratio(fusion["ratio"]))
        yield Table(f"A fidelity step in PyTorch, with and without the fused op: {_subject(record)}", ("unfused", "fused", "ratio"), [row])
    rows: Rows = [(row["kernel"], f"SM{row['capability']}", *(str(row[name]) for name in RESOURCES)) for row in results["resources"]]
    header = ("kernel", "GPU", *(name.replace("_", " ") for name in RESOURCES))
    yield Table("What the kernels compile to, fp16", header, rows)


def _steps(record: Mapping[str, Any]) -> Iterator[Table]:
    rows = [{"backend": backend, "graph": graph} | row for backend, found in record["results"].items() for graph, row in found.items()]
    columns: Columns = {
        "backend": lambda row: row["backend"],
        "step": lambda row: row["graph"],
        "rows": lambda row: str(row["rows"]),
        "p50": lambda row: seconds(row["seconds"]["median"]),
        "p10 … p90": lambda row: f"{seconds(row['seconds']['p10'])} … {seconds(row['seconds']['p90'])}",
        "ratio": lambda row: _ratio(row["ratio"]),
        "bound": lambda row: f"{row['bound']:.3f}",
    }
    notes = (
        f"Rounds: {record['settings']['rounds']}, each of all steps in turn, forwards and backwards.",
        "**ratio** is that to the vanilla step of the same round, **bound** the same ratio of multiply-accumulates, attention's included.",
    )
    yield _table(f"One step: {_subject(record)}", rows, columns, notes)


def _load(record: Mapping[str, Any]) -> Iterator[Table]:
    results, settings = record["results"], record["settings"]

    def level(point: Mapping[str, Any]) -> str:
        if point["kind"] == "open":
            return f"open, {point['level']:g} × capacity"
        return f"{'streams' if point['kind'] == 'streams' else 'closed'}, {point['level']:.0f} clients"

    def latency(name: str, which: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda point: "–" if point[name] is None else seconds(point[name][which])

    columns: Columns = {
        "load": level,
        "batching": lambda point: point["policy"],
        "pictures/s": lambda point: f"{point['throughput']:.2f}",
        "p50": latency("latency", "p50"),
        "p90": latency("latency", "p90"),
        "p99": latency("latency", "p99"),
        "first partial, p50": latency("first_partial", "p50"),
        "refused (429)": lambda point: str(point["refused"]),
        "errors": lambda point: str(point["errors"]),
        "rows a batch": lambda point: "–" if point["rows_a_batch"] is None else f"{point['rows_a_batch']:.2f}",
        "outside engines": lambda point: "–" if point["outside_engines"] is None else f"{point['outside_engines']:.0%}",
        "memory": lambda point: gigabytes(point["memory"]["peak"]),
    }
    times = f"{settings['rounds']} rounds of {settings['seconds']:g} s a load"
    notes = [f"{settings['running']} pictures at a time, {settings['queue']} wait; {times}."]
    capacities = ", ".join(f"{capacity:.2f}" for capacity in results["capacity"])
    notes.append(f"Capacity of continuous batching by round: {capacities} pictures a second.")
    yield _table(f"Under load, {_subject(record)}", results["points"], columns, notes)
    goals: Columns = {
        "goal": lambda goal: _GOALS[goal[0]],
        "found": lambda goal: f"{goal[1]['found']:.2f}",
        "aimed at": lambda goal: f"{goal[1]['goal']:g}",
    }
    yield _table("Goals, continuous batching", results["goals"].items(), goals)


_GOALS = {
    "p99_at_half": "p99 at half the capacity over p99 alone, at most",
    "errors_at_four": "errors but 429 at four times the capacity, at most",
    "goodput_at_four": "pictures/s at four times the capacity over the best, at least",
    "memory_growth": "peak memory at four times the capacity over that alone, at most",
}


def _probe(record: Mapping[str, Any]) -> Iterator[Table]:
    columns: Columns = {
        "backend": lambda row: f"{row['backend']} {row['version'] or 'not installed'}",
        "built for": lambda row: row["capability"],
        "result": lambda row: row.get("error") or f"runs, relative error {row['relative_error']:.1e}",
    }
    yield _table(f"TensorRT on {record['machine']['gpu'] or 'a machine without a GPU'}", record["results"], columns)


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Table]]] = {
    "pictures": _pictures,
    "spacings": _spacings,
    "macs": _macs,
    "growth": _growth,
    "build": _build,
    "kernels": _kernels,
    "probe": _probe,
    "load": _load,
    "steps": _steps,
}


def _subject(record: Mapping[str, Any]) -> str:
    subject = record["subject"]
    size = f", {subject['width']}×{subject['height']}" if "width" in subject else ""
    weights = ", random weights" if subject["random_weights"] else ""
    variant = f", {subject['variant']}" if "variant" in subject else ""
    return f"{subject['model']}{size}, {subject['precision']}{weights}{variant}"


def _machine(record: Mapping[str, Any]) -> Iterator[str]:
    machine, versions = record["machine"], record["versions"]
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ", no GPU"
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB{gpu};"
    yield f"PyTorch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}, diffusers {versions['diffusers']}."
    if not machine["system"].startswith("Linux"):
        yield "This system does not count anonymous memory: all resident memory stands in its place."


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['p10']:.3f} … {ratio['p90']:.3f})"


def _estimate(estimate: Mapping[str, float] | None, digits: int) -> str:
    if not estimate:
        return "–"
    value, low, high = (f"{estimate[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} … {high})"


def _share(share: Mapping[str, Any]) -> str:
    low, high = share["interval"]
    return f"{share['fraction']:.0%} ({low:.0%} … {high:.0%})"


def _against(held: int, least: int, what: str) -> str:
    return f"{gigabytes(held)}, {held / least:.2f} × {what}"


def seconds(value: float) -> str:
    """A time of three digits or so, in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {unit}"
    return f"{value / 1e-6:.0f} µs"


def gigabytes(held: int) -> str:
    """Bytes in units of 10⁹."""
    return f"{held / 1e9:,.2f} GB"
