"""``tgate-generate``: pictures from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tgate_trt.cli.common import application, console, reporting

app = application()


@app.command()
def generate(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle that tgate-build made.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw. May be given several times.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: the model's own, mostly 25]")] = None,
    gate_step: Annotated[
        list[str] | None,
        typer.Option(
            help="Planning steps: a count, a fraction, or none. May be given several times, to compare. [default: the model's own]"
        ),
    ] = None,
    after_gate: Annotated[
        list[str] | None,
        typer.Option(
            help="From the gate on: negative (T-GATE), positive, or fading, which lets guidance fade out. May be given several times, "
            "to compare. [default: negative]"
        ),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 for none. [default: the model's own]")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next have the next seeds.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, dpm++, sde-dpm++, euler, euler-a, heun, kdpm2, lcm, pndm, unipc.")
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures for each prompt.", min=1)] = 1,
    backend: Annotated[str | None, typer.Option(help="Engines to use. [default: the first that runs here]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: one a core]", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="A .png file, where several pictures make one sheet; or a folder.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Generate pictures with a bundle, with as many gate steps side by side as you like.

    For example: `tgate-generate bundles/shapes-64x64-fp32 --prompt "a small red circle at the top left on a blue background"
    --gate-step none --gate-step 10`
    """
    with reporting(verbose):
        from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE
        from tgate_trt.running.drawing import Settings, generate, save

        settings = Settings(
            prompts=tuple(prompt),
            negative_prompt=negative_prompt,
            steps=steps,
            gate_steps=tuple(gate_step or ()),
            after_gate=tuple(after_gate or (DEFAULT_AFTER_GATE,)),
            guidance_scale=guidance_scale,
            seed=seed,
            scheduler=scheduler,
            images=images,
        )
        columns = generate(bundle, settings, backend=backend, threads=threads)
        paths = save(columns, settings, output)
        table = Table("gate step", "pictures", "time", "against the first", box=None)
        for column in columns:
            ratio = columns[0].seconds / column.seconds
            table.add_row(column.label, str(len(column.pictures)), f"{column.seconds:.2f} s", f"{ratio:.2f}× as fast")
        console.print(table)
        for path in paths:
            console.print(str(path))


def main() -> None:
    """Run the command."""
    app()
