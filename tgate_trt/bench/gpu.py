"""``python -m tgate_trt.bench gpu STAGE …``: what is to be measured on a GPU host, in stages of minutes that can be run alone.

    probe        does each TensorRT build and run on this GPU, for which compute capability, with which error otherwise
    correctness  `pytest -m gpu`
    sd15, sdxl   steps and pictures at full size, random weights, fp16, with every kind of engine that runs here

Results are JSON beside one table, `docs/results/gpu.md`. No stage has been run on a GPU by us yet. On a machine without one,
`sd15` with ONNX Runtime takes the same code, and the probe says what cannot be run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_trt.backends import ONNXRUNTIME, why_not
from tgate_trt.bench.record import environment
from tgate_trt.bench.spread import spread
from tgate_trt.bench.steps import STEPS
from tgate_trt.bench.studio import CFG_DROP, TGATE, VANILLA, Method, Studio
from tgate_trt.builder import build
from tgate_trt.bundle import Bundle, replace_file
from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, compute_capability
from tgate_trt.errors import InputError, TGateError
from tgate_trt.export.verify import random_inputs, relative_error
from tgate_trt.specs import ROWS, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import GRAPHS

logger = logging.getLogger(__name__)

MODELS = ("sd15", "sdxl")
STAGES = ("probe", "correctness", *MODELS)

KINDS = (
    ("tensorrt", "baked"),
    ("tensorrt", "shared"),
    ("tensorrt-rtx", "baked"),
    ("tensorrt-rtx", "shared"),
    ("tensorrt-rtx", "shared-linear"),
    (ONNXRUNTIME, "baked"),
)
"""Backends, and where the weights of their engines are."""

WAYS: tuple[tuple[Method, int], ...] = ((VANILLA, 0), (CFG_DROP, 10), (TGATE, 5), (TGATE, 10))
"""Ways to draw, and how many of `STEPS_OF_A_PICTURE` come before the gate."""

STEPS_OF_A_PICTURE = 25
_PROMPT = "an astronaut in a jungle"
_GUIDANCE = 5.0
_WARM_UP = 3
_CALLS = 10
"""Calls in one sample of a step."""


class Clock:
    """Times spans on a device: by CUDA events, so that the host waits only when the times are read, or by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is launched within."""
        start, end = self._now(), None
        try:
            yield
        finally:
            end = self._now()
            self._spans[name].append((start, end))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> dict[str, list[float]]:
        """The spans so far, by name."""
        if not self._on_gpu:
            return {name: [end - start for start, end in spans] for name, spans in self._spans.items()}
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in spans] for name, spans in self._spans.items()}


def probe() -> dict[str, Any]:
    """Build and run a small network by each flavour, for this GPU and for each that it knows, each try in its own process."""
    tries = []
    for backend, flavour in FLAVOURS.items():
        for capability in (None, *flavour.capabilities):
            command = [sys.executable, "-P", "-m", "tgate_trt.bench", "try-one", backend, *([capability] if capability else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            last = (done.stdout.strip().splitlines() or ["{}"])[-1]
            try:
                row = json.loads(last)
            except ValueError:
                row = {"error": last}
            if done.returncode and "error" not in row:
                row["error"] = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            tries.append({"backend": backend, "version": flavour.version(), "capability": capability or "this GPU", **row})
    return {"tries": tries}


def try_one(backend: str, capability: str | None) -> dict[str, Any]:
    """One try of the probe; meant for a process of its own, which it may take down."""
    try:
        return _try(backend, capability)
    except TGateError as error:
        return {"error": str(error)}


def _try(backend: str, capability: str | None) -> dict[str, Any]:
    """Build a convolution and a matrix product in fp16, run them, and compare with PyTorch in fp32."""
    import onnx_ir as ir

    flavour = FLAVOURS[backend]
    spec = GraphSpec(
        "probe",
        (TensorSpec("sample", "float16", (ROWS, 64, 32, 32)), TensorSpec("weight", "float16", (64, 64, 3, 3))),
        (TensorSpec("noise_pred", "float16", (ROWS, 64, 32, 32)),),
        {ROWS: Bounds(1, 2, 4)},
    )
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float16[batch,64,32,32] sample, float16[64,64,3,3] weight) => (float16[batch,64,32,32] noise_pred) {
      filtered = Conv <pads = [1, 1, 1, 1]> (sample, weight)
      probabilities = Softmax <axis = -1> (filtered)
      noise_pred = MatMul (filtered, probabilities)
    }"""
    with tempfile.TemporaryDirectory() as folder:
        graph, plan = Path(folder) / "probe.onnx", Path(folder) / "probe.plan"
        ir.save(ir.from_onnx_text(text), graph)
        options = PlanOptions(capabilities=(capability,) if capability else ())
        built = build_plan(flavour, graph, plan, spec, options)
        row: dict[str, Any] = {"plan_bytes": built["bytes"], "build_seconds": built["seconds"]}
        if not torch.cuda.is_available():
            return row | {"error": "built; there is no GPU here to run it"}
        from tgate_trt.engines.tensorrt import Arena, TensorRTEngine

        device = torch.device("cuda", torch.cuda.current_device())
        engine = TensorRTEngine(plan, spec, flavour, Arena(device))
        inputs = {name: value.to(device) for name, value in random_inputs(spec.inputs, 2, torch.Generator().manual_seed(0)).items()}
        inputs["weight"] *= 0.05
        outputs = {"noise_pred": torch.full((2, 64, 32, 32), torch.nan, dtype=torch.float16, device=device)}
        for _ in range(_WARM_UP):  # a plain run, a capture, a replay
            engine.run(inputs, outputs)
        filtered = torch.nn.functional.conv2d(inputs["sample"].float(), inputs["weight"].float(), padding=1)
        return row | {"relative_error": relative_error(outputs["noise_pred"], filtered @ filtered.softmax(-1))}


def correctness() -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [str(Path(sys.executable).parent / "pytest"), "-m", "gpu", "-rs", "--tb=short"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "output": lines[-200:]}


def measure(model: str, kinds: tuple[tuple[str, str], ...], *, rounds: int, size: int | None, device: torch.device) -> dict[str, Any]:
    """Steps and pictures of one architecture with every kind of engine that runs here; why not, for the others."""
    results = {}
    for backend, weights in kinds:
        name = backend if backend == ONNXRUNTIME else f"{backend}, {weights}"
        try:
            bundle = _bundle(model, backend, weights, size)
            reason = why_not(backend, bundle.manifest.engines[backend])
            if reason is not None:
                raise InputError(reason)
            with Studio(bundle, backend=backend, device=device) as studio:
                results[name] = {"plans_bytes": _bytes_of_engines(bundle, backend), **_measure(studio, rounds)}
        except (TGateError, RuntimeError) as error:  # of one kind: the others are measured all the same
            results[name] = {"error": str(error).partition("\n")[0]}
        logger.info("%s of %s: %s", name, model, results[name].get("error", "done"))
    return results


def _bundle(model: str, backend: str, weights: str, size: int | None) -> Bundle:
    folder = Path("bundles") / f"gpu-{model}-{size or 'native'}-{backend}-{weights}"
    return build(
        model,
        folder,
        backend=backend,
        precision="fp16",
        height=size,
        width=size,
        weights=weights,
        graphs=tuple(GRAPHS),
        random_weights=True,
        verify=False,
        components=False,
    )


def _bytes_of_engines(bundle: Bundle, backend: str) -> int:
    files = bundle.manifest.engines[backend].files.values()
    return sum(bundle.manifest.files[name]["size"] for name in files)


def _measure(studio: Studio, rounds: int) -> dict[str, Any]:
    """Times of steps and of pictures, interleaved round by round, and the most GPU memory of each way to draw."""
    steps: dict[str, list[float]] = defaultdict(list)
    pictures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    memory: dict[str, int] = {}
    for number in range(rounds):
        for step in STEPS if number % 2 == 0 else reversed(STEPS):
            steps[step.name].append(_time_step(studio, step.graph, step.rows))
        for method, gate in WAYS if number % 2 == 0 else reversed(WAYS):
            label = method.label(gate)
            for part, seconds in _time_picture(studio, method, gate, memory, label).items():
                pictures[label][part].append(seconds)
    vanilla = pictures[VANILLA.label(0)]["picture"]
    return {
        "steps": {name: spread(samples) for name, samples in steps.items()},
        "pictures": {
            label: {part: spread(samples) for part, samples in parts.items()}
            | {"ratio": spread([own / base for own, base in zip(parts["picture"], vanilla, strict=True)]), "peak_memory": memory[label]}
            for label, parts in pictures.items()
        },
    }


def _time_step(studio: Studio, graph: str, rows: int) -> float:
    """Seconds of one call of an engine, the mean of several."""
    (engine,) = studio.engines(graph)
    inputs = {
        name: value.to(studio.device) for name, value in random_inputs(engine.spec.inputs, rows, torch.Generator().manual_seed(0)).items()
    }
    outputs = {
        tensor.name: torch.empty(tensor.concrete(**{ROWS: rows}), dtype=getattr(torch, tensor.dtype), device=studio.device)
        for tensor in engine.spec.outputs
    }
    for _ in range(_WARM_UP):
        engine.run(inputs, outputs)
    clock = Clock(studio.device)
    with clock.span("calls"):
        for _ in range(_CALLS):
            engine.run(inputs, outputs)
    return clock.seconds()["calls"][0] / _CALLS


def _time_picture(studio: Studio, method: Method, gate: int, memory: dict[str, int], label: str) -> dict[str, float]:
    """Seconds of one picture, of its denoising loop, and of the loop outside the engines."""
    denoiser = studio.put(method, max(gate, 1) / STEPS_OF_A_PICTURE)
    pipeline, clock = studio.pipeline, Clock(studio.device)
    arguments = {"num_inference_steps": STEPS_OF_A_PICTURE, "guidance_scale": _GUIDANCE, **studio.picture_size}
    pipeline(_PROMPT, generator=_noise(), **arguments)
    on_gpu = studio.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    with _watching(clock, denoiser):
        pipeline(_PROMPT, generator=_noise(), **arguments)
    if on_gpu:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()  # TensorRT's own allocations are not PyTorch's
        memory[label] = max(memory.get(label, 0), total - free)
    else:
        memory[label] = 0
    picture = time.perf_counter() - start
    spans = clock.seconds()
    loop = sum(spans["denoiser"])
    return {
        "picture": picture,
        "denoiser": loop,
        "hand-off": sum(spans.get("hand-off", [0.0])),
        "denoiser outside engines": loop - sum(spans["engine"]),
    }


@contextlib.contextmanager
def _watching(clock: Clock, denoiser: Any) -> Iterator[None]:
    """Time the denoiser, its engines and its hand-off while a picture is drawn."""
    watched: list[tuple[Any, str]] = [(engine, "run") for engine in {denoiser.planning, denoiser.fidelity}]
    watched += [(denoiser, "forward"), (denoiser, "_hand_off")]
    names = {"run": "engine", "forward": "denoiser", "_hand_off": "hand-off"}

    def timed(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with clock.span(name):
                return method(*arguments, **keywords)

        return call

    for owner, method in watched:
        setattr(owner, method, timed(getattr(owner, method), names[method]))
    try:
        yield
    finally:
        for owner, method in watched:
            delattr(owner, method)


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def write_table(folder: Path) -> None:
    """Write ``gpu.md`` from the JSON files beside it."""
    lines = ["# Measured on a GPU host", "", "Made by `python -m tgate_trt.bench gpu` from the JSON files beside this page.", ""]
    for path in sorted(folder.glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            f"## {record['stage']}",
            "",
            f"{record['date'][:10]}, {record['gpu']}, commit {record['commit']}. `{record['command']}`",
            "",
        ]
        lines += [*_rows(record["results"]), ""]
    replace_file(folder / "gpu.md", "\n".join(lines))


def _rows(results: Mapping[str, Any]) -> Iterator[str]:
    """A stage's results as lines of Markdown."""
    if "tries" in results:
        yield "| backend | built for | result |\n| --- | --- | --- |"
        for row in results["tries"]:
            result = row.get("error") or f"runs, relative error {row['relative_error']:.1e}"
            yield f"| {row['backend']} {row['version']} | {row['capability']} | {result} |"
        return
    if "summary" in results:
        yield f"`pytest -m gpu`: {results['summary']}"
        return
    yield "| engine | what | median | p10 … p90 | ratio | peak memory |\n| --- | --- | ---: | ---: | ---: | ---: |"
    for kind, result in results.items():
        if "error" in result:
            yield f"| {kind} | not run: {result['error']} | | | | |"
            continue
        for name, times in result["steps"].items():
            yield f"| {kind} | {name} | {_times(times)} | | |"
        for label, parts in result["pictures"].items():
            for part in ("picture", "denoiser", "hand-off", "denoiser outside engines"):
                times = parts[part]
                ratio = f"{parts['ratio']['median']:.3f}" if part == "picture" else ""
                peak = f"{parts['peak_memory'] / 2**30:.2f} GiB" if part == "picture" else ""
                yield f"| {kind} | {label}: {part} | {_times(times)} | {ratio} | {peak} |"


def _times(seconds: Mapping[str, float]) -> str:
    median, low, high = (f"{seconds[name] * 1e3:.2f} ms" for name in ("median", "p10", "p90"))
    return f"{median} | {low} … {high}"


def run(stages: Sequence[str], kinds: Sequence[str], *, rounds: int, size: int | None, output: Path, command: str) -> Iterator[Path]:
    """Go through stages; each leaves its results when it is done.

    Args:
        stages: of `STAGES`.
        kinds: of engines, as in ``"tensorrt-rtx:shared"``; all if empty.
        rounds: how often times are taken.
        size: side of the pictures in pixels; the model's own if None.
        output: folder of the results.
        command: as it can be typed again.

    Yields:
        The file of each stage's results.

    Raises:
        InputError: if there is no such stage.
    """
    for stage in stages:
        if stage not in STAGES:
            raise InputError(f"a stage is one of {', '.join(STAGES)}, got {stage!r}")
    chosen = tuple((backend, weights or "baked") for backend, _, weights in (text.partition(":") for text in kinds)) or KINDS
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    gpu = f"{torch.cuda.get_device_name()} ({compute_capability()})" if device.type == "cuda" else "no GPU"
    output.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if stage == "probe":
            results = probe()
        elif stage == "correctness":
            results = correctness()
        else:
            results = measure(stage, chosen, rounds=rounds, size=size, device=device)
        record = {"stage": stage, "command": command, "gpu": gpu, **environment(), "results": results}
        replace_file(output / f"gpu-{stage}.json", json.dumps(record, indent=2) + "\n")
        write_table(output)
        yield output / f"gpu-{stage}.json"
