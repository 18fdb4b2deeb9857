"""Pictures of the demo model that show what their captions say, by method and gate step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tgate_trt.bench.studio import CFG_DROP, TGATE, VANILLA, Method, Studio
from tgate_trt.demo import GUIDANCE_SCALE
from tgate_trt.demo.dataset import examples
from tgate_trt.demo.evaluate import evaluate

MODEL = "shapes"
"""The model whose pictures the scorer can read."""

OFFICIAL_STEPS = 25
GATES: tuple[tuple[Method, int], ...] = (
    (VANILLA, OFFICIAL_STEPS),
    (TGATE, 3),
    (TGATE, 5),
    (TGATE, 10),
    (TGATE, 15),
    (CFG_DROP, 10),
)
"""What is scored: a method and its gate step, out of `OFFICIAL_STEPS`."""

SEED = 0
"""Of the captions and of the noise."""

BATCH_SIZE = 16
"""Pictures in one call of the pipeline."""


def measure(studio: Studio, *, samples: int, steps: int) -> Iterator[dict[str, Any]]:
    """Draw the same held-out captions from the same noise in every way, and read the pictures back.

    Args:
        studio: of the demo model's bundle.
        samples: captions; at most all that were held out of training.
        steps: of a picture; gates stand at the same fraction of them as of `OFFICIAL_STEPS`.

    Yields:
        After each setting, the results of all settings so far: what `tgate_trt.demo.evaluate.Score` tells, with
        Wilson's 95 % intervals.
    """
    captioned = examples(samples, held_out=True, seed=SEED)
    results: dict[str, Any] = {}
    for method, gate_step in GATES:
        gate = gate_step / OFFICIAL_STEPS
        studio.put(method, gate)
        score = evaluate(
            studio.pipeline, captioned, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, seed=SEED, batch_size=BATCH_SIZE
        )
        planning = method.planning_steps(gate, steps)
        name = f"{method.name} {gate_step}/{OFFICIAL_STEPS}"
        results[name] = {"label": method.label(planning), "planning_steps": planning, **score.to_json()}
        yield results
