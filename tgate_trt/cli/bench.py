"""``tgate-bench``: what a bundle takes on this machine, beside vanilla; and what models, builds and kernels take."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tgate_trt.cli.common import application, console, reporting

app = application()

_WIDTH = 160
"""Characters of the widest table."""
_OTHER = "Other measurements"
_QUALITY = "Quality"
_RESULTS = "Results"


@app.command()
def bench(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[BUNDLE | MODEL…]", help="Folder of a bundle; for --macs, --growth and --build, models.")
    ] = None,
    gate_step: Annotated[str | None, typer.Option(help="Counts and fractions, with commas: 5,10,0.4. [default: the bundle's own]")] = None,
    after_gate: Annotated[str, typer.Option(help="After the gate, with commas: negative, positive, fading.")] = "negative",
    beside: Annotated[str | None, typer.Option(help="PyTorch without engines, with commas: eager, compile, official.")] = None,
    backend: Annotated[str | None, typer.Option(help="Engines, with commas. [default: the first that runs here]")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Drawn in turn. May be given several times. [default: some of our own]")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next have the next seeds.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: the model's own, mostly 25]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance. [default: the model's own]")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="As tgate-generate takes it, or `own` for the model's own. [default: dpm++; for LCM its own]")
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures in one call.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often every setting is timed, in turn.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: one a core]")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory, in a process for each setting.")] = True,
    quality: Annotated[bool, typer.Option("--quality", help="Judge pictures too.", rich_help_panel=_QUALITY)] = False,
    samples: Annotated[int, typer.Option(min=2, help="Pictures that are judged.", rich_help_panel=_QUALITY)] = 100,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP, for CLIP scores.", rich_help_panel=_QUALITY)] = None,
    inception: Annotated[Path | None, typer.Option(help="TorchScript file of an Inception, for FID.", rich_help_panel=_QUALITY)] = None,
    macs: Annotated[
        bool,
        typer.Option("--macs", help="Count MACs and parameters of models. [default: sd15 sd21 sdxl]", rich_help_panel=_OTHER),
    ] = False,
    growth: Annotated[
        bool,
        typer.Option("--growth", help="Build and step models. [default: shapes sd15 sd21 sdxl]", rich_help_panel=_OTHER),
    ] = False,
    build: Annotated[bool, typer.Option("--build", help="Measure the build of one model, random weights.", rich_help_panel=_OTHER)] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time the kernels on a GPU, and the fusion in a bundle's step.", rich_help_panel=_OTHER)
    ] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Try whether TensorRT builds and runs here.", rich_help_panel=_OTHER)] = False,
    precision: Annotated[str, typer.Option(help="Of --build.", rich_help_panel=_OTHER)] = "fp16",
    weights: Annotated[str, typer.Option(help="Of --build: baked, shared or shared-linear.", rich_help_panel=_OTHER)] = "baked",
    compute_capability: Annotated[str | None, typer.Option(help="Of --build: GPU, such as SM89.", rich_help_panel=_OTHER)] = None,
    size: Annotated[
        int | None, typer.Option(help="Of --build and --growth: side of the pictures in pixels.", rich_help_panel=_OTHER)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File of all samples, kept up round by round.", rich_help_panel=_RESULTS)
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="File of the tables.", rich_help_panel=_RESULTS)] = None,
    plot: Annotated[Path | None, typer.Option(help="File of the figure: .png, .svg or .pdf.", rich_help_panel=_RESULTS)] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Measure a bundle on this machine in one run: vanilla, cfg-drop and T-GATE, on the same prompts, noise and scheduler.

    **vanilla** runs the whole graph with guidance at every step, **cfg-drop** the same graph without guidance from the gate on,
    **T-GATE** the planning graph before the gate and the fidelity graph after it. Every setting is timed once in each round.

    For example: `tgate-bench bundles/shapes-64x64-fp32 --gate-step 5,10 --beside eager,official --quality`
    """
    flags = {"macs": macs, "growth": growth, "build": build, "kernels": kernels, "probe": probe}
    with reporting(verbose):
        from tgate_trt.bench import suite
        from tgate_trt.bench.build_cost import Engines
        from tgate_trt.bench.measure import Plan
        from tgate_trt.running.drawing import Drawing

        given, command = targets or [], shlex.join(["tgate-bench", *sys.argv[1:]])
        mode = suite.mode_of([name for name, chosen in flags.items() if chosen], given)
        if plot:
            from tgate_trt.bench import plot as figures

            figures.check(mode, plot)
        if mode == "macs":
            records = suite.count_macs(given, command)
        elif mode == "growth":
            records = suite.measure_growth(given, size, threads, command, json_file)
        elif mode == "build":
            engines = Engines(backend or "onnxruntime", weights, compute_capability)
            records = suite.measure_build(given[0], precision, engines, size, command)
        elif mode == "kernels":
            records = suite.measure_kernels(Path(given[0]) if given else None, rounds, command)
        elif mode == "probe":
            records = suite.probe_tensorrt(command)
        else:
            plan = Plan(
                Path(given[0]),
                gate_steps=_names(gate_step),
                after_gate=_names(after_gate),
                backends=_names(backend),
                beside=_names(beside),
                drawing=Drawing(tuple(prompt or ()), steps=steps, seed=seed, guidance_scale=guidance_scale, scheduler=scheduler),
                images=images,
                rounds=rounds,
                threads=threads,
                memory=memory,
            )
            records = suite.pictures(plan, suite.QualityPlan(samples, clip, inception) if quality else None, command)
        _tell(records, json_file, markdown, plot)


def _tell(records: Iterator[dict[str, Any]], json_file: Path | None, markdown: Path | None, plot: Path | None) -> None:
    """Write each record over the one before it, show the last, and say where things are."""
    import json

    from tgate_trt.analysis import record as files
    from tgate_trt.bench import report

    record: dict[str, Any] = {}
    for record in records:
        if json_file:
            files.write(json_file, json.dumps(record, indent=2) + "\n")
    for table in report.tables_of(record):
        Console(highlight=False, width=max(console.width, _WIDTH)).print(table.rich())
    if markdown:
        files.write(markdown, report.markdown(record))
    if plot:
        from tgate_trt.bench import plot as figures

        figures.save(record, plot)
    for path in (json_file, markdown, plot):
        if path:
            console.print(str(path))


def _names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def main() -> None:
    """Run the command."""
    app()
