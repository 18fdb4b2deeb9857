"""`Service` on the demo model: each of several threads gets the picture that it would get alone, and limits hold."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.engines.batching import Batch
from tgate_trt.errors import BusyError, CancelledError, ClosedError, DeadlineError, InputError, UnsupportedError
from tgate_trt.serve.picture import Preview, Request
from tgate_trt.serve.previews import steps_to_show
from tgate_trt.serve.service import Job, Service
from tgate_trt.serve.slot import drawn_anew

PROMPTS = ("a large red circle at the top right on a white background", "a small blue square at the center on a black background")
WAIT = 60.0


def pixels(image: Image.Image) -> numpy.ndarray[Any, Any]:
    return numpy.asarray(image)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return []


@pytest.fixture(scope="module")
def service(shapes_bundle: Bundle, batches: list[Batch]) -> Iterator[Service]:
    """Three pictures at a time."""
    with Service(shapes_bundle, running=3, queue=8, backend="onnxruntime", threads=1, on_batch=batches.append) as service:
        yield service


@pytest.fixture(scope="module")
def alone(shapes_bundle: Bundle) -> Any:
    """The same bundle in one pipeline."""
    pipeline = tgate_trt.load(shapes_bundle, backend="onnxruntime", threads=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_alone(alone: Any, request: Request) -> Image.Image:
    alone.unet.gate = alone.unet.origin.bundle.manifest.gate(request.gate or alone.unet.origin.bundle.manifest.default_gate_step)
    picture: Image.Image = alone(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=alone.unet.origin.bundle.manifest.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    return picture


REQUESTS = [
    Request(PROMPTS[0], steps=6, seed=1),
    Request(PROMPTS[1], steps=4, seed=2, gate="2"),
    Request(PROMPTS[0], steps=5, seed=3, gate="none"),
    Request(PROMPTS[1], steps=8, seed=4, gate="3,after=fading"),
    Request(PROMPTS[0], steps=6, seed=5, gate="2,after=positive,forecast=2", negative_prompt="a blue square"),
    Request(PROMPTS[1], steps=3, seed=6),
]
"""Runs of other lengths and gates, which are at other steps at any moment."""


def test_a_picture_is_the_same_as_alone_whatever_is_drawn_beside_it(service: Service, alone: Any, batches: list[Batch]) -> None:
    """Bit-equal: ONNX Runtime's kernels for this model do not depend on the batch, as tests/engines/test_batching.py measures."""
    batches.clear()
    jobs = service.submit(REQUESTS)
    drawn = [job.result(WAIT) for job in jobs]
    assert max(batch.members for batch in batches) > 1
    for request, picture in zip(REQUESTS, drawn, strict=True):
        assert (pixels(picture.image) == pixels(draw_alone(alone, request))).all(), request
        assert picture.seed == request.seed


def test_many_threads_may_draw_at_once(service: Service, alone: Any) -> None:
    with ThreadPoolExecutor(6) as pool:
        drawn = [*pool.map(lambda seed: service.draw(PROMPTS[0], seed=seed, steps=3), range(6))]
    for seed, picture in enumerate(drawn):
        assert (pixels(picture.image) == pixels(draw_alone(alone, Request(PROMPTS[0], seed=seed, steps=3)))).all()


def test_the_pytorch_engine_draws_the_same_picture_to_a_level(shapes_bundle: Bundle) -> None:
    """Its products are split by the number of rows: of 255 levels, no pixel differs by more than one."""
    with Service(shapes_bundle, running=2, backend="pytorch", device="cpu", threads=1) as service:
        together = [job.result(WAIT) for job in service.submit([Request(PROMPTS[0], steps=3, seed=seed) for seed in (1, 2)])]
        for picture in together:
            by_itself = service.draw(PROMPTS[0], steps=3, seed=picture.seed)
            assert numpy.abs(pixels(picture.image).astype(int) - pixels(by_itself.image)).max() <= 1


def test_it_says_what_a_picture_took(service: Service) -> None:
    picture = service.draw(PROMPTS[0], steps=6, gate="2,after=positive,forecast=2")
    assert picture.steps == {"planning": 2, "fidelity": 3, "forecast": 1}
    times = picture.times
    parts = (times.queue, times.encode, times.planning, times.fidelity, times.hand_off, times.forecast, times.decode)
    assert all(part > 0 for part in parts)
    assert sum(parts) <= times.total
    assert picture.tokens == len(service._prompts.pipeline.tokenizer(PROMPTS[0]).input_ids)


def test_previews_come_nearer_to_the_picture(service: Service) -> None:
    shown: list[Preview] = []
    (job,) = service.submit([Request(PROMPTS[0], steps=8, previews=3, seed=3)], show=[shown.append])
    picture = job.result(WAIT)
    assert [(one.index, one.step, one.steps) for one in shown] == [(0, 2, 8), (1, 4, 8), (2, 6, 8)]
    distances = [numpy.abs(pixels(one.image).astype(float) - pixels(picture.image)).mean() for one in shown]
    assert distances[0] > distances[1] > distances[2]
    assert picture.times.previews > 0


@pytest.mark.parametrize("previews", range(4))
@pytest.mark.parametrize("steps", [1, 2, 3, 25])
def test_previews_are_spread_and_never_the_last_step(previews: int, steps: int) -> None:
    shown = steps_to_show(previews, steps)
    assert [*shown.values()] == [*range(len(shown))]
    assert len(shown) == min(previews, steps - 1)
    assert all(1 <= step < steps for step in shown)


def test_a_picture_can_be_edited_and_painted_within_a_mask(service: Service, alone: Any) -> None:
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    start = Image.new("RGB", (100, 80), "blue")
    mask = Image.new("L", (100, 80), 0)
    mask.paste(255, (0, 0, 50, 80))
    assert service.abilities == ("generation", "edit", "inpainting")
    edits = [Request(PROMPTS[0], image=start, strength=0.6, steps=6), Request(PROMPTS[0], image=start, mask=mask, strength=1.0, steps=6)]
    jobs = service.submit(edits)
    drawn = [job.result(WAIT).image for job in jobs]
    makers = (AutoPipelineForImage2Image, AutoPipelineForInpainting)
    alone.unet.gate = alone.unet.origin.bundle.manifest.default_gate_step
    for request, maker, picture in zip(edits, makers, drawn, strict=True):
        pipeline = maker.from_pipe(alone)
        pipeline.set_progress_bar_config(disable=True)
        more = {} if request.mask is None else {"mask_image": mask.resize((64, 64), Image.Resampling.NEAREST), "height": 64, "width": 64}
        expected = pipeline(
            request.prompt,
            image=start.resize((64, 64), Image.Resampling.LANCZOS),
            strength=request.strength,
            num_inference_steps=6,
            guidance_scale=service.bundle.manifest.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            **more,
        ).images[0]
        assert (pixels(picture) == pixels(expected)).all()


def test_slots_that_need_the_eager_part_at_once_load_it_once(shapes_bundle: Bundle) -> None:
    """Two loads at once would leave `torch.nn.Module` as diffusers patches it meanwhile, and every later module without weights."""
    before = vars(torch.nn.Module)["register_parameter"]
    edit = Request(PROMPTS[0], image=Image.new("RGB", (64, 64)), steps=2)
    with Service(shapes_bundle, running=3, backend="onnxruntime", threads=1) as service:
        for job in service.submit([edit] * 3):
            job.result(WAIT)
        service.draw(edit)
    assert vars(torch.nn.Module)["register_parameter"] is before
    assert not any(parameter.is_meta for parameter in torch.nn.Linear(1, 1).parameters())


def test_a_transparent_mask_is_openais() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((0, 0), (0, 0, 0, 0))
    assert [*drawn_anew(mask).tobytes()] == [255, 0]
    assert [*drawn_anew(Image.frombytes("L", (2, 1), bytes([0, 255]))).tobytes()] == [0, 255]


@pytest.mark.parametrize(
    ("request_of", "says"),
    [
        (lambda: Request("circle " * 100), "24 tokens"),
        (lambda: Request(PROMPTS[0], negative_prompt="circle " * 100), "24 tokens"),
        (lambda: Request(PROMPTS[0], gate="ten"), "a gate step is"),
        (lambda: Request(PROMPTS[0], gate="9", steps=5), "needs as many steps"),
        (lambda: Request(PROMPTS[0], gate="none,deep=3"), "no engine of the"),
        (lambda: Request(PROMPTS[0], after_gate="sideways"), "after"),
        (lambda: Request(PROMPTS[0], steps=0), "at least 1"),
        (lambda: Request(PROMPTS[0], seed=-1), "a seed is"),
        (lambda: Request(PROMPTS[0], strength=0.5), "need a picture"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_waits(service: Service, request_of: Callable[[], Request], says: str) -> None:
    with pytest.raises(InputError, match=says):
        service.submit([request_of()])
    assert service.queued == 0


def until_running(service: Service, count: int = 1) -> None:
    """Wait until so many pictures are drawn."""
    moment = threading.Event()
    for _ in range(2000):
        if service.running == count and all(job.member is not None and job.member.calls for job in [*service._drawn]):
            return
        moment.wait(0.005)
    pytest.fail("nothing is drawn")


@pytest.fixture
def small(shapes_bundle: Bundle) -> Iterator[Service]:
    """One picture at a time, and two that wait."""
    with Service(shapes_bundle, running=1, queue=2, backend="onnxruntime", threads=1) as service:
        yield service


LONG = Request(PROMPTS[0], steps=400)


def test_past_the_queue_requests_are_refused_all_or_none(small: Service) -> None:
    small.draw(PROMPTS[0], steps=2)
    jobs = small.submit([LONG])
    until_running(small)
    jobs += small.submit([LONG, LONG])
    with pytest.raises(BusyError, match="1 pictures are drawn and 2 wait") as caught:
        small.submit([LONG])
    assert caught.value.retry_after > 0
    jobs.pop().cancel()
    with pytest.raises(BusyError):
        small.submit([LONG, LONG])
    assert (small.running, small.queued) == (1, 1)
    for job in jobs:
        job.cancel()


def test_a_request_can_be_cancelled_while_it_waits_and_while_it_is_drawn(small: Service) -> None:
    running, waiting = small.submit([LONG, LONG])
    until_running(small)
    waiting.cancel("the client has gone")
    with pytest.raises(CancelledError, match="the client has gone"):
        waiting.result(WAIT)
    running.cancel("the client has gone")
    with pytest.raises(CancelledError, match="the client has gone"):
        running.result(WAIT)
    assert small.draw(PROMPTS[0], steps=2).steps  # the pipeline goes on with the next


def test_a_request_ends_at_its_deadline(small: Service) -> None:
    blocking, late = small.submit([LONG, LONG], deadline=0.4)
    for job in (blocking, late):
        with pytest.raises(DeadlineError):
            job.result(WAIT)
    assert small.draw(PROMPTS[0], steps=2).steps


def test_closing_finishes_what_is_drawn_and_refuses_what_waits(shapes_bundle: Bundle) -> None:
    service = Service(shapes_bundle, running=1, queue=2, backend="onnxruntime", threads=1)
    running, waiting = service.submit([Request(PROMPTS[0], steps=30)] * 2)
    until_running(service)
    service.close()
    assert running.result(0).steps
    with pytest.raises(ClosedError, match="had not begun"):
        waiting.result(0)
    with pytest.raises(ClosedError):
        service.draw(PROMPTS[0])


def test_closing_ends_what_takes_too_long(shapes_bundle: Bundle) -> None:
    service = Service(shapes_bundle, running=1, backend="onnxruntime", threads=1)
    (job,) = service.submit([LONG])
    until_running(service)
    service.close(seconds=0.1)
    with pytest.raises(ClosedError, match="took too long"):
        job.result(0)


def test_an_engine_that_fails_in_mid_run_fails_its_batch_and_the_service_goes_on(shapes_bundle: Bundle, alone: Any) -> None:
    with Service(shapes_bundle, running=2, backend="onnxruntime", threads=1) as service:
        service.draw(PROMPTS[0], steps=2)
        (engine,) = [engine for engine in service._engines.engines if engine.spec.name == "fidelity"]
        whole: Any = engine._engine
        engine._engine = Failing(whole, after=3)
        jobs = service.submit([Request(PROMPTS[0], steps=8, seed=seed, gate="2") for seed in range(2)])
        outcomes = Counter(outcome_of(job) for job in jobs)
        assert outcomes["RuntimeError"] + outcomes["GateError"] >= 1
        engine._engine = whole
        request = Request(PROMPTS[0], steps=4, seed=9)
        assert (pixels(service.draw(request).image) == pixels(draw_alone(alone, request))).all()


class Failing:
    """An engine whose GPU runs out of memory after some runs."""

    def __init__(self, engine: Any, after: int) -> None:
        self.engine, self.left = engine, after
        self.device, self.close = engine.device, engine.close

    def run(self, inputs: Any, outputs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")
        self.engine.run(inputs, outputs)


def outcome_of(job: Job) -> str:
    error = job.future.exception(WAIT)
    return "drawn" if error is None else type(error).__name__


def test_low_memory_holds_one_engine(shapes_bundle: Bundle, alone: Any) -> None:
    request = Request(PROMPTS[0], steps=4, seed=9)
    with Service(shapes_bundle, running=2, backend="onnxruntime", threads=1, low_memory=True) as service:
        drawn = [job.result(WAIT) for job in service.submit([request, request])]
    for picture in drawn:
        assert (pixels(picture.image) == pixels(draw_alone(alone, request))).all()


@pytest.mark.parametrize("limits", [{"running": 0}, {"queue": -1}])
def test_impossible_limits_are_refused(shapes_bundle: Bundle, limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match="running is at least 1"):
        Service(shapes_bundle, **limits)


def test_a_pipeline_that_cannot_edit_says_so(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "abilities", ("generation",))
    with pytest.raises(UnsupportedError, match="cannot do edit; it can do generation"):
        service.draw(PROMPTS[0], image=Image.new("RGB", (8, 8)))
