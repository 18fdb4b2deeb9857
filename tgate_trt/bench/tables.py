"""Records as tables, the same ones on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from tgate_trt.bench.pictures import PARTS
from tgate_trt.bench.record import read_records
from tgate_trt.bundle import replace_file

PAGE = "cpu.md"

_PREAMBLE = """# Measured on a CPU

Made by `python -m tgate_trt.bench` from the JSON files beside this page, which hold every sample. Times are medians with the 10th to
90th percentile over the rounds. In each round all rows of a table are measured one after another, and a ratio is the median of the
rounds' own ratios, because the speed of a CPU machine drifts, and more so on one that others share.

MACs count linear and convolution layers, not attention's two products. The **MAC bound** is the ratio that a row would have if
its time were proportional to them.
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
        return f"## {self.title}\n\n{body}\n\n{' '.join(self.notes)}\n"

    def rich(self) -> RichTable:
        """This table for a terminal."""
        table = RichTable(title=self.title, title_justify="left", caption=" ".join(self.notes), caption_justify="left", box=None)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def table_of(record: Mapping[str, Any]) -> Table:
    """The table of one record."""
    title, header, rows = _BUILDERS[record["what"]](record)
    return Table(f"{title}: {_subject(record)}", header, tuple(rows), tuple(_notes(record)))


def write_page(folder: Path) -> Path:
    """Write the tables of all records in a folder to one Markdown page there."""
    page = folder / PAGE
    tables = [table_of(record).markdown() for record in sorted(read_records(folder), key=_order)]
    replace_file(page, "\n".join([_PREAMBLE, *tables]))
    return page


_Rows = tuple[str, tuple[str, ...], Iterable[tuple[str, ...]]]


def _steps(record: Mapping[str, Any]) -> _Rows:
    header = ("step", "rows", "time", "ratio to vanilla", "MAC bound", "GMACs")
    rows = (
        (
            name,
            str(row["rows"]),
            _times(row["seconds"]),
            f"{row['ratio']['median']:.4f}" if row["bound"] is None else f"{row['ratio']['median']:.3f}",
            "–" if row["bound"] is None else f"{row['bound']:.3f}",
            f"{row['macs'] / 1e9:,.3f}" if row["macs"] else "–",
        )
        for name, row in record["results"].items()
    )
    return "One step", header, rows


def _pictures(record: Mapping[str, Any]) -> _Rows:
    header = ("method", "time", "ratio to vanilla", "MAC bound", "outside the engines", *PARTS[1:])
    rows = (
        (
            row["label"],
            _times(row["seconds"]),
            f"{row['ratio']['median']:.3f}",
            f"{row['bound']:.3f}",
            _times(row["outside_engines"]),
            *(_time(row["parts"][part]["median"]) for part in PARTS[1:]),
        )
        for row in record["results"].values()
    )
    return f"One picture, {record['settings']['steps']} steps", header, rows


def _scores(record: Mapping[str, Any]) -> _Rows:
    attributes = tuple(next(iter(record["results"].values()))["attributes"])
    header = ("method", "fully correct", "95 % interval", *attributes)
    rows = (
        (
            name,
            f"{row['overall']['correct']} of {row['overall']['total']} ({row['overall']['fraction']:.1%})",
            "{:.1%} … {:.1%}".format(*row["overall"]["interval"]),
            *(f"{row['attributes'][attribute]['fraction']:.1%}" for attribute in attributes),
        )
        for name, row in record["results"].items()
    )
    return f"Correct pictures, {record['settings']['steps']} steps", header, rows


def _build(record: Mapping[str, Any]) -> _Rows:
    results = record["results"]
    memory, disk = results["memory"], results["disk"]
    rows = [(stage, f"{seconds:,.1f} s") for stage, seconds in results["stages"].items()]
    rows += [
        ("whole command", f"{results['seconds']:,.1f} s"),
        ("peak memory, anonymous", _against(memory["peak_anonymous"], disk["denoiser_weights"], "the denoiser's weights")),
        ("peak memory, total", _against(memory["peak_total"], disk["denoiser_weights"], "the denoiser's weights")),
        ("weights of the denoiser", f"{disk['denoiser_weights'] / 1e9:,.2f} GB"),
        ("weights of the whole pipeline", f"{disk['pipeline_weights'] / 1e9:,.2f} GB"),
        ("bundle on disk", _against(disk["bundle"], disk["pipeline_weights"], "the pipeline's weights")),
    ]
    return "A build", ("stage", "taken"), rows


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], _Rows]] = {
    "steps": _steps,
    "pictures": _pictures,
    "scores": _scores,
    "build": _build,
}


def _order(record: Mapping[str, Any]) -> tuple[int, str]:
    return list(_BUILDERS).index(record["what"]), record["subject"]["model"]


def _subject(record: Mapping[str, Any]) -> str:
    subject = record["subject"]
    size = f", {subject['width']}×{subject['height']}" if "width" in subject else ""
    weights = ", random weights" if subject["random_weights"] else ""
    return f"{subject['model']}{size}, {subject['precision']}{weights}"


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


def _times(seconds: Mapping[str, Any]) -> str:
    return f"{_time(seconds['median'])} ({_time(seconds['p10'])} … {_time(seconds['p90'])})"


def _time(seconds: float) -> str:
    """Three digits or so, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


def _against(held: int, least: int, what: str) -> str:
    return f"{held / 1e9:,.2f} GB, {held / least:.2f} × {what}"
