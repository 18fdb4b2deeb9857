"""The server that is measured under load, in a process of its own, with one of several ways to batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tgate_trt.bench.batch_and_wait import BatchAndWait
from tgate_trt.bench.load import ONE, WAIT
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.console import reporting
from tgate_trt.serve.metrics import Metrics
from tgate_trt.serve.server import Settings, application_of, listening, server_of, services_of
from tgate_trt.serve.service import Service


@contextlib.contextmanager
def services_by(policy: str, settings: Settings, metrics: Metrics) -> Iterator[dict[str, Service]]:
    """The service of a bundle by a policy; all have room for as many pictures."""
    if policy != WAIT:
        with services_of(settings, metrics) as services:
            yield services
        return
    (path,), (name,) = settings.bundles, settings.names
    waiting: Any = BatchAndWait(Bundle.open(path), running=settings.running_limit, queue=settings.queue, options=settings.load_options)
    metrics.watch(name, waiting)
    try:
        yield {name: cast(Service, waiting)}
    finally:
        waiting.close()


def settings_of(bundle: Path, policy: str, running: int, queue: int, backend: str | None) -> Settings:
    """The settings of a policy: one at a time has the places of the others' batches in its queue."""
    more = running - 1 if policy == ONE else 0
    return Settings((bundle,), port=0, running=running - more, queue=queue + more, grace=5, options={"backend": backend})


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM; prints the port. Arguments: bundle, policy, running, queue, backend or an empty text."""
    bundle, policy, running, queue, backend = arguments
    with reporting(False):
        settings, metrics = settings_of(Path(bundle), policy, int(running), int(queue), backend or None), Metrics()
        with contextlib.closing(listening(settings)) as listener, services_by(policy, settings, metrics) as services:
            server = server_of(application_of(settings, services, metrics), settings, [*services.values()])
            sys.stdout.write(f"{listener.getsockname()[1]}\n")
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1:])
