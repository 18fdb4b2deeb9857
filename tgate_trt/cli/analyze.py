"""``tgate-analyze``: how attention and text act over the steps of a model, and where its gate can stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tgate_trt.cli.common import application, console, reporting

if TYPE_CHECKING:
    from tgate_trt.analysis.results import Study

app = application()


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="Folder of a bundle; or a model as tgate-build takes it, of which a bundle is built.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw. May be given several times. [default: the model's own]")] = None,
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
    json_file: Annotated[Path | None, typer.Option("--json", help="File of the results, in the place of --output.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File of the figure, .png, .svg or .pdf, in the place of --output.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Measure where attention converges, what text does in which steps, and what each gate step costs.

    **convergence**: how much cross- and self-attention change from one step to the next. **null-text**: pictures with the prompt in the
    first or in the last steps alone. **gate**: pictures against the gate step, drawn by the bundle's engines.

    The suggested gate step is the smallest from which on accuracy is not significantly below vanilla's (one-sided sign test at 5 %), for
    the demo model, whose pictures can be read by program. For any other model it is the smallest at which the relative change of
    cross-attention, averaged over three steps, has fallen to half of its highest value so far.

    For example: `tgate-analyze bundles/shapes-64x64-fp32`
    """
    with reporting(verbose):
        from tgate_trt.analysis.prompts import read_prompts
        from tgate_trt.analysis.study import analyze_and_save
        from tgate_trt.running.drawing import Drawing

        drawing = Drawing(
            prompts=(*(prompt or ()), *(read_prompts(prompts) if prompts else ())),
            steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
        )
        parts = tuple(dict.fromkeys(part.strip() for part in only.split(",") if part.strip()))
        study, paths = analyze_and_save(
            model,
            drawing,
            samples=samples,
            parts=parts,
            backend=backend,
            random_weights=random_weights,
            output=None if json_file or plot else output,
            json_file=json_file,
            plot=plot,
        )
        console.print(_summary(study))
        for path in paths:
            console.print(str(path))


def _summary(study: Study) -> Table:
    """What was suggested, and by which rule."""
    suggestion = study.suggestion.to_json()
    table = Table("gate step", "rule", box=None)
    for name in ("by_convergence", "by_accuracy"):
        answer = suggestion[name]["gate_step"]
        suggested = ", suggested" if suggestion["rule"] == name else ""
        table.add_row("not measured" if answer is None else f"{answer} of {study.steps}{suggested}", suggestion[name]["rule"])
    return table


def main() -> None:
    """Run the command."""
    app()
