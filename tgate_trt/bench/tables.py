"""Records as tables, the same ones on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from tgate_trt.bench.pictures import PARTS
from tgate_trt.bench.record import read_records
from tgate_trt.bundle import replace_file

PAGE = "cpu.md"

_PREAMBLE = """# Measured on a CPU

Made by `python -m tgate_trt.bench` from the JSON files beside this page, which hold every sample.

- Times are medians over the rounds, with the 10th to 90th percentile. In each round all rows of a table are measured one after another.
  **ratio** is to the vanilla row, and is the median of the rounds' own ratios: CPU machines are noisy, those that others share most of all.
- **bound** is the ratio that a row would have if its time were proportional to its multiply-accumulates (MACs), counted in linear and
  convolution layers and not in attention's two products.
- **vanilla** runs the vanilla graph with guidance at every step. **cfg-drop** runs the same graph without guidance from the gate on.
  **T-GATE** runs the planning graph before the gate and the fidelity graph from the gate on; *g* is the number of steps before it.
- **right** counts pictures of held-out captions whose every attribute a program reads back as its caption says. All rows draw the same
  captions from the same noise; the interval is Wilson's, at 95 %.
"""


@dataclass(frozen=True)
class Table:
    """Text in rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    """Sentences on what was measured, and on what."""

    def markdown(self) -> str:
        """This table with its title as a heading."""
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(filter(None, (f"## {self.title}", body, " ".join(self.notes)))) + "\n"

    def rich(self) -> RichTable:
        """This table for a terminal."""
        table = RichTable(title=self.title, title_justify="left", caption=" ".join(self.notes), caption_justify="left", box=None)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """The tables of one record; the last has the notes."""
    parts = list(_BUILDERS[record["what"]](record))
    notes = [()] * (len(parts) - 1) + [tuple(_notes(record))]
    subject = _subject(record)
    return [Table(f"{title}: {subject}", header, tuple(rows), note) for (title, header, rows), note in zip(parts, notes, strict=True)]


def write_page(folder: Path) -> Path:
    """Write the tables of all records in a folder to one Markdown page there."""
    page = folder / PAGE
    tables = [table.markdown() for record in sorted(read_records(folder), key=_order) for table in tables_of(record)]
    replace_file(page, "\n".join([_PREAMBLE, *tables]))
    return page


_Part = tuple[str, tuple[str, ...], Iterable[tuple[str, ...]]]
"""Title, header and rows."""


def _steps(record: Mapping[str, Any]) -> Iterator[_Part]:
    header = ("step", "rows", "median", "p10 … p90", "ratio", "bound", "GMACs")
    rows = (
        (
            name,
            str(row["rows"]),
            *_times(row["seconds"]),
            f"{row['ratio']['median']:.3f}",
            "–" if row["bound"] is None else f"{row['bound']:.3f}",
            f"{row['macs'] / 1e9:,.3f}" if row["macs"] else "–",
        )
        for name, row in record["results"].items()
    )
    yield "One step", header, rows


def _pictures(record: Mapping[str, Any]) -> Iterator[_Part]:
    steps, results = record["settings"]["steps"], record["results"].values()
    times = (
        (row["label"], *_times(row["seconds"]), f"{row['ratio']['median']:.3f}", f"{row['bound']:.3f}", *_times(row["outside_engines"])[:1])
        for row in results
    )
    yield f"One picture, {steps} steps", ("method", "median", "p10 … p90", "ratio", "bound", "outside the engines"), times
    parts = ((row["label"], *(_time(row["parts"][part]["median"]) for part in PARTS)) for row in results)
    yield f"Where a picture's time goes, {steps} steps", ("method", *PARTS), parts


def _scores(record: Mapping[str, Any]) -> Iterator[_Part]:
    results = record["results"].values()
    attributes = tuple(next(iter(results))["attributes"])
    rows = (
        (
            row["label"],
            "{correct} of {total}".format(**row["overall"]),
            f"{row['overall']['fraction']:.1%}",
            "{:.1%} … {:.1%}".format(*row["overall"]["interval"]),
            *(f"{row['attributes'][attribute]['fraction']:.0%}" for attribute in attributes),
        )
        for row in results
    )
    yield (
        f"Pictures with every attribute right, {record['settings']['steps']} steps",
        ("method", "right", "share", "95 %", *attributes),
        rows,
    )


def _build(record: Mapping[str, Any]) -> Iterator[_Part]:
    results = record["results"]
    memory, disk = results["memory"], results["disk"]
    peaks: Mapping[str, int] = memory.get("peak_anonymous_of_stages", {})
    rows = [(stage, f"{seconds:,.1f} s" + _peak(peaks.get(stage))) for stage, seconds in results["stages"].items()]
    rows += [
        ("whole command", f"{results['seconds']:,.1f} s"),
        ("peak memory, anonymous", _against(memory["peak_anonymous"], disk["denoiser_weights"], "the denoiser's weights")),
        ("peak memory, total", _against(memory["peak_total"], disk["denoiser_weights"], "the denoiser's weights")),
        ("weights of the denoiser", f"{disk['denoiser_weights'] / 1e9:,.2f} GB"),
        ("weights of the whole pipeline", f"{disk['pipeline_weights'] / 1e9:,.2f} GB"),
        *([("plans on disk", f"{disk['plans'] / 1e9:,.3f} GB")] if disk.get("plans") else []),
        ("bundle on disk", _against(disk["bundle"], disk["pipeline_weights"], "the pipeline's weights")),
    ]
    yield "A build", ("stage", "taken"), rows


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[_Part]]] = {
    "steps": _steps,
    "pictures": _pictures,
    "scores": _scores,
    "build": _build,
}


def _order(record: Mapping[str, Any]) -> tuple[int, str]:
    return list(_BUILDERS).index(record["what"]), f"{record['subject']['model']} {record['subject'].get('variant', '')}"


def _subject(record: Mapping[str, Any]) -> str:
    subject = record["subject"]
    size = f", {subject['width']}×{subject['height']}" if "width" in subject else ""
    weights = ", random weights" if subject["random_weights"] else ""
    variant = f", {subject['variant']}" if "variant" in subject else ""
    return f"{subject['model']}{size}, {subject['precision']}{weights}{variant}"


def _notes(record: Mapping[str, Any]) -> Sequence[str]:
    settings, machine, versions = record["settings"], record["machine"], record["versions"]
    notes = [f"{record['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB;"]
    notes += [f"PyTorch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}."]
    notes += [f"{name.capitalize()}: {settings[name]}." for name in ("rounds", "threads", "samples") if settings.get(name) is not None]
    if machine["load_average_before"] > 1:
        notes.append(f"**The machine was not idle**: load average {machine['load_average_before']} at the start.")
    if record["subject"]["random_weights"]:
        notes.append("The weights are random: times are the architecture's, pictures have no meaning.")
    if not record["complete"]:
        notes.append("**Cut off** before all that was asked for was measured.")
    return [*notes, f"`{record['command']}`"]


def _times(seconds: Mapping[str, Any]) -> tuple[str, str]:
    """The median and the span between the 10th and the 90th percentile."""
    return _time(seconds["median"]), f"{_time(seconds['p10'])} … {_time(seconds['p90'])}"


def _time(seconds: float) -> str:
    """Three digits or so, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


def _peak(held: int | None) -> str:
    return "" if held is None else f", {held / 1e9:,.2f} GB anonymous"


def _against(held: int, least: int, what: str) -> str:
    return f"{held / 1e9:,.2f} GB, {held / least:.2f} × {what}"
