"""The commands, from a model to pictures, and the errors that a user would make."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import psutil
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from PIL import Image
from safetensors.torch import save_file
from typer import Typer
from typer.testing import Result

import tgate_trt
from tgate_trt.building.builder import add_graph
from tgate_trt.bundle.bundle import Bundle, describe_files, write_manifest
from tgate_trt.bundle.manifest import MANIFEST, Manifest
from tgate_trt.cli import build, generate, inspect
from tgate_trt.cli.common import reporting
from tgate_trt.errors import BundleError

from ..process_state import ProcessState

BIN = Path(sys.executable).parent

Run = Callable[..., Result]
ErrorOf = Callable[..., str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """A bundle that the installed command built and verified."""
    folder = tmp_path_factory.mktemp("commands") / "bundle"
    done = subprocess.run([BIN / "tgate-build", "--model", tiny_sd, "--output", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planning agrees with eager PyTorch, fp32 at 1, 2, 3 rows" in done.stdout
    assert "fidelity agrees with eager PyTorch, fp32 at 1, 2, 3 rows" in done.stdout
    assert done.stderr == ""
    return folder


def copy(bundle: Path, to: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle, to / "copy"))


def test_a_bundle_holds_its_weights_once(bundle: Path) -> None:
    manifest = Bundle.open(bundle, full=True).manifest
    weights = manifest.files["weights.safetensors"].size
    assert {"planning.onnx", "fidelity.onnx", "trace.onnx", "weights.safetensors"} <= set(manifest.files)
    assert sum(file.size for name, file in manifest.files.items() if name.endswith(".onnx")) < weights
    assert not [name for name in manifest.files if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]


def test_a_second_build_returns_and_says_why(run: Run, bundle: Path, tiny_sd: Path) -> None:
    before = (bundle / MANIFEST).stat()
    result = run(build.app, "--model", tiny_sd, "--output", bundle)
    assert result.exit_code == 0, result.output
    assert "is up to date" in result.output
    assert (bundle / MANIFEST).stat() == before


def test_pictures_side_by_side(run: Run, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "sheet.png"
    prompts = ("--prompt", "a cat", "--prompt", "a dog")
    gates = ("--gate-step", "none", "--gate-step", 1, "--gate-step", "noise:1e9", "--after-gate", "negative", "--after-gate", "fading")
    result = run(generate.app, bundle, *prompts, "--steps", 3, *gates, "--output", output)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.output.splitlines()[1:6]]
    gated = ["gate step 1", "gate step 1, fading", "gate noise:1e9", "gate noise:1e9, fading"]
    assert [row[0] for row in rows] == ["vanilla", *gated], "vanilla has nothing after its gate"
    assert rows[0][-1] == "100% of vanilla's"
    assert {row[-1] for row in rows[1:]} == {"65% of vanilla's"}, "one of three steps, then half of the rows and no cross-attention"
    assert str(output) in result.output
    assert Image.open(output).width > 3 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_pictures_in_a_folder(run: Run, bundle: Path, tmp_path: Path) -> None:
    options = ("--images", 2, "--negative-prompt", "a dog", "--steps", 2, "--gate-step", 0.5, "--output", tmp_path / "out")
    result = run(generate.app, bundle, "--prompt", "a cat", *options)
    assert result.exit_code == 0, result.output
    pictures = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in pictures] == ["000-gate-step-0.5.png", "001-gate-step-0.5.png"]
    first, second = (Image.open(path) for path in pictures)
    assert first.size == (64, 64) and first.tobytes() != second.tobytes()


def test_one_seed_gives_one_picture(run: Run, bundle: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert run(generate.app, bundle, "--prompt", "x", "--steps", 2, "--seed", 7, "--output", tmp_path / name).exit_code == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_inspect_shows_what_is_held_and_that_it_is_valid(run: Run, bundle: Path) -> None:
    result = run(inspect.app, bundle, "--full")
    assert result.exit_code == 0, result.output
    for text in ("planning", "fidelity", "onnxruntime", "fp32", "tolerance 1e-04", "valid"):
        assert text in result.output


def test_inspect_says_why_a_bundle_is_stale(run: Run, bundle: Path, tmp_path: Path) -> None:
    folder = copy(bundle, tmp_path)
    data = json.loads((folder / MANIFEST).read_text())
    data["built_with"]["torch"] = "1.0"
    data["model"]["fingerprint"]["content"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(data))
    result = run(inspect.app, folder)
    assert result.exit_code == 0
    assert "stale: the model's files changed; torch was 1.0 and is" in result.output.replace("\n", " ")


def test_inspect_says_when_the_model_is_gone(run: Run, bundle: Path, tmp_path: Path) -> None:
    folder = copy(bundle, tmp_path)
    data = json.loads((folder / MANIFEST).read_text())
    data["model"]["reference"]["model"] = str(tmp_path / "gone")
    (folder / MANIFEST).write_text(json.dumps(data))
    result = run(inspect.app, folder)
    assert result.exit_code == 0 and "is not here, so changes to it cannot be seen" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sdxxl"], "sdxl"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "shapes", "--precision", "fp8"], "precision must be one of fp32, fp16, bf16"),
        (["--model", "sd15", "--random-weights", "--precision", "bf16"], "no bf16 kernels"),
        (["--model", "sd15", "--random-weights", "--batch-size", "4:1:1"], "1 <= min <= opt <= max"),
        (["--model", "sd15", "--random-weights", "--batch-size", "40"], "at most 31 images"),
        (["--model", "sd15", "--random-weights", "--backend", "openvino"], "does not build for 'openvino'"),
        (["--model", "sd15", "--random-weights", "--graphs", "planing"], "there is no graph 'planing'"),
        (["--model", "sd15", "--random-weights", "--height", "500"], "500"),
        (["--model", "sd15", "--random-weights", "--output", __file__], "is not a bundle"),
    ],
)
def test_build_refuses_bad_input(
    error_of: ErrorOf, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(build.app, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate-step", "0"], "gate_step must be at least 1"),
        (["--gate-step", "26"], "gate_step=26 is more than the 25 steps"),
        (["--gate-step", "1.5"], "between 0 and 1"),
        (["--gate-step", "half"], "a gate step is a number of steps"),
        (["--gate-step", "noise:half"], "names a positive number, as in noise:1.35"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--scheduler", "dpm"], "there is no scheduler 'dpm'"),
        (["--backend", "openvino"], "there is no backend 'openvino'"),
        (["--backend", "tensorrt"], "holds no engine of tensorrt"),
        (["--output", "picture.bmp", "--steps", "1", "--gate-step", "none"], "takes a .png, .jpg, .jpeg, .webp file or a folder"),
        (["--output", "/proc/nowhere/x.png", "--steps", "1", "--gate-step", "none"], "cannot write to /proc/nowhere: "),
    ],
)
def test_generate_refuses_bad_input(
    error_of: ErrorOf, bundle: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(generate.app, bundle, "--prompt", "a cat", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("app", [generate.app, inspect.app], ids=["generate", "inspect"])
def test_a_damaged_bundle_is_one_sentence(error_of: ErrorOf, app: Typer, bundle: Path, tmp_path: Path) -> None:
    folder = copy(bundle, tmp_path)
    with (folder / "weights.safetensors").open("r+b") as file:
        file.truncate(1000)
    options = ["--prompt", "a cat"] if app is generate.app else []
    assert "weights.safetensors has 1000 bytes instead of" in error_of(app, folder, *options)


def test_a_damaged_bundle_is_built_again(run: Run, bundle: Path, tiny_sd: Path, tmp_path: Path) -> None:
    folder = copy(bundle, tmp_path)
    (folder / "planning.onnx").unlink()
    result = run(build.app, "--model", tiny_sd, "--output", folder, "--no-verify")
    assert result.exit_code == 0, result.output
    assert "building again" in result.output and "planning.onnx is missing" in result.output
    Bundle.open(folder, full=True)


@pytest.mark.parametrize(("verbose", "within"), [(False, ("WARNING", "INFO", "ERROR")), (True, ("DEBUG", "INFO", "WARNING"))])
def test_a_command_sets_the_logs_for_itself_alone(verbose: bool, within: tuple[str, ...]) -> None:
    import diffusers  # noqa: F401 - has set its logger up
    import transformers  # noqa: F401

    before = ProcessState.now()
    with reporting(verbose):
        levels = [logging.getLevelName(logging.getLogger(name).level) for name in ("root", "tgate_trt", "diffusers")]
        assert tuple(levels) == within
        assert are_progress_bars_disabled() is not verbose
    assert ProcessState.now().changes_since(before) == []
    assert not are_progress_bars_disabled()


def test_usage_errors_exit_with_two(run: Run) -> None:
    assert run(generate.app).exit_code == 2
    assert run(build.app, "--model", "shapes", "--nonsense").exit_code == 2


@pytest.mark.parametrize("command", ["tgate-build", "tgate-generate", "tgate-inspect"])
def test_help_of_the_installed_commands(command: str) -> None:
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, check=True)
    assert command in done.stdout


# Machines that fail


def children_of(process: int) -> list[int]:
    return [child.pid for child in psutil.Process(process).children(recursive=True)]


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda one: one.name)
def test_a_build_that_is_ended_leaves_no_process_and_the_old_bundle(signal_: signal.Signals, bundle: Path, tmp_path: Path) -> None:
    """Ended while a child verifies; after SIGKILL the next build removes the temporary folder."""
    folder = copy(bundle, tmp_path)
    command = [BIN / "tgate-build", "--model", Bundle.open(bundle).manifest.model.reference.model, "--output", folder, "--force"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        while not (started := children_of(process.pid)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal_)
        output = process.stdout.read()
    assert process.returncode == (-signal.SIGKILL if signal_ is signal.SIGKILL else 1)
    assert signal_ is signal.SIGKILL or output.endswith("stopped; unfinished files are removed\n")
    _, alive = psutil.wait_procs([psutil.Process(child) for child in started if psutil.pid_exists(child)], timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE], "an ended child may wait for the first process"
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("copy", ".tgate-trt")]
    assert len(left) == (1 if signal_ is signal.SIGKILL else 0)
    Bundle.open(folder, full=True)


@pytest.mark.parametrize("command", ["tgate-build", "tgate-refit"])
def test_a_disk_that_is_full_is_one_sentence(command: str, bundle: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: writes fail in the same places."""
    folder, lora = copy(bundle, tmp_path), tmp_path / "lora.safetensors"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(4000, 32), f"{name}.lora_B.weight": torch.zeros(32, 4000)}, lora)
    model = Bundle.open(bundle).manifest.model.reference.model
    arguments = {"tgate-build": ["--model", model, "--output", folder, "--force", "--no-verify"], "tgate-refit": [folder, "--lora", lora]}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run([BIN / command, *arguments[command]], capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert re.fullmatch(r"error: cannot read or write \S+: .*; free some disk space, or choose another --output; .*\n", done.stderr), (
        done.stderr
    )
    Bundle.open(folder, full=True)


def test_inspect_shows_what_a_bundle_draws(run: Run, bundle: Path) -> None:
    output = " ".join(run(inspect.app, bundle).output.split())
    assert (
        "pictures of 64×64 pixels, prompts of 77 tokens, 1 to 1 images in one run of TensorRT engines, 31 at most of the others" in output
    )
    assert "epsilon, sampled by DDIMScheduler" in output
    assert "gate step 0.4" in output


def test_a_graph_that_takes_weights_from_elsewhere_is_refused(bundle: Path, tmp_path: Path) -> None:
    """The graph has its right hash, and names a file that has none."""
    folder = copy(bundle, tmp_path)
    shutil.copy(folder / "weights.safetensors", tmp_path / "elsewhere.safetensors")
    for name in ("planning.onnx", "trace.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../elsewhere.safetensors"
        (folder / name).write_bytes(model.SerializeToString())
    manifest = Manifest.from_json(json.loads((folder / MANIFEST).read_text()))
    write_manifest(folder, dataclasses.replace(manifest, files=describe_files(folder)))
    opened = Bundle.open(folder, full=True)
    for attempt in (lambda: tgate_trt.load(opened), lambda: add_graph(opened, "vanilla")):
        with pytest.raises(BundleError, match=r"takes weights from '\.\./elsewhere\.safetensors', which is not part of this bundle"):
            attempt()
