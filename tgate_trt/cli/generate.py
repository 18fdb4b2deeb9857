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
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, made by tgate-build.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw. Repeat the option for several prompts.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: the model's own, mostly 25]")] = None,
    gate_step: Annotated[
        list[str] | None,
        typer.Option(
            help="Planning steps: a count, a fraction, a noise level as in noise:1.35, or none. Repeat the option to compare. "
            "[default: the model's own]"
        ),
    ] = None,
    after_gate: Annotated[
        list[str] | None,
        typer.Option(
            help="From the gate on: negative (T-GATE), positive, or fading, which fades guidance out. Repeat the option to compare. "
            "[default: negative]"
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="A whole gate, such as 10,sp=5,warm=2 or 7,after=positive,forecast=2 or drop=10, or the name of one that the bundle "
            "holds, such as tuned. Repeat the option to compare."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance; 1 for none. [default: the model's own]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; each further picture has the next seed.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, dpm++, sde-dpm++, euler, euler-a, heun, kdpm2, lcm, pndm, unipc.")
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures for each prompt.", min=1)] = 1,
    backend: Annotated[str | None, typer.Option(help="Engines to use. [default: the first backend that runs here]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: one for each core]", min=1)] = None,
    output: Annotated[
        Path | None, typer.Option(help="A .png, .jpg or .webp file, into which several pictures go as one sheet; or a folder.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs and tracebacks.")] = False,
) -> None:
    """Generate pictures with a bundle, for one gate step or several side by side.

    For example: `tgate-generate bundles/shapes-64x64-fp32 --prompt "a small red circle at the top left on a blue background"
    --gate-step none --gate-step 10`
    """
    with reporting(verbose):
        from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE
        from tgate_trt.running.drawing import Drawing, draw_columns
        from tgate_trt.running.sheet import check_output, save

        drawing = Drawing(
            prompts=tuple(text for text in prompt for _ in range(images)),
            negative_prompt=negative_prompt,
            steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
        )
        check_output(output)
        columns = draw_columns(
            bundle,
            drawing,
            gate_steps=gate_step or (),
            after_gate=after_gate or (DEFAULT_AFTER_GATE,),
            gates=gate or (),
            batch_size=images,
            backend=backend,
            threads=threads,
        )
        paths = save(columns, drawing, output)
        table = Table("gate", "pictures", "time", "against the first", "work", box=None)
        for column in columns:
            ratio = columns[0].seconds / column.seconds
            work = "" if column.work is None else f"{column.work:.0%} of vanilla's"
            table.add_row(column.label, str(len(column.pictures)), f"{column.seconds:.2f} s", f"{ratio:.2f}× as fast", work)
        console.print(table)
        for path in paths:
            console.print(str(path))


def main() -> None:
    """Run the command."""
    app()
