"""A training loop that can be killed at any moment and then continues to the same weights.

Every step takes its randomness from the seed, the stage's name and the step's number alone, so a checkpoint needs no state of
a random generator. A checkpoint is written to a temporary file that then replaces the old one, so it is always whole.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tgate_trt.errors import InputError
from tgate_trt.files import replacing

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 60.0

Loss = Callable[[int, torch.Generator], torch.Tensor]
"""Returns the loss of a step, a scalar; all its randomness comes from the generator, which is on the CPU."""


@dataclass(frozen=True)
class Recipe:
    """How one stage is optimised: AdamW, a linear warm-up, a cosine to zero, clipped gradients."""

    steps: int
    batch_size: int
    learning_rate: float
    warm_up: int = 100
    """Steps until the learning rate is reached."""
    weight_decay: float = 1e-4
    clip: float = 1.0
    """The largest norm of the gradient over all parameters; without clipping the autoencoder hardly learns."""
    average: float = 0.0
    """Decay of an exponential moving average of the weights, which replaces the weights at the end; 0 for no average."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The randomness of one step, independent of every other step and of what ran before."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class StageLog:
    """Logs each step of a stage: the fraction that is done, and a running mean of the last hundred losses or so."""

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self._stage, self._total, self._done = stage, total, done
        self._loss: float | None = None

    def advance(self, loss: torch.Tensor | None = None, count: int = 1) -> None:
        """Log that ``count`` more steps are done, with their loss, a scalar, if they have one."""
        self._done += count
        if loss is not None:
            latest = float(loss.detach())
            self._loss = latest if self._loss is None else 0.98 * self._loss + 0.02 * latest
        shown = f"{self._stage}, loss {self._loss:.4f}" if self._loss is not None else self._stage
        logger.info("%s", shown, extra={"progress": self._done / self._total})
        if self._done == self._total:
            logger.info("%s: done", shown)


def fit(module: nn.Module, loss: Loss, recipe: Recipe, *, stage: str, seed: int, checkpoint: Path) -> None:
    """Trains `module` in place, from its checkpoint if there is one, and gives it the averaged weights if the recipe averages.

    Args:
        module: the module that `loss` uses, already on its device.
        loss: returns the loss of one step.
        recipe: how to optimise.
        stage: the stage's name, for the randomness and the log.
        seed: seed of the randomness.
        checkpoint: the file to continue from and to write to.

    Raises:
        InputError: if the checkpoint was written under another recipe or seed.
    """
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    average = AveragedModel(module, avg_fn=_towards(recipe.average)) if recipe.average else None
    stateful = {"module": module, "optimizer": optimizer} | ({"average": average} if average else {})
    settings = {**asdict(recipe), "seed": seed}
    first = _restore(checkpoint, stateful, settings)
    module.train()
    written = time.monotonic()
    log = StageLog(stage, recipe.steps, first)
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad()
        value = loss(step, step_generator(seed, stage, step))
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        optimizer.step()
        if average:
            average.update_parameters(module)
        log.advance(value)
        if time.monotonic() - written > SECONDS_BETWEEN_CHECKPOINTS or step + 1 == recipe.steps:
            _write(checkpoint, stateful, settings, step + 1)
            written = time.monotonic()
    if average:
        module.load_state_dict(average.module.state_dict())
    module.eval()


def _towards(decay: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]:
    return lambda average, latest, updates: average.lerp(latest, 1 - decay)


def _restore(checkpoint: Path, stateful: dict[str, Any], settings: dict[str, Any]) -> int:
    """Loads a checkpoint and returns the number of steps that it has done, 0 if there is none."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        changed = sorted(name for name in settings if state["settings"].get(name) != settings[name])
        raise InputError(f"{checkpoint} was written with another {', '.join(changed)}; choose another --work folder, or remove the file")
    for name, part in stateful.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _write(checkpoint: Path, stateful: dict[str, Any], settings: dict[str, Any], step: int) -> None:
    """Writes a checkpoint, whole or not at all."""
    state = {name: part.state_dict() for name, part in stateful.items()}
    with replacing(checkpoint) as partial:
        torch.save({**state, "settings": settings, "step": step}, partial)
