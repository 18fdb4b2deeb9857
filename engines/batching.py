"""Continuous batching: engine calls of several threads that wait at the same time become one run of the engine.

Each thread runs a diffusers pipeline of its own, with its own scheduler and gate, and knows nothing of the others. Their denoisers
stand on shared `BatchingEngine`s, whose calls meet in a `Batcher`. It runs one batch at a time: the calls of one graph that wait, whatever
step each is at, for ``timestep`` has a value for each row. So a run joins at its next step and leaves after its last, and no run waits
for another to end. Peers that batch language models call this iteration-level scheduling (Orca, OSDI 2022, section 3.2).

No thread is started: one of the threads that wait runs the batch for all of its members.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tgate_trt.eager import torch_dtype
from tgate_trt.engines.base import Engine, check, given
from tgate_trt.errors import DeadlineError, GateError, TGateError
from tgate_trt.specs import ROWS, GraphSpec, TensorSpec

PATIENCE = 0.25
"""How long a batch waits for members that are about to come, as a share of the time that its graph's last batch took."""

_LATE = 2.0
"""A member is about to come until this many times its usual time between two calls has passed since its last one."""

_WEIGHT = 0.3
"""Of the newest value in a running mean."""


def running_mean(mean: float | None, newest: float, weight: float) -> float:
    """A mean in which the newest value has a weight; it is the mean if there is none yet."""
    return newest if mean is None else (1 - weight) * mean + weight * newest


@dataclass(frozen=True)
class Batch:
    """What one run of an engine did, for whoever counts."""

    graph: str
    members: int
    """Calls that were merged."""
    rows: int
    seconds: float
    """Of copies and run; on a GPU, of their launch."""


@dataclass(eq=False)
class _Call:
    """One call of an engine by a thread, until it is answered."""

    engine: BatchingEngine
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    rows: int
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs, without rows: only calls of equal ones are merged."""
    constants: tuple[Tensor, ...]
    """Inputs without rows, likewise."""
    member: Member | None
    stream: Any
    """PyTorch's current stream of the thread on a GPU."""
    arrived: float
    is_taken: bool = False
    """Whether it is in the batch that runs."""
    is_done: bool = False
    error: BaseException | None = None

    def is_like(self, other: _Call) -> bool:
        """Whether two calls can be merged. Constants on a GPU are the same at one address alone: to compare values would wait for it."""
        return (
            self.engine is other.engine
            and self.shapes == other.shapes
            and all(
                one.data_ptr() == two.data_ptr() or (not one.is_cuda and torch.equal(one, two))
                for one, two in zip(self.constants, other.constants, strict=True)
            )
        )


@dataclass(eq=False)
class Member:
    """A thread's run, from `Batcher.member`: what it took, and how to end it from another thread."""

    batcher: Batcher = field(repr=False)
    waited: float = 0.0
    """Seconds that its calls waited for other batches and members."""
    ran: float = 0.0
    """Seconds of the batches that its calls were in."""
    calls: int = 0
    deadline: float | None = None
    """Of `time.monotonic`, after which its next call raises."""
    _ending: BaseException | None = None
    _returned: float | None = None
    _gap: float | None = None
    """Usual seconds from the end of a call to the next."""

    def cancel(self, error: BaseException) -> None:
        """End the run: its call that waits, or else its next one, raises this error; a batch that runs is not disturbed."""
        self.batcher.cancel(self, error)

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._ending is not None

    def expected_until(self) -> float:
        """Until when this member is about to make a call, of `time.monotonic`."""
        return 0.0 if self._returned is None or self._gap is None else self._returned + _LATE * self._gap

    def comes(self, now: float) -> None:
        """Note the beginning of a call."""
        if self._returned is not None:
            gap = now - self._returned
            self._gap = running_mean(self._gap, gap, _WEIGHT)
        self._returned = None

    def goes(self, now: float) -> None:
        """Note the end of a call."""
        self._returned = now

    def refuse(self, now: float) -> None:
        """Raise if the run was cancelled or is late.

        Raises:
            DeadlineError: if it is late; or whatever `cancel` was given.
        """
        if self._ending is not None:
            raise self._ending
        if self.deadline is not None and now > self.deadline:
            raise DeadlineError("the run's deadline has passed, so it was ended")


class Batcher:
    """Where the engine calls of several threads meet. All engines of a bundle share one, for they share a device."""

    def __init__(self, *, patience: float = PATIENCE, rows: int | None = None, observer: Callable[[Batch], None] | None = None) -> None:
        """Make a meeting place without engines.

        Args:
            patience: see `PATIENCE`; 0 runs what waits at once.
            rows: most rows of a batch; if None, what each engine allows.
            observer: is called after each run, by the thread that ran it.
        """
        self.patience = patience
        self.rows = rows
        self.observer = observer
        self._condition = threading.Condition()
        self._waiting: list[_Call] = []
        """In the order in which they came."""
        self._leader: int | None = None
        """Identity of the thread that runs a batch or has the engines for itself."""
        self._members: set[Member] = set()
        self._here = threading.local()
        self._durations: dict[str, float] = {}
        """Usual seconds of a batch of each graph."""
        self._is_closed = False

    @contextlib.contextmanager
    def member(self, deadline: float | None = None) -> Iterator[Member]:
        """While this lasts, the engine calls of this thread are those of one member.

        Args:
            deadline: of `time.monotonic`, after which its next call raises `DeadlineError`.
        """
        member = Member(self, deadline=deadline)
        before = getattr(self._here, "member", None)
        with self._condition:
            self._members.add(member)
        self._here.member = member
        try:
            yield member
        finally:
            self._here.member = before
            with self._condition:
                self._members.discard(member)
                self._condition.notify_all()

    def cancel(self, member: Member, error: BaseException) -> None:
        """See `Member.cancel`."""
        with self._condition:
            member._ending = error
            self._condition.notify_all()

    def close(self) -> None:
        """Refuse calls from now on: those that wait raise `GateError`, and the batch that runs ends first."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._leader is None)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have the engines for this thread: no batch runs meanwhile."""
        with self._condition:
            self._condition.wait_for(lambda: self._leader is None)
            self._leader = threading.get_ident()
        try:
            yield
        finally:
            self._give_up()

    def run(self, engine: BatchingEngine, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Answer one call, alone or in a batch; see `BatchingEngine.run`."""
        call = engine.call_of(inputs, outputs, getattr(self._here, "member", None))
        member = call.member
        with self._condition:
            if member is not None:
                member.comes(call.arrived)
                member.refuse(call.arrived)
            self._waiting.append(call)
            self._condition.notify_all()
            try:
                leads = self._await(call)
            except BaseException:
                if not call.is_taken:
                    self._waiting.remove(call)
                raise
        if leads:
            try:
                self._lead(call)
            finally:
                self._give_up()
        if member is not None:
            member.goes(time.monotonic())
        if call.error is not None:
            raise call.error

    def _await(self, call: _Call) -> bool:
        """Wait until a call is answered, which gives False, or until its thread is to run batches itself. The lock is held."""
        while not call.is_done:
            if not call.is_taken:
                self._refuse(call)
                if self._leader is None:
                    self._leader = threading.get_ident()
                    return True
            self._condition.wait()
        return False

    def _refuse(self, call: _Call) -> None:
        if call.member is not None:
            call.member.refuse(time.monotonic())
        if self._is_closed:
            raise GateError("the engines were closed while a call waited for them; load the bundle again")

    def _lead(self, own: _Call) -> None:
        """Run batches until one has answered this thread's own call, or it was cancelled; then another thread that waits goes on."""
        while True:
            with self._condition:
                self._linger()
                if not own.is_done:
                    try:
                        self._refuse(own)
                    except BaseException:
                        self._waiting.remove(own)
                        raise
                batch = self._next()
            if batch:
                self._run(batch)
            if own.is_done:
                return

    def _linger(self) -> None:
        """Give members that are about to come the time to come, within bounds. The lock is held."""
        oldest = self._waiting[0]
        end = oldest.arrived + self.patience * self._durations.get(oldest.engine.spec.name, 0.0)
        while self._waiting and not self._is_closed:
            waiting = {call.member for call in self._waiting}
            until = min(end, max((member.expected_until() for member in self._members - waiting), default=0.0))
            left = until - time.monotonic()
            if left <= 0 or sum(call.rows for call in self._waiting if call.engine is oldest.engine) >= oldest.engine.most_rows:
                return
            self._condition.wait(left)

    def _next(self) -> list[_Call]:
        """The next batch: the call that has waited longest, and those that fit beside it, in the order in which they came.

        Every batch has the oldest call, so a call waits at most for as many batches as there were calls before it, of whatever graph.
        The lock is held.
        """
        now, rows = time.monotonic(), 0
        wanted = [call for call in self._waiting if call.member is None or not call.member.is_cancelled]  # the others' threads take them
        batch: list[_Call] = []
        for call in wanted:
            oldest = wanted[0]
            if call.is_like(oldest) and (not batch or rows + call.rows <= oldest.engine.most_rows):
                batch.append(call)
                rows += call.rows
        for call in batch:
            call.is_taken = True
            self._waiting.remove(call)
            if call.member is not None:
                call.member.waited += now - call.arrived
        return batch

    def _run(self, batch: Sequence[_Call]) -> None:
        """Run a batch, and answer its calls, with an error if it fails."""
        engine, start = batch[0].engine, time.monotonic()
        error: BaseException | None = None
        try:
            engine.run_merged(batch)
        except BaseException as raised:
            error = raised
        seconds = time.monotonic() - start
        rows = sum(call.rows for call in batch)
        if error is None and self.observer is not None:
            self.observer(Batch(engine.spec.name, len(batch), rows, seconds))
        with self._condition:
            name = engine.spec.name
            self._durations[name] = running_mean(self._durations.get(name), seconds, _WEIGHT)
            for call in batch:
                call.error = None if error is None else _of_a_member(error, engine.spec, len(batch))
                call.is_done = True
                if call.member is not None:
                    call.member.ran += seconds
                    call.member.calls += 1
            self._condition.notify_all()

    def _give_up(self) -> None:
        with self._condition:
            self._leader = None
            self._condition.notify_all()


class BatchingEngine:
    """Stands where an engine stood, for threads that share it; see `tgate_trt.engines.base.Engine` for the protocol."""

    spec: GraphSpec
    """The graph's inputs and outputs."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        """Share an engine.

        Args:
            engine: that no other thread runs, and that belongs to this one from now on.
            batcher: where its calls meet those of other engines on the same device.
        """
        self.spec, self._engine, self._batcher = engine.spec, engine, batcher
        limit = self.spec.dimensions[ROWS].maximum if ROWS in self.spec.dimensions else 1
        has_rows = all(tensor.has_rows for tensor in self.spec.outputs) and any(tensor.has_rows for tensor in self.spec.inputs)
        self.most_rows = (limit if batcher.rows is None else min(limit, batcher.rows)) if has_rows else 1
        """Rows of its largest batch."""
        self._memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        """Buffers of merged inputs and outputs, with as many rows as a batch may have."""

    @property
    def device(self) -> torch.device:
        """The device that must hold the tensors that `run` receives."""
        return self._engine.device

    @property
    def memory(self) -> int:
        """Bytes of the buffers in which calls are merged."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once, with the calls of other threads that wait for the same graph; each gets its own rows.

        Raises:
            GateError: if a tensor of this call does not fit, which no other call sees; or if the engine was closed.
            TGateError: if the engine failed on the batch, as every call of that batch sees.
        """
        self._batcher.run(self, inputs, outputs)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights between two batches; see `tgate_trt.engines.base.Engine.replace_weights`."""
        with self._batcher.alone():
            self._engine.replace_weights(weights)

    def unload(self) -> None:
        """Free memory between two batches, until the engine runs again."""
        with self._batcher.alone():
            self._engine.unload()

    def close(self) -> None:
        """Free everything, for all threads; the engine cannot run again."""
        with self._batcher.alone():
            self._engine.close()
            self._memory.clear()

    def call_of(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], member: Member | None) -> _Call:
        """A call with tensors that fit the graph.

        Raises:
            GateError: if one is missing or does not fit.
        """
        for tensor in self.spec.inputs:
            check(self.spec, tensor, given(self.spec, inputs, tensor), self.device)
        for tensor in self.spec.outputs:
            check(self.spec, tensor, given(self.spec, outputs, tensor), self.device)
        tensors = [inputs[tensor.name] for tensor in self.spec.inputs if tensor.has_rows]
        constants = tuple(inputs[tensor.name] for tensor in self.spec.inputs if not tensor.has_rows)
        rows = {value.shape[0] for value in tensors}
        if len(rows) > 1:
            raise GateError(f"the inputs of one call have the same rows, got {sorted(rows)}; give one row for each row of the latents")
        shapes = tuple(tuple(value.shape[1:]) for value in tensors)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return _Call(self, inputs, outputs, rows.pop() if rows else 1, shapes, constants, member, stream, time.monotonic())

    def run_merged(self, batch: Sequence[_Call]) -> None:
        """Run the calls of a batch at once: one as it is, several on buffers that stay at their addresses."""
        streams = {call.stream for call in batch if call.stream is not None}
        own = torch.cuda.current_stream(self.device) if streams else None
        for stream in streams - {own}:
            own.wait_stream(stream)  # type: ignore[union-attr]
        if len(batch) == 1:
            self._engine.run(batch[0].inputs, batch[0].outputs)
        else:
            with torch.no_grad():
                self._run_on_buffers(batch)
        for stream in streams - {own}:
            stream.wait_stream(own)

    def _run_on_buffers(self, batch: Sequence[_Call]) -> None:
        rows = sum(call.rows for call in batch)
        first = batch[0].inputs
        merged = {spec.name: self._buffer(spec, first[spec.name], rows) for spec in self.spec.inputs if spec.has_rows}
        inputs = {spec.name: merged.get(spec.name, first[spec.name]) for spec in self.spec.inputs}
        outputs = {spec.name: self._buffer(spec, batch[0].outputs[spec.name], rows) for spec in self.spec.outputs}
        for name, buffer in merged.items():
            torch.cat([call.inputs[name] for call in batch], out=buffer)
        self._engine.run(inputs, outputs)
        for name, buffer in outputs.items():
            for call, part in zip(batch, torch.split(buffer, [call.rows for call in batch]), strict=True):
                call.outputs[name].copy_(part)

    def _buffer(self, spec: TensorSpec, like: Tensor, rows: int) -> Tensor:
        """The first rows of a tensor's buffer, whose address stays as long as the other dimensions do."""
        key = (spec.name, tuple(like.shape[1:]))
        if key not in self._memory or self._memory[key].shape[0] < rows:
            for old in [old for old in self._memory if old[0] == spec.name]:
                del self._memory[old]
            most = self.most_rows if self._batcher.rows is not None else rows
            with torch.inference_mode(False):
                self._memory[key] = torch.empty((most, *like.shape[1:]), dtype=torch_dtype(spec.dtype), device=self.device)
        return self._memory[key][:rows]


def _of_a_member(error: BaseException, spec: GraphSpec, members: int) -> BaseException:
    """What one member of a batch that failed raises: an exception of its own, for a traceback belongs to one thread."""
    if members == 1:
        return error
    if isinstance(error, TGateError):
        own: BaseException = type(error)(*error.args)
    else:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        own = GateError(f"the {spec.name} engine failed on a batch of {members} calls: {reason}")
    own.__cause__ = error
    return own
