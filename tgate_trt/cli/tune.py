"""``tgate-analyze tune``: the gate nearest to vanilla within a budget of time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tgate_trt.cli.common import Verbose, application, command_line, console, reporting

app = application()


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle that tgate-build made.")],
    budget: Annotated[str, typer.Option(help="Share of vanilla's time, such as 0.5, or a time of a picture, such as 120ms.")] = "0.5",
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw. May be given several times. [default: built-in prompts]")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Pictures of each gate; prompts are taken in turn.")] = 24,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: the model's own, mostly 25]")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next have the next seeds.")] = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance. [default: the model's own]")] = None,
    scheduler: Annotated[str | None, typer.Option(help="As for tgate-generate. [default: the model's own]")] = None,
    backend: Annotated[str | None, typer.Option(help="Engines to draw with. [default: the first that runs here]")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the record to this file; a search that it holds and that was cut off goes on.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time against distance into this file, .png, .svg or .pdf.")] = None,
    verbose: Verbose = False,
) -> None:
    """Find the row of actions whose pictures are nearest to vanilla's within a budget, and keep it in the bundle as the gate `tuned`.

    Only graphs that the bundle holds are used: build it with `--gate 10,sp=5,warm=2` and `--gate none,deep=3` to allow self-attention
    reuse and DeepCache too.

    For example: `tgate-analyze tune bundles/shapes-64x64-fp32 --budget 0.5`
    """
    with reporting(verbose):
        from tgate_trt.analysis import plotting, record
        from tgate_trt.analysis.front import draw_front
        from tgate_trt.analysis.tuning import NAME
        from tgate_trt.analysis.tuning import tune as search
        from tgate_trt.running.drawing import Drawing

        if json_file is not None:
            record.check_writable(json_file)
        if plot is not None:
            plotting.check_available(plot)
        earlier = record.read(json_file) if json_file is not None and json_file.exists() else None
        drawing = Drawing(tuple(prompt or ()), steps=steps, seed=seed, guidance_scale=guidance_scale, scheduler=scheduler)
        found = {}
        command = command_line("tgate-analyze")
        for found in search(bundle, drawing, budget, samples=samples, backend=backend, command=command, earlier=earlier):
            if json_file is not None:
                record.write(json_file, found)
        if plot is not None:
            draw_front(found, plot)
        results = found["results"]
        table = Table("gate", "of vanilla's time", "distance to vanilla", box=None)
        for row in results["front"]:
            table.add_row(row["gate"], f"{row['share']:.1%}", f"{row['distance']:.4f}")
        console.print(table)
        best, measured, held_out = results["found"], results["measured"], results["held_out"]
        right = "" if held_out["right"] is None else f", {held_out['right']['fraction']:.0%} right"
        console.print(
            f"{NAME} is {best['gate']}: {measured['median']:.1%} of vanilla's time as measured, "
            f"distance {held_out['distance']['value']:.4f}{right} on {held_out['pictures']} other pictures"
        )
