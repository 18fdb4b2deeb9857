"""The bundled demo model `shapes`: its data set, its training, its weights, and a scorer that reads the meaning of pictures.

`dataset` draws captioned pictures, `training` trains the model on them, `scorer` reads the attributes of a picture, and `evaluate`
counts a pipeline's correct pictures. This module is light: it loads no framework.
"""

from tgate_trt.models.architectures import DEMO

NAME = DEMO.name
"""The name of the model; a program can read what its pictures show."""

MODEL_DIR = DEMO.folder
"""Folder of the trained pipeline in diffusers' format, for `StableDiffusionPipeline.from_pretrained(MODEL_DIR)`."""

GUIDANCE_SCALE = DEMO.guidance_scale or 1.0
"""The scale of classifier-free guidance at which the model draws best."""

NUM_INFERENCE_STEPS = DEMO.steps
"""The number of DPM-Solver++ steps for which the model's accuracy is stated."""

__all__ = ["GUIDANCE_SCALE", "MODEL_DIR", "NAME", "NUM_INFERENCE_STEPS"]
