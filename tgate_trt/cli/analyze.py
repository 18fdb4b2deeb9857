"""``tgate-analyze``: what attention and text do over the steps of a model, and where its gate can stand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tgate_trt.cli import tune
from tgate_trt.cli.common import Verbose, application, command_line, console, reporting

app = application()


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="Folder of a bundle; or a model as tgate-build takes it, of which a bundle is built.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw. May be given several times. [default: built-in prompts]")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt a line, added to --prompt.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Pictures; prompts are taken in turn. [default: one a prompt; the demo model's captions: 100]", min=1),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: the model's own, mostly 25]")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next have the next seeds.")] = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 for none. [default: the model's own]")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, dpm++, sde-dpm++, euler, euler-a, heun, kdpm2, lcm, pndm, unipc.")
    ] = None,
    only: Annotated[str, typer.Option(help="Parts, with commas: convergence, null-text, gate.")] = "convergence,null-text,gate",
    backend: Annotated[str | None, typer.Option(help="Engines to draw with. [default: the first that runs here]")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Fill a named architecture with seeded random weights.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of analysis-MODEL.json and analysis-MODEL.png.")] = Path("analysis"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record to this file, and nothing to --output.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the figure to this file, .png, .svg or .pdf, and nothing to --output.")] = None,
    verbose: Verbose = False,
) -> None:
    """Measure where attention converges, in which steps the text matters, and what each gate step costs.

    **convergence**: how much cross- and self-attention change from one step to the next. **null-text**: pictures with the prompt only in
    the first or only in the last steps. **gate**: pictures at each gate step, drawn by the bundle's engines.

    The suggested gate step of the demo model, whose pictures a program can read, is the smallest from which on accuracy is not
    significantly below vanilla's (one-sided sign test at 5 %). That of any other model is the smallest at which the relative change of
    cross-attention, averaged over three steps, has fallen to half of its highest value so far.

    `tgate-analyze tune BUNDLE` finds the gate nearest to vanilla within a budget of time; see its own `--help`.

    For example: `tgate-analyze bundles/shapes-64x64-fp32`
    """
    with reporting(verbose):
        from tgate_trt.analysis.prompts import read_prompts
        from tgate_trt.analysis.study import Files, analyze, check_parts
        from tgate_trt.running.drawing import Drawing

        drawing = Drawing(
            prompts=(*(prompt or ()), *(read_prompts(prompts) if prompts else ())),
            steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
        )
        parts = check_parts(tuple(dict.fromkeys(part.strip() for part in only.split(",") if part.strip())))
        files = Files(None if json_file or plot else output, json_file, plot)
        files.check()
        record = analyze(
            model,
            drawing,
            samples=samples,
            command=command_line("tgate-analyze"),
            parts=parts,
            backend=backend,
            random_weights=random_weights,
        )
        console.print(_summary(record))
        for path in files.write(record):
            console.print(str(path))


def _summary(record: dict[str, Any]) -> Table:
    """The suggested gate, as a step and as a noise level, and the rule that suggests it."""
    suggestion, steps = record["results"]["suggestion"], record["settings"]["steps"]
    table = Table("gate step", "noise level", "rule", box=None)
    for name in ("by_convergence", "by_accuracy"):
        answer, noise = suggestion[name]["gate_step"], suggestion[name]["noise"]
        suggested = ", suggested" if suggestion["rule"] == name else ""
        table.add_row(
            "not measured" if answer is None else f"{answer} of {steps}{suggested}",
            "" if noise is None else f"noise:{noise:g}",
            suggestion[name]["rule"],
        )
    return table


def main() -> None:
    """Run the command, or ``tgate-analyze tune``."""
    if sys.argv[1:2] == ["tune"]:
        tune.app(sys.argv[2:], prog_name="tgate-analyze tune")
    app()
