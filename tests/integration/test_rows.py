"""The row of a gate as `tgate-inspect` shows it, its work, and what a bundle lacks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli.inspect import app
from tgate_trt.export.macs import macs_of_graph
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.scheduler import level_of_gate, read_scheduler
from tgate_trt.running.row import row_of

Run = Callable[..., Result]


def test_the_work_of_a_row_is_counted_on_its_graphs(sd_bundle: Bundle) -> None:
    row = row_of(sd_bundle, Gate(2, forecast=2), 6)
    sizes = sd_bundle.manifest.signature.sizes(1)
    planning, fidelity = (macs_of_graph(sd_bundle.folder / f"{graph}.onnx", sizes).linear for graph in ("planning", "fidelity"))
    assert row.macs == (2 * planning, 2 * planning, fidelity, 0, fidelity, fidelity)
    assert row.vanilla == 2 * planning
    assert row.share == pytest.approx((4 * planning + 3 * fidelity) / (12 * planning))
    assert row.missing == ()


def test_graphs_that_the_bundle_lacks_are_cut_from_its_trace(sd_bundle: Bundle) -> None:
    row = row_of(sd_bundle, Gate(deep=3), 7)
    assert row.missing == ("keep-deep0", "reuse-deep0")
    assert row.macs[1] == row.macs[2] < row.vanilla / 2 < row.macs[0] == row.vanilla


def test_a_noise_level_is_found_in_the_bundles_own_scheduler(sd_bundle: Bundle) -> None:
    level = level_of_gate(read_scheduler(sd_bundle.pipeline), 10, 4)
    assert row_of(sd_bundle, Gate(f"noise:{level:g}"), 10).schedule.gate_step == 4


def test_the_strip_has_a_cell_a_call_and_says_what_to_build(run: Run, sd_bundle: Bundle) -> None:
    done = run(app, sd_bundle.folder, "--gate", "4,sp=2,after=positive,forecast=2", "--steps", 9)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "4,after=positive,sp=2,forecast=2: 9 steps"
    assert lines[1].split() == [*"ABCDE·E·E"]
    shown = " ".join(done.stdout.split())
    assert "· forecast: 2 of 9 calls, each 0.00 GMACs, 0.0% of vanilla's" in shown
    assert "this bundle lacks keep-self, reuse-self; add them with tgate-build --model" in shown
    assert "--gate 4,after=positive,sp=2,forecast=2" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--gate", "10", "--steps", "4"), "gate_step=10 is more than the 4 steps of this run"),
        (("--gate", "0.2,sp=2,warm=3", "--steps", "10"), "warm=3 leaves nothing to reuse in a run of 10 steps"),
        (("--gate", "tuned"), "a gate step is a number of steps"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: tuple[str, ...], reason: str, error_of: Callable[..., str], sd_bundle: Bundle) -> None:
    assert reason in error_of(app, sd_bundle.folder, *arguments)


def test_every_gate_of_a_command_line_is_refused_before_anything_is_drawn(
    error_of: Callable[..., str], sd_bundle: Bundle, tmp_path: Path
) -> None:
    from tgate_trt.cli.generate import app as generate

    common = (sd_bundle.folder, "--prompt", "a fox", "--output", tmp_path / "a.png", "--gate", "2")
    assert "holds no onnxruntime engine of the keep-deep0 graph" in error_of(generate, *common, "--gate", "none,deep=3")
    assert "forecast=1 is impossible" in error_of(generate, *common, "--gate", "2,forecast=1")
    assert not (tmp_path / "a.png").exists()
