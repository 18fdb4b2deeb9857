"""``tgate-build``: build a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tgate_trt.cli.common import application, console, reporting
from tgate_trt.models.architectures import names

app = application()


def _names(text: str) -> list[str]:
    return text.split(",")


def _gibibytes(text: str) -> int:
    return int(float(text) * 2**30)


_Side = Annotated[str | None, typer.Option(help="Of the picture, in pixels; MIN:OPT:MAX for a range. [default: the model's own]")]


@app.command()
def build(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=f"{names()}; a diffusers folder; a .safetensors checkpoint; or a hub id.")],
    output: Annotated[Path | None, typer.Option(help="The bundle's folder. [default: bundles/MODEL-WIDTHxHEIGHT-PRECISION]")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime, pytorch, tensorrt-rtx, tensorrt. May be given several times. "
            "[default: tensorrt with a GPU, else onnxruntime]"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or fp16. [default: fp32 for onnxruntime, and for pytorch without a GPU; else fp16]")
    ] = None,
    height: _Side = None,
    width: _Side = None,
    batch_size: Annotated[str, typer.Option(help="Images a run: MIN:OPT:MAX, or one number.")] = "1:1:1",
    controls: Annotated[
        list[str] | None,
        typer.Option("--control", help="What may add to the hidden states: controlnet, t2i-adapter. May be given several times."),
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Gate that the bundle shall be able to run, such as 10,sp=5,warm=2. May be given several times."),
    ] = None,
    graphs: Annotated[
        str | None,
        typer.Option(
            parser=_names,
            metavar="NAMES",
            help="Graphs to cut, with commas: vanilla, planning, fidelity. [default: planning,fidelity; vanilla too with --weights shared]",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to build tensorrt-rtx engines for, such as SM89. May be given several times. "
            "[default: the one here; without one, all from Ampere on]"
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(help="Of TensorRT engines: baked into each; shared, one copy for all; shared-linear, shared but for convolutions'."),
    ] = "baked",
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:SCALE to fuse into the weights, .safetensors. May be given several times.")
    ] = None,
    components: Annotated[bool, typer.Option(help="Make engines of text encoders and the VAE's decoder too.")] = True,
    fuse_cache_reuse: Annotated[
        str | None,
        typer.Option(
            help="How the reuse of the cache runs: plugin, a TensorRT plugin; function, one op that backends expand; off. "
            "[default: plugin where TensorRT takes it, else function]"
        ),
    ] = None,
    discard_graphs: Annotated[
        bool, typer.Option("--discard-graphs", help="Leave graphs and weights out of the bundle that baked engines do without.")
    ] = False,
    optimization_level: Annotated[int | None, typer.Option(help="Of TensorRT's builder, 0 to 5. [default: TensorRT's]")] = None,
    workspace: Annotated[
        str | None,
        typer.Option(parser=_gibibytes, metavar="GIB", help="Scratch memory that a TensorRT kernel may use. [default: no limit]"),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions of TensorRT run the engines.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Let other GPUs from Ampere on run the engines; tensorrt only.")
    ] = False,
    refittable: Annotated[bool, typer.Option("--refittable", help="Let the weights in the engines be exchanged; takes a GPU.")] = False,
    stripped: Annotated[
        bool, typer.Option("--strip", help="Leave the weights out of the engines until they are loaded; takes a GPU.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Diffusers folder with a checkpoint's configuration and tokenizers. [default: found from the file]")
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon, v_prediction or sample, in the place of what the model states. [default: the model's own]")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Fill a named architecture with seeded random weights.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare each graph, and each engine that runs here, with eager PyTorch.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Build even if nothing changed; trace anew.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Trace a diffusion model once, cut it at the gate, and verify every graph and engine against eager PyTorch.

    For example: `tgate-build --model shapes`
    """
    with reporting(verbose):
        import dataclasses

        import tgate_trt
        from tgate_trt.engines.tensorrt_builder import PlanOptions

        options = {name: value for name, value in context.params.items() if name != "verbose"}
        plans = {field.name for field in dataclasses.fields(PlanOptions)} & options.keys()
        options["plan_options"] = PlanOptions(**{name: options.pop(name) for name in plans})
        bundle = tgate_trt.build(**options)
        size = sum(file.size for file in bundle.manifest.files.values())
        console.print(f"{bundle.folder}: {', '.join(bundle.manifest.graphs)}; {size / 1e6:,.0f} MB")


def main() -> None:
    """Run the command."""
    app()
