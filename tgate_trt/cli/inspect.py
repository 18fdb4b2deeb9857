"""``tgate-inspect``: what a bundle holds, and whether it is still valid here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tgate_trt.cli.common import application, console, reporting
from tgate_trt.files import read_json
from tgate_trt.specs import MAXIMUM_ROWS

if TYPE_CHECKING:
    from tgate_trt.bundle.bundle import Bundle
    from tgate_trt.bundle.manifest import EngineSet, Manifest, Report

app = application()


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle that tgate-build made.")],
    full: Annotated[bool, typer.Option("--full", help="Hash every file, whatever was found before.")] = False,
    gate: Annotated[
        str | None, typer.Option(help="Show what each step of a run by this gate does, such as 10,sp=5,warm=2, and what it takes.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of that run. [default: the model's own]")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare each engine that runs here with eager PyTorch, and keep the result.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")] = False,
) -> None:
    """Show what a bundle holds, what it was built for, and whether it is still valid here.

    A bundle that is damaged or cannot be read is an error, with exit code 1.
    """
    with reporting(verbose):
        from tgate_trt.building.staleness import state_of
        from tgate_trt.bundle.bundle import Bundle

        opened = Bundle.open(bundle, full=full)
        if gate is not None:
            _show_row(opened, gate, steps)
            return
        if verify:
            from tgate_trt.building.engine_verification import verify_again

            opened = verify_again(opened)
        console.print(_summary(opened))
        console.print(_graphs(opened))
        for sentence in _engines_verified(opened.manifest):
            console.print(sentence)
        state = state_of(opened)
        for remark in state.remarks:
            console.print(remark)
        if state.stale:
            console.print(f"[yellow]stale[/]: {'; '.join(state.stale)}; build it again with tgate-build")
        else:
            console.print("[green]valid[/]: every file is as it was built, and nothing that it was built from or with has changed")


def _summary(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    table = Table(show_header=False, box=None)
    seed = manifest.model.reference.random_seed
    weights = "its own weights" if seed is None else f"random weights, seed {seed}"
    rows = {
        "model": f"{manifest.model.name} ({weights}), content {manifest.model.content[:12]}",
        "built for": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in manifest.built_for.described().items()),
        "built with": ", ".join(f"{name} {version}" for name, version in manifest.built_with.items()),
        "draws": _draws(bundle),
        "predicts": _predicts(bundle),
        "defaults": f"{manifest.steps} steps, gate step {_gate(manifest)}, guidance {manifest.guidance_scale}",
        **({"gates": ", ".join(f"{name} is {text}" for name, text in manifest.gates.items())} if manifest.gates else {}),
        **({"LoRAs": ", ".join(f"{held.name} ({held.scale:g})" for held in manifest.lora)} if manifest.lora else {}),
        **{f"{backend} engines": _engines(engines) for backend, engines in manifest.engines.items()},
        "on disk": f"{sum(file.size for file in manifest.files.values()):,} bytes in {len(manifest.files)} files",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _gate(manifest: Manifest) -> str:
    """The model's default gate: a noise level with the step that it stands for, or a step."""
    default = str(manifest.default_gate_step)
    return default if manifest.gate_noise is None else f"{default} ({manifest.gate_step} of the steps with the model's own scheduler)"


def _draws(bundle: Bundle) -> str:
    """Size of the pictures, length of the prompts and number of images of a run."""
    manifest = bundle.manifest
    images = manifest.built_for.batch_size
    size = f"{manifest.built_for.width.short}×{manifest.built_for.height.short}"
    return (
        f"pictures of {size} pixels, prompts of {manifest.model.text_tokens} tokens, "
        f"{images.minimum} to {images.maximum} images in one run of TensorRT engines, {MAXIMUM_ROWS // 2} at most of the others"
    )


def _predicts(bundle: Bundle) -> str:
    """What the denoiser predicts, and its scheduler."""
    from tgate_trt.models.source import SCHEDULER

    scheduler = read_json(bundle.pipeline / "scheduler" / SCHEDULER)
    return f"{scheduler.get('prediction_type', 'epsilon')}, sampled by {scheduler['_class_name']}"


def _engines(engines: EngineSet) -> str:
    """The graphs of a backend's engines, what they were built for and with."""
    facts = []
    for name, value in engines.options.items():
        if value not in (None, False, []):
            shown = ", ".join(value) if isinstance(value, list) else value
            facts.append(name.replace("_", " ") + ("" if value is True else f" {shown}"))
    facts += [f"{package} {version}" for package, version in engines.built_with.items()]
    return ", ".join(engines.files) + (f" ({'; '.join(facts)})" if facts else "")


def _show_row(bundle: Bundle, text: str, steps: int | None) -> None:
    """Print what a run by a gate does, and how to add what the bundle lacks for it."""
    from tgate_trt.cli.strip import strip_of
    from tgate_trt.running.row import row_of

    row = row_of(bundle, bundle.manifest.gate(text), steps)
    for line in strip_of(row):
        console.print(line)
    if row.missing:
        build = f"tgate-build --model {bundle.manifest.model.reference.model} --output {bundle.folder} --gate {row.gate}"
        console.print(f"[yellow]this bundle lacks[/] {', '.join(row.missing)}; add them with {build}")


def _engines_verified(manifest: Manifest) -> Iterator[str]:
    """A sentence about each backend's engines: the largest error of those that were verified, and why others were not."""
    for backend, engines in manifest.engines.items():
        reports = {graph: found for graph, found in engines.verification.items() if not isinstance(found, str)}
        if reports:
            yield f"{backend} engines against eager: {', '.join(f'{graph} {_largest(report)}' for graph, report in reports.items())}"
        missing: dict[str, list[str]] = {}
        for graph in engines.files.keys() - reports.keys():
            missing.setdefault(str(engines.verification.get(graph, "run tgate-inspect --verify")), []).append(graph)
        for reason, graphs in missing.items():
            yield f"{backend} engines not verified ({', '.join(sorted(graphs))}): {reason}"


def _largest(report: Report) -> str:
    return f"{max(check['error'] for check in report['checks']):.1e} (tolerance {report['tolerance']:.0e})"


def _graphs(bundle: Bundle) -> Table:
    table = Table("graph", "inputs", "caches in", "caches out", "rows", "largest error against eager", box=None)
    for name, spec in bundle.manifest.graphs.items():
        report = bundle.manifest.verification.get(name)
        error = _largest(report) if report else "not verified"
        plain = len(spec.inputs) - len(spec.cache_inputs)
        rows = " ".join(str(bounds) for bounds in spec.dimensions.values())
        table.add_row(name, str(plain), str(len(spec.cache_inputs)), str(len(spec.cache_outputs)), rows, error)
    return table


def main() -> None:
    """Run the command."""
    app()
