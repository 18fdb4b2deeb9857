"""``tgate-serve``: bundles behind an HTTP address."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tgate_trt.cli.common import Verbose, application, console, reporting

app = application()


@app.command()
def serve(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE…", help="Folders of bundles that tgate-build made.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    running: Annotated[int | None, typer.Option(min=1, help="Pictures of a bundle at a time. [default: 4; with several bundles 1]")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Pictures of a bundle that may wait; past them comes 429.")] = 16,
    api_key_file: Annotated[Path | None, typer.Option(help="File with an API key a line, of which a client must have one.")] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds until a picture must be drawn.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that pictures have to end after SIGTERM.")] = 60.0,
    backend: Annotated[str | None, typer.Option(help="Engines to run. [default: the first that runs here]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an engine. [default: one a core]")] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option("--low-memory/--no-low-memory", help="Hold one engine of a bundle at a time. [default: with several bundles]"),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Processes of a bundle, on Ray Serve if more than one.")] = 1,
    write_config: Annotated[Path | None, typer.Option(help="Write a configuration for Ray's `serve deploy` to this file, and end.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what users ask for.")] = False,
    verbose: Verbose = False,
) -> None:
    """Serve bundles by OpenAI's images API, at `/v1/images/generations` and `/v1/images/edits`.

    Requests are batched step by step, so none waits for another to end. `/metrics` has Prometheus' metrics.

    For example: `tgate-serve bundles/shapes-64x64-fp32`
    """
    with reporting(verbose):
        from tgate_trt.errors import UnsupportedError
        from tgate_trt.running.pipeline import LoadOptions
        from tgate_trt.serve.limits import Limits

        try:
            from tgate_trt.serve.server import Settings, serve
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"a server needs the package {error.name}; install tgate-trt with the extra [serve]") from error

        options: LoadOptions = {"backend": backend, "threads": threads}
        if low_memory is not None:
            options["low_memory"] = low_memory
        settings = Settings(
            tuple(bundles),
            host=host,
            port=port,
            running=running,
            queue=queue,
            api_key_file=api_key_file,
            grace=grace,
            log_prompts=log_prompts,
            limits=Limits(seconds=deadline),
            options=options,
        )
        if write_config is not None:
            from tgate_trt.files import replace_file
            from tgate_trt.serve.cluster import config_of

            replace_file(write_config, config_of(settings, replicas))
            console.print(str(write_config))
            return

        def started(address: str) -> None:
            console.print(f"serving {', '.join(settings.names)} at {address}")

        if replicas == 1:
            serve(settings, started)
        else:
            from tgate_trt.serve.cluster import serve_cluster

            serve_cluster(settings, replicas, started)


def main() -> None:
    """Run the command."""
    app()
