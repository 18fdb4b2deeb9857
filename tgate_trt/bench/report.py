"""Records as tables, the same ones on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

from tgate_trt.bench import growth
from tgate_trt.bench.units import gigabytes, seconds

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """Text in rows."""

    title: str
    header: tuple[str, ...]
    rows: Rows
    notes: tuple[str, ...] = ()
    """Sentences on what was measured, and on what."""

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
    times: Rows = [
        (
            name,
            row["engine"],
            seconds(row["seconds"]["median"]),
            seconds(row["seconds"]["p90"]),
            f"{seconds(row['seconds']['p10'])} … {seconds(row['seconds']['p90'])}",
            f"{row['images_per_second']:.3g}",
            _ratio(row["ratio"]),
            f"{row['bound']['linear']:.3f}",
            _ratio(row["denoising_ratio"]),
            "–" if row["bound"]["linear"] == 1 else f"{row['bound']['linear'] / row['denoising_ratio']['median']:.1%}",
            f"{row['ratio_to_first']['median']:.3f}",
        )
        for name, row in results.items()
    ]
    header = ("method", "engine", "p50", "p90", "p10 … p90", "images/s", "ratio", "bound", "denoising alone", "of bound", "to the first")
    yield Table(f"{images.capitalize()}, {settings['steps']} steps: {subject}", header, times, tuple(_notes_on_pictures(record)))
    phases = ("method", *_STEPS, *_REST, "outside the models", "peak memory", "peak GPU memory")
    note = "Peak memory is of a process for each row, anonymous: weights that stay mapped from their files, as PyTorch's do, are not in it."
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
    yield "**ratio** is of times, to vanilla by the same engine in the same round."
    yield "**bound** is that of multiply-accumulates in linear and convolution layers."
    engines = dict.fromkeys(row["engine"] for row in results.values())
    if len(engines) > 1:
        yield f"**Not the same engine**: {', '.join(engines)}; ratio stays within an engine, and *to the first* crosses them."
    if record["machine"]["load_average_before"] > 1:
        yield f"**The machine was not idle**: load average {record['machine']['load_average_before']} at the start."
    if record["subject"]["random_weights"]:
        yield "The weights are random: times are the architecture's, pictures have no meaning."


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


def _macs(record: Mapping[str, Any]) -> Iterator[Table]:
    models: list[Mapping[str, Any]] = record["results"]
    rows: Rows = [
        (
            cost["model"],
            f"{cost['width']}×{cost['height']}",
            picture["method"],
            "–" if picture["method"] == "vanilla" else str(picture["planning_steps"]),
            f"{picture['macs']['linear'] / 1e12:,.3f}",
            "–" if picture["published"] is None else f"{picture['published']:,.3f}",
            "–" if picture["deviation"] is None else f"{picture['deviation']:+.3%}",
            f"{(picture['macs']['linear'] + picture['macs']['sdpa']) / 1e12:,.3f}",
        )
        for cost in models
        for picture in cost["pictures"]
    ]
    header = ("model", "size", "method", "g", "TMACs", "paper", "deviation", "with attention's products")
    note = "Linear and convolution layers, counted on the nodes of the cut graphs; the last column adds QKᵀ and AV."
    yield Table("Multiply-accumulates of one picture", header, rows, (note,))
    steps: Rows = [
        (
            cost["model"],
            *(f"{cost[graph]['linear'] / 1e12:.5f}" for graph in ("vanilla", "fidelity")),
            f"{cost['fidelity']['linear'] / cost['vanilla']['linear']:.3f}",
            *(f"{cost['parameters'][name]:,}" for name in ("whole", "cross_attention", "without_cross_attention", "fidelity_graph")),
        )
        for cost in models
    ]
    header = (
        "model",
        "TMACs of a full step",
        "of a fidelity step",
        "ratio",
        "parameters",
        "in cross-attention",
        "without",
        "in the fidelity graph",
    )
    yield Table("One step, and parameters", header, steps)


def _growth(record: Mapping[str, Any]) -> Iterator[Table]:
    results = record["results"]
    yield Table("Cost of growth", growth.HEADER, list(growth.rows(results)), growth.notes(results))


def _build(record: Mapping[str, Any]) -> Iterator[Table]:
    results = record["results"]
    memory, disk = results["memory"], results["disk"]
    peaks: Mapping[str, int] = memory.get("peak_anonymous_of_stages", {})
    rows: Rows = [
        (stage, f"{taken:,.1f} s" + (f", {gigabytes(peaks[stage])} anonymous" if stage in peaks else ""))
        for stage, taken in results["stages"].items()
    ]
    rows += [
        ("whole command", f"{results['seconds']:,.1f} s"),
        ("peak memory, anonymous", _against(memory["peak_anonymous"], disk["denoiser_weights"], "the denoiser's weights")),
        ("peak memory, total", _against(memory["peak_total"], disk["denoiser_weights"], "the denoiser's weights")),
        ("weights of the denoiser", gigabytes(disk["denoiser_weights"])),
        ("weights of the whole pipeline", gigabytes(disk["pipeline_weights"])),
        *([("plans on disk", gigabytes(disk["plans"]))] if disk.get("plans") else []),
        ("bundle on disk", _against(disk["bundle"], disk["pipeline_weights"], "the pipeline's weights")),
    ]
    yield Table(f"A build: {_subject(record)}", ("stage", "taken"), rows)


def _kernels(record: Mapping[str, Any]) -> Iterator[Table]:
    results = record["results"]
    rows: Rows = [
        (
            case["kernel"],
            case["what"],
            name,
            f"{way['gigabytes_per_second']['median']:,.0f}",
            f"{way['of_copy']['median']:.1%}",
            seconds(way["seconds"]["median"]),
        )
        for case in results["cases"]
        for name, way in case["ways"].items()
    ]
    if rows:
        yield Table("Kernels", ("kernel", "shape", "way", "GB/s", "of a copy", "a call"), rows)
    elif record["machine"]["gpu"] is None:
        yield Table("Kernels", ("kernel", "GB/s"), [("all", "not measured: there is no NVIDIA GPU here")])
    if results["fusion"]:
        fusion = results["fusion"]
        row = (*(seconds(fusion[name]["median"]) for name in ("unfused", "fused")), _ratio(fusion["ratio"]))
        yield Table(f"A fidelity step in PyTorch, with and without the fused op: {_subject(record)}", ("unfused", "fused", "ratio"), [row])
    rows = [
        (
            row["kernel"],
            f"SM{row['capability']}",
            *(str(row[name]) for name in ("registers", "shared_bytes", "spilled_bytes", "warps")),
        )
        for row in results["resources"]
    ]
    yield Table("What the compiler says, fp16", ("kernel", "GPU", "registers", "shared bytes", "spilled bytes", "warps"), rows)


def _probe(record: Mapping[str, Any]) -> Iterator[Table]:
    rows: Rows = [
        (
            f"{row['backend']} {row['version'] or 'not installed'}",
            row["capability"],
            row.get("error") or f"runs, relative error {row['relative_error']:.1e}",
        )
        for row in record["results"]
    ]
    yield Table(f"TensorRT on {record['machine']['gpu'] or 'a machine without a GPU'}", ("backend", "built for", "result"), rows)


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Table]]] = {
    "pictures": _pictures,
    "macs": _macs,
    "growth": _growth,
    "build": _build,
    "kernels": _kernels,
    "probe": _probe,
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
