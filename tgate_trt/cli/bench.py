"""``tgate-bench``: measure bundles, models, builds and kernels on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tgate_trt.cli.common import Verbose, application, command_line, console, reporting

app = application()

_WIDTH = 220
"""Characters that the widest table takes."""
_QUALITY = "Quality"

Json = Annotated[Path | None, typer.Option("--json", help="Write the record, with all samples, to this file.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the tables to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Write the figure to this file: .png, .svg or .pdf.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: one a core]")]


@app.callback(no_args_is_help=True)
def bench() -> None:
    """Measure bundles, models, builds and kernels on this machine.

    `tgate-bench COMMAND --help` shows the options of a command.
    """


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle that tgate-build made.")],
    gate_step: Annotated[
        str | None, typer.Option(help="Counts, fractions and noise levels, with commas: 5,0.4,noise:1.35. [default: the bundle's own]")
    ] = None,
    after_gate: Annotated[str, typer.Option(help="From the gate on, with commas: negative, positive, positive-mean, fading.")] = "negative",
    gate: Annotated[
        list[str] | None,
        typer.Option(help="A whole gate, such as 10,sp=5,warm=2 or 7,after=positive,forecast=2, or a name in the bundle. Repeat it."),
    ] = None,
    fewer_steps: Annotated[str | None, typer.Option(help="Vanilla in fewer steps too, with commas: 12,15.")] = None,
    beside: Annotated[
        str | None, typer.Option(help="PyTorch without engines, with commas: eager, graphs, channels-last, cutoff, compile, official.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Engines, with commas. [default: the first that runs here]")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw, in turn. May be given several times. [default: built-in prompts]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next have the next seeds.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: the model's own, mostly 25]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance. [default: the model's own]")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="As for tgate-generate, or own for the model's own. [default: dpm++; for LCM its own]")
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures in one call.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often every setting is timed.")] = 5,
    threads: Threads = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory, in a process for each setting.")] = True,
    quality: Annotated[bool, typer.Option("--quality", help="Judge pictures too.", rich_help_panel=_QUALITY)] = False,
    samples: Annotated[int, typer.Option(min=2, help="Pictures that are judged.", rich_help_panel=_QUALITY)] = 100,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP, for CLIP scores.", rich_help_panel=_QUALITY)] = None,
    inception: Annotated[Path | None, typer.Option(help="TorchScript file of an Inception, for FID.", rich_help_panel=_QUALITY)] = None,
    json_file: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
    verbose: Verbose = False,
) -> None:
    """Time a bundle: vanilla, cfg-drop and T-GATE, on the same prompts, noise and scheduler.

    **vanilla** runs the whole graph with guidance at every step, **cfg-drop** the same graph without guidance from the gate on,
    **T-GATE** the planning graph before the gate and the fidelity graph after it. Each round times every setting once.

    For example: `tgate-bench run bundles/shapes-64x64-fp32 --gate-step 5,10 --beside eager,official --quality`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite
        from tgate_trt.bench.measure import Plan
        from tgate_trt.running.drawing import Drawing

        plan = Plan(
            bundle,
            gate_steps=_names(gate_step),
            after_gate=_names(after_gate),
            gates=tuple(gate or ()),
            fewer_steps=_names(fewer_steps),
            backends=_names(backend),
            beside=_names(beside),
            drawing=Drawing(tuple(prompt or ()), steps=steps, seed=seed, guidance_scale=guidance_scale, scheduler=scheduler),
            images=images,
            rounds=rounds,
            threads=threads,
            memory=memory,
        )
        judged = suite.QualityPlan(samples, clip, inception) if quality else None
        _show(suite.pictures(plan, judged, _command()), json_file, markdown, plot)


@app.command()
def spacings(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle of the demo model, whose pictures a program can read.")],
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each; held-out captions are taken in turn.")] = 102,
    seed: Annotated[int, typer.Option(help="Of the captions' wordings and of the first picture.")] = 0,
    backend: Annotated[str | None, typer.Option(help="Engines to draw with. [default: the first that runs here]")] = None,
    json_file: Json = None,
    markdown: Markdown = None,
    verbose: Verbose = False,
) -> None:
    """Judge one gate on every spacing of the steps: a noise level beside a fixed fraction of the steps.

    Trailing, leading and Karras spacing, 8 to 50 steps, image to image, and every scheduler.

    For example: `tgate-bench spacings bundles/shapes-64x64-fp32`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.judge_spacings(bundle, samples, seed, backend, _command()), json_file, markdown)


@app.command()
def macs(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Models. [default: sd15 sd21 sdxl]")] = None,
    json_file: Json = None,
    markdown: Markdown = None,
    verbose: Verbose = False,
) -> None:
    """Count multiply-accumulates and parameters of models, on their cut graphs; no weights are needed.

    For example: `tgate-bench macs sd15 sdxl`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.count_macs(models or [], _command()), json_file, markdown)


@app.command()
def growth(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Models. [default: shapes sd15 sd21 sdxl]")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels. [default: the model's own, 256 at most]")] = None,
    threads: Threads = None,
    json_file: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
    verbose: Verbose = False,
) -> None:
    """Measure builds and steps of models of growing size, with random weights on the CPU.

    A run that was stopped continues from the file of `--json`.

    For example: `tgate-bench growth shapes sd15 --json growth.json --plot growth.png`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.measure_growth(models or [], size, threads, _command(), json_file), json_file, markdown, plot)


@app.command()
def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of an architecture, or a diffusers folder; the weights are random.")],
    backend: Annotated[str, typer.Option(help="Engines to build.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    weights: Annotated[str, typer.Option(help="Of TensorRT engines: baked, shared or shared-linear.")] = "baked",
    compute_capability: Annotated[str | None, typer.Option(help="GPU to build for, such as SM89. [default: as tgate-build]")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels. [default: the model's own]")] = None,
    json_file: Json = None,
    markdown: Markdown = None,
    verbose: Verbose = False,
) -> None:
    """Measure a build: time of each stage, peak memory, and bytes on disk. The bundle is deleted.

    For example: `tgate-bench build sdxl --backend tensorrt-rtx --compute-capability SM89 --weights shared`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite
        from tgate_trt.bench.build_cost import Engines

        engines = Engines(backend, weights, compute_capability)
        _show(suite.measure_build(model, precision, engines, size, _command()), json_file, markdown)


@app.command()
def steps(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle that tgate-build made.")],
    backend: Annotated[str | None, typer.Option(help="Engines, with commas. [default: the first that runs here]")] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures in one step.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often every step is timed.")] = 50,
    threads: Threads = None,
    json_file: Json = None,
    markdown: Markdown = None,
    verbose: Verbose = False,
) -> None:
    """Time a step of each graph beside the others: what giving out cross-attention costs, and taking it in saves.

    For example: `tgate-bench steps bundles/shapes-64x64-fp32 --backend onnxruntime,pytorch`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.measure_steps(bundle, _names(backend), images, rounds, threads, _command()), json_file, markdown)


@app.command()
def kernels(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle whose fidelity step is timed with and without fusion.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is timed.")] = 5,
    json_file: Json = None,
    markdown: Markdown = None,
    verbose: Verbose = False,
) -> None:
    """Compile the kernels, time them on a GPU, and time a bundle's fidelity step with and without fusion.

    For example: `tgate-bench kernels bundles/shapes-64x64-fp32`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.measure_kernels(bundle, rounds, _command()), json_file, markdown)


@app.command()
def load(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle that tgate-build made.")],
    seconds: Annotated[float, typer.Option(min=1, help="Of each load in a round; of the lowest rate four times as long.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often every load is measured.")] = 2,
    running: Annotated[int, typer.Option(min=2, help="Pictures at a time.")] = 4,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that wait.")] = 16,
    backend: Annotated[str | None, typer.Option(help="Engines to draw with. [default: the first that runs here]")] = None,
    json_file: Json = None,
    markdown: Markdown = None,
    verbose: Verbose = False,
) -> None:
    """Measure a server under load: continuous batching beside one picture at a time and beside batches that wait.

    Closed loops of one client to as many as have a place, and open loops of half to four times the capacity. The servers are processes of
    their own on this machine, and so is the command that loads them.

    For example: `tgate-bench load bundles/shapes-64x64-fp32`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.measure_load(bundle, seconds, rounds, (running, queue), backend, _command()), json_file, markdown)


@app.command()
def probe(json_file: Json = None, markdown: Markdown = None, verbose: Verbose = False) -> None:
    """Try whether each TensorRT builds and runs here, and for which GPUs.

    For example: `tgate-bench probe --json probe.json`
    """
    with reporting(verbose):
        from tgate_trt.bench import suite

        _show(suite.probe_tensorrt(_command()), json_file, markdown)


def _show(records: Iterator[dict[str, Any]], json_file: Path | None, markdown: Path | None, plot: Path | None = None) -> None:
    """Write each record over the one before it, show the tables of the last, and print which files were written."""
    from tgate_trt.analysis import plotting
    from tgate_trt.analysis import record as files
    from tgate_trt.bench import plot as figures
    from tgate_trt.bench import report

    if plot:
        plotting.check_available(plot)
    written = [path for path in (json_file, markdown, plot) if path]
    for path in written:
        files.check_writable(path)
    record: dict[str, Any] = {}
    for record in records:
        if json_file:
            files.write(json_file, record)
    for table in report.tables_of(record):
        Console(highlight=False, width=max(console.width, _WIDTH)).print(table.rich())
    if markdown:
        with files.writing(markdown) as partial:
            partial.write_text(report.markdown(record), encoding="utf-8")
    if plot:
        figures.save(record, plot)
    for path in written:
        console.print(str(path))


def _names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def _command() -> str:
    return command_line("tgate-bench")


def main() -> None:
    """Run the command."""
    app()
