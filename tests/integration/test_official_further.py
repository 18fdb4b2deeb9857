"""Self-attention reuse and DeepCache: latents equal those of the official code and of the DeepCache package, in fp32.

Quirks of the two, which are not followed: at ``g - 1 <= warm_up`` the official code only keeps and never reuses, and we refuse such
settings; with PNDM, DeepCache finds a step by its timestep's first place, and so skips one that stands there twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError, StaleBundleError

from .conftest import Lender, eager_pipeline, quiet
from .test_official import BATCHES, MODELS, TOLERANCE, difference, latents_of, official, set_scheduler

tgate = pytest.importorskip("tgate", reason="the official code is a development dependency")

GATES = ("5,sp=2,fi=2,warm=1", "6,deep=2", "4,deep=3,branch=3")


@pytest.fixture(scope="module")
def gated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lender:
    """Lends pipelines of bundles with the graphs of every method, by ONNX Runtime."""

    def make(model: str) -> Any:
        folder = tmp_path_factory.mktemp("bundles") / model
        source = request.getfixturevalue(f"tiny_{model}")
        bundle = tgate_trt.build(source, folder, gates=GATES, components=False, verify=False)
        return quiet(tgate_trt.load(bundle, gate="none", threads=1))

    return Lender(make)


@pytest.fixture(scope="module")
def eager(request: pytest.FixtureRequest) -> Lender:
    """Lends eager pipelines that the official code and DeepCache may patch."""
    return Lender(lambda model: eager_pipeline(request.getfixturevalue(f"tiny_{model}")))


@pytest.mark.parametrize(
    ("gate", "steps", "scheduler", "batch"),
    [
        ("6,sp=2", 8, "ddim", "one prompt"),
        ("7,sp=3,warm=1", 9, "euler-a", "two prompts"),
        ("6,sp=5,warm=2", 8, "dpm++", "one prompt"),
        ("8,sp=4,warm=3", 10, "euler", "two images a prompt"),
        ("3,fi=2", 8, "ddim", "two prompts"),
        ("4,fi=3", 10, "pndm", "one prompt"),
        ("5,sp=2,warm=1,fi=2", 9, "euler", "two prompts"),
        ("6,sp=3,fi=3", 10, "dpm++", "one prompt"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_self_attention_reuse_equals_the_official_code(
    model: str, gate: str, steps: int, scheduler: str, batch: str, gated: Lender, eager: Lender
) -> None:
    ours, theirs = gated.lend(model), eager.lend(model)
    for pipeline in (ours, theirs):
        set_scheduler(pipeline, scheduler)
    ours.unet.gate = gate
    found = ours.unet.gate
    settings = {"gate_step": found.step, "sp_interval": found.sp, "fi_interval": found.fi, "warm_up": found.warm}
    expected = latents_of(official(theirs, model), steps, BATCHES[batch], **settings)
    drawn = latents_of(ours, steps, BATCHES[batch])
    apart = difference(drawn, expected)
    assert apart < TOLERANCE
    ours.unet.gate = str(found.step)
    assert difference(latents_of(ours, steps, BATCHES[batch]), expected) > max(5 * apart, TOLERANCE), "the reuse shows"


@contextlib.contextmanager
def deepcache(pipeline: Any, interval: int, branch: int) -> Iterator[None]:
    """Within this context, the package patches an eager pipeline."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@pytest.mark.parametrize(
    ("gate", "steps", "scheduler", "batch"),
    [
        ("none,deep=2", 6, "ddim", "one prompt"),
        ("none,deep=3", 7, "euler", "two prompts"),
        ("none,deep=3,branch=3", 7, "dpm++", "two images a prompt"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_deepcache_alone_equals_its_package(
    model: str, gate: str, steps: int, scheduler: str, batch: str, gated: Lender, request: pytest.FixtureRequest
) -> None:
    ours, theirs = gated.lend(model), eager_pipeline(request.getfixturevalue(f"tiny_{model}"))
    for pipeline in (ours, theirs):
        set_scheduler(pipeline, scheduler)
    ours.unet.gate = gate
    found = ours.unet.gate
    assert found.deep is not None
    with deepcache(theirs, found.deep, found.branch):
        expected = latents_of(theirs, steps, BATCHES[batch])
    assert difference(latents_of(ours, steps, BATCHES[batch]), expected) < TOLERANCE
    assert difference(latents_of(theirs, steps, BATCHES[batch]), expected) > 10 * TOLERANCE, "the reuse shows"


@pytest.mark.parametrize(
    ("gate", "steps", "scheduler", "batch"),
    [("6,deep=2", 9, "ddim", "one prompt"), ("4,deep=3", 9, "euler", "two prompts"), ("4,deep=3,branch=3", 8, "dpm++", "one prompt")],
)
@pytest.mark.parametrize("model", MODELS)
def test_deepcache_with_the_gate_equals_the_official_loader(
    model: str, gate: str, steps: int, scheduler: str, batch: str, gated: Lender, request: pytest.FixtureRequest
) -> None:
    ours, theirs = gated.lend(model), eager_pipeline(request.getfixturevalue(f"tiny_{model}"))
    for pipeline in (ours, theirs):
        set_scheduler(pipeline, scheduler)
    ours.unet.gate = gate
    found = ours.unet.gate
    loader = getattr(tgate, {"sd": "TgateSDDeepCacheLoader", "sdxl": "TgateSDXLDeepCacheLoader"}[model])
    loader(theirs, cache_interval=found.deep, cache_branch_id=found.branch)
    expected = latents_of(theirs.tgate, steps, BATCHES[batch], gate_step=found.step, sp_interval=1, fi_interval=1, warm_up=2)
    assert difference(latents_of(ours, steps, BATCHES[batch]), expected) < TOLERANCE


def test_what_a_bundle_lacks_is_named_with_the_build_that_adds_it(sd_bundle: Bundle, tiny_sd: Path) -> None:
    pipeline: Any = tgate_trt.load(sd_bundle, threads=1)
    before = pipeline.unet.gate
    for gate, graph in (("5,sp=2", "keep-self"), ("none,deep=3", "keep-deep0")):
        with pytest.raises(StaleBundleError, match=f"no onnxruntime engine of the {graph} graph, .* tgate-build .* --gate {gate}"):
            pipeline.unet.gate = gate
    assert pipeline.unet.gate == before
    with pytest.raises(InputError, match="this model has no branch 9 for DeepCache; it has 0 to 5"):
        tgate_trt.build(tiny_sd, sd_bundle.folder.parent / "lacks", gates=["none,deep=2,branch=9"], verify=False, components=False)


def test_both_backends_draw_every_row(tiny_sd: Path, tmp_path: Path) -> None:
    gates = (
        "4,sp=2,fi=2",
        "3,deep=2",
        "3,after=fading,forecast=2",
        "drop=3,after=fading",
        "none,forecast=2,rule=chebyshev",
        "4,unguided=2",
    )
    bundle = tgate_trt.build(
        tiny_sd, tmp_path / "bundle", backend=["onnxruntime", "pytorch"], gates=gates, components=False, verify=False, precision="fp32"
    )
    drawn: dict[str, list[torch.Tensor]] = {gate: [] for gate in gates}
    for backend in ("onnxruntime", "pytorch"):
        pipeline = quiet(tgate_trt.load(bundle, gate="none", backend=backend, threads=1))
        for gate in gates:
            pipeline.unet.gate = gate
            drawn[gate].append(latents_of(pipeline, 8, BATCHES["two prompts"]))
    for gate, (one, other) in drawn.items():
        assert difference(one, other) < TOLERANCE, gate
