"""The ways to draw: each draws what it names, and the clock does not change how it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import tgate_trt
from tgate_trt.bench.contenders import Studio, _timed_calls
from tgate_trt.bench.settings import CAPTURED, CFG_DROP, CUTOFF, EAGER, TGATE, VANILLA, Setting
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.gate.denoiser import FIDELITY, PLANNING
from tgate_trt.running.drawing import Drawing

GRAPHS = ("vanilla", "planning", "fidelity")


@pytest.fixture(scope="module")
def bundle(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Read only."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny-sd"
    backends = ["onnxruntime", "pytorch"]
    return tgate_trt.build(tiny_sd, folder, backend=backends, precision="fp32", graphs=GRAPHS, verify=False, components=False)


@pytest.fixture
def studio(bundle: Bundle) -> Iterator[Studio]:
    with Studio(bundle, torch.device("cpu"), "ddim", threads=1, components=False) as studio:
        yield studio


@pytest.fixture
def drawing(bundle: Bundle) -> Drawing:
    return Drawing(("a red fox",), steps=4).of(bundle)


def draw(studio: Studio, drawing: Drawing, setting: Setting, watch: Stopwatch | None = None) -> torch.Tensor:
    latents: torch.Tensor = studio.contender(setting).draw(drawing, watch, output_type="latent")
    return latents


@pytest.mark.parametrize("gate_step", [1, 3])
def test_diffusers_cutoff_is_guidance_dropped_for_the_prompts_half(gate_step: int, studio: Studio, drawing: Drawing) -> None:
    watch = Stopwatch()
    theirs = draw(studio, drawing, Setting(CUTOFF, None, gate_step), watch)
    ours = draw(studio, drawing, Setting(CFG_DROP, "onnxruntime", gate_step, "positive"))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (watch.calls[PLANNING], watch.calls[FIDELITY]) == (gate_step, 4 - gate_step)


def test_diffusers_cutoff_takes_one_picture(studio: Studio, drawing: Drawing) -> None:
    several = Drawing(("a red fox", "a blue door"), steps=4).of(studio.bundle)
    with pytest.raises(InputError, match="one picture at a time"):
        draw(studio, several, Setting(CUTOFF, None, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_graphs_need_a_gpu(studio: Studio) -> None:
    with pytest.raises(InputError, match="no NVIDIA GPU here"):
        studio.contender(Setting(CAPTURED))


def test_the_clock_leaves_a_compiled_denoiser_whole() -> None:
    denoiser = torch.nn.Linear(2, 2)
    denoiser.compile(backend="eager")
    sample = torch.randn(4, 2)
    denoiser(sample)
    counters.clear()
    watch = Stopwatch()
    with _timed_calls(watch, denoiser, 4):
        denoiser(sample)
    denoiser(sample)
    assert watch.calls == {PLANNING: 1}
    assert not counters["graph_break"]
    assert not counters["stats"]["unique_graphs"], "the clock made it compile again"
    torch._dynamo.reset()


def test_where_weights_are_shared_planning_steps_before_the_last_are_vanilla(studio: Studio, drawing: Drawing) -> None:
    for backend, engines in (("pytorch", 3), ("onnxruntime", 2)):
        contender = studio.contender(Setting(TGATE, backend, 2))
        assert len(contender.denoiser.engines) == engines
        assert draw(studio, drawing, Setting(TGATE, backend, 2)).isfinite().all()
    vanilla = studio.contender(Setting(VANILLA, "pytorch")).denoiser.engines["vanilla"]
    assert studio.contender(Setting(TGATE, "pytorch", 2)).denoiser.engines["vanilla"] is vanilla
    assert Setting(EAGER).baseline == Setting(EAGER)
