"""The bundled demo model `shapes`: its pictures, its training, its weights, and a scorer that reads meaning back by program.

`dataset` draws captioned pictures, `train` makes the model from them, `scorer` reads a picture's attributes, and `evaluate`
counts how many pictures of a pipeline are right. This module is light: it loads no framework.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The trained pipeline, a folder in diffusers' format: `StableDiffusionPipeline.from_pretrained(MODEL_DIR)`."""

GUIDANCE_SCALE = 2.0
"""The classifier-free guidance scale that the model draws best with."""

NUM_INFERENCE_STEPS = 25
"""The steps of DPM-Solver++ that the model's accuracy is stated for."""

__all__ = ["GUIDANCE_SCALE", "MODEL_DIR", "NUM_INFERENCE_STEPS"]
