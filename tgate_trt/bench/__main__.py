"""``python -m tgate_trt.bench``: measure on this machine, into ``docs/results/``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tgate_trt.cli.common import application, console, reporting

if TYPE_CHECKING:
    from tgate_trt.bench.tables import Table

app = application()

_Output = Annotated[Path, typer.Option(help="Folder of the results: a JSON file for each part and model, and cpu.md with all of them.")]
_RESULTS = Path("docs/results")
_WIDTH = 120
"""Characters of the widest table."""


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="With commas: shapes, sd15, or folders of bundles.")] = "shapes,sd15",
    only: Annotated[str, typer.Option(help="With commas: steps, pictures, scores.")] = "steps,pictures,scores",
    rounds: Annotated[int | None, typer.Option(min=1, help="How often times are taken. [default: 15 for shapes, 3 for sd15]")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps of a picture; gates keep their fraction of them.")] = 25,
    samples: Annotated[int, typer.Option(min=1, help="Held-out captions that are scored, at most all there are.")] = 100,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an engine. [default: one a core]")] = None,
    output: _Output = _RESULTS,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Time steps and pictures on the CPU, and count the demo model's correct pictures: vanilla, cfg-drop and T-GATE.

    Results are written after every round, so a run that is cut off keeps what it has.
    """
    if context.invoked_subcommand is not None:
        return
    with reporting(verbose):
        from tgate_trt.bench.record import Recorder
        from tgate_trt.bench.suite import Plan, run

        plan = Plan(_names(model), _names(only), rounds, steps, samples, threads)
        for table in run(plan, Recorder(output, _command())):
            _show(table)


@app.command()
def build(
    model: Annotated[str, typer.Option(help="A named architecture, sd15, sd21 or sdxl, or a diffusers folder.")] = "sdxl",
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp16",
    backend: Annotated[str, typer.Option(help="onnxruntime, tensorrt-rtx or tensorrt.")] = "onnxruntime",
    weights: Annotated[str, typer.Option(help="Of TensorRT engines: baked, shared or shared-linear.")] = "baked",
    compute_capability: Annotated[str | None, typer.Option(help="GPU to build tensorrt-rtx engines for, such as SM89.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder to build in. [default: bundles/build-MODEL-PRECISION]")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the bundle there.")] = False,
    output: _Output = _RESULTS,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Measure a build with random weights: time by stage, peak memory of its processes, and bytes on disk."""
    with reporting(verbose):
        from tgate_trt import models
        from tgate_trt.bench import build_cost
        from tgate_trt.bench.record import Recorder
        from tgate_trt.bench.tables import tables_of, write_page

        name = models.resolve(model, random_weights=True).name
        recorder = Recorder(output, _command())
        engines = build_cost.Engines(backend, weights, compute_capability)
        folder = bundle or Path("bundles") / f"build-{name}-{precision}-{engines.name}"
        results = build_cost.measure(model, precision, folder, engines, keep=keep)
        subject = {"model": name, "precision": precision, "random_weights": True, "variant": engines.name}
        record = recorder.save("build", subject, {}, results)
        write_page(output)
        for table in tables_of(record):
            _show(table)


@app.command()
def gpu(
    stages: Annotated[list[str], typer.Argument(help="probe, correctness, sd15, sdxl: each takes minutes and can be run alone.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often times are taken.")] = 10,
    kind: Annotated[
        list[str] | None, typer.Option(help="Of engines, as in tensorrt-rtx:shared. May be given several times. [default: all]")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels. [default: the model's own]")] = None,
    output: _Output = _RESULTS,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Measure on this machine's GPU, one stage after the other, into gpu-STAGE.json and gpu.md."""
    with reporting(verbose):
        from tgate_trt.bench.gpu import run

        for path in run(stages, kind or (), rounds=rounds, size=size, output=output, command=_command()):
            console.print(str(path))
        console.print((output / "gpu.md").read_text(encoding="utf-8"), markup=False)


@app.command(hidden=True)
def try_one(backend: str, capability: Annotated[str | None, typer.Argument()] = None) -> None:
    """One try of the GPU's probe; prints a JSON line."""
    import json
    import os

    from tgate_trt.bench import gpu as stages

    print(json.dumps(stages.try_one(backend, capability)), flush=True)
    os._exit(0)  # a runtime that was ill may not come down well


def _show(table: Table) -> None:
    """Print a table whole: where lines are shorter, they wrap and nothing is cut off."""
    Console(highlight=False, width=max(console.width, _WIDTH)).print(table.rich())


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _command() -> str:
    return shlex.join(["python", "-m", "tgate_trt.bench", *sys.argv[1:]])


if __name__ == "__main__":
    app(prog_name="python -m tgate_trt.bench")
