"""``tgate-refit``: put LoRAs into a bundle without building it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tgate_trt.cli.common import application, console, reporting

app = application()


@app.command()
def refit(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle that tgate-build made.")],
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:SCALE, a .safetensors file. May be given several times. [default: none]")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Put LoRAs into a bundle in the place of those of an earlier refit; without --lora, bring back the weights that were built.

    For example: `tgate-refit bundles/sdxl-1024x1024-fp16 --lora style.safetensors:0.8`
    """
    with reporting(verbose):
        import tgate_trt

        refitted = tgate_trt.refit(bundle, lora or ())
        loras = ", ".join(f"{held.name} ({held.scale:g})" for held in refitted.manifest.lora)
        console.print(f"{refitted.folder}: {loras or 'the weights that were built'}")


def main() -> None:
    """Run the command."""
    app()
