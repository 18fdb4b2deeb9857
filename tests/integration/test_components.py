"""Text encoders and VAE as engines: what a pipeline draws with them is what it draws with the eager ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors import safe_open

import tgate_trt
from tgate_trt.building.verification import Task, verify
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError
from tgate_trt.models.source import ModelReference
from tgate_trt.running.components import CompiledTextEncoder, CompiledVae

PROMPTS = ["a red circle", "two blue squares"]
ARGUMENTS = {"num_inference_steps": 3, "output_type": "pt", "height": 64, "width": 64}
COMPONENTS = {"sd": {"text_encoder", "vae_decoder"}, "sdxl": {"text_encoder", "text_encoder_2", "vae_decoder"}}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest) -> str:
    """Name of a model."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def bundle(model: str, request: pytest.FixtureRequest) -> Bundle:
    """Its bundle."""
    found: Bundle = request.getfixturevalue(f"{model}_bundle")
    return found


@pytest.fixture
def pipeline(bundle: Bundle) -> Any:
    """Its pipeline, loaded from the bundle with every component compiled."""
    return quiet(tgate_trt.load(bundle, gate_step="none", threads=1))


@pytest.fixture
def eager(model: str, request: pytest.FixtureRequest) -> Any:
    """The same pipeline in eager PyTorch, to change."""
    return quiet(DiffusionPipeline.from_pretrained(request.getfixturevalue(f"tiny_{model}"), local_files_only=True))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(pipeline: Any, **more: Any) -> torch.Tensor:
    pictures: torch.Tensor = pipeline(PROMPTS, generator=seeded(), **{**ARGUMENTS, **more}).images
    return pictures


def test_a_bundle_holds_the_components(model: str, bundle: Bundle) -> None:
    assert set(bundle.manifest.model.components) == COMPONENTS[model]
    assert COMPONENTS[model] <= set(bundle.manifest.graphs)


def test_weights_are_where_the_pipeline_has_them(model: str, bundle: Bundle) -> None:
    for graph in COMPONENTS[model]:
        path = bundle.folder / f"{graph}.onnx"
        name = "vae" if graph == "vae_decoder" else graph
        (file,) = (bundle.pipeline / name).glob("*.safetensors")
        parameters = {n: v.const_value for n, v in ir.load(path).graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
        assert parameters and path.stat().st_size < file.stat().st_size
        with safe_open(file, "np") as stored:
            for parameter, tensor in parameters.items():
                assert tensor.location == f"pipeline/{name}/{file.name}"
                assert (tensor.numpy() == stored.get_tensor(parameter)).all()


@pytest.mark.parametrize("more", [{}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}, {"negative_prompt": ["odd", "ugly"]}])
def test_pictures_are_those_of_the_eager_components(pipeline: Any, eager: Any, more: dict[str, Any]) -> None:
    assert isinstance(pipeline.text_encoder, CompiledTextEncoder)
    assert isinstance(pipeline.vae, CompiledVae)
    assert (draw(pipeline, **more) - draw(eager, **more)).abs().max() < 1e-4
    assert pipeline.vae.__dict__["_eager"] is None, "no eager component was loaded for it"
    assert pipeline.text_encoder.__dict__["_eager"] is None


def test_clip_skip_runs_the_eager_encoder(model: str, pipeline: Any, eager: Any) -> None:
    if model == "sd":  # diffusers 0.42 itself fails with transformers 5 here
        for either in (pipeline, eager):
            with pytest.raises(AttributeError, match="text_model"):
                draw(either, clip_skip=1)
        return
    skipped = draw(pipeline, clip_skip=1)
    assert (skipped - draw(eager, clip_skip=1)).abs().max() < 1e-4
    assert (skipped - draw(pipeline)).abs().max() > 1e-4, "and it makes a difference"
    assert not pipeline.text_encoder.is_touched, "the engine is used again afterwards"


def test_a_changed_encoder_is_not_ignored(pipeline: Any) -> None:
    before = draw(pipeline)
    encoder = pipeline.text_encoder.encoder  # who reaches for it may change it, as a LoRA does
    with torch.no_grad():
        encoder.layers[0].mlp.fc1.weight.mul_(3)
    assert (draw(pipeline) - before).abs().max() > 1e-4


def test_image_to_image_encodes_with_the_eager_vae(sd_bundle: Bundle, tiny_sd: Path) -> None:
    loaded = quiet(tgate_trt.load(sd_bundle, gate_step="none", threads=1))
    eager = quiet(StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True))
    picture = torch.rand(1, 3, 64, 64, generator=seeded())
    results = []
    for source in (loaded, eager):
        image_to_image = quiet(StableDiffusionImg2ImgPipeline(**source.components, requires_safety_checker=False))
        if source is loaded:
            tgate_trt.apply(image_to_image, sd_bundle, gate_step="none", threads=1)
        results.append(image_to_image("a cat", image=picture, num_inference_steps=4, output_type="pt", generator=seeded()).images)
    assert (results[0] - results[1]).abs().max() < 1e-4


def test_components_stay_eager_on_request(bundle: Bundle) -> None:
    plain = tgate_trt.load(bundle, gate_step="none", threads=1, components=False)
    assert not isinstance(plain.text_encoder, CompiledTextEncoder) and not isinstance(plain.vae, CompiledVae)


def test_apply_and_remove(bundle: Bundle, eager: Any) -> None:
    own = dict(eager.components)
    expected = draw(eager)
    tgate_trt.apply(eager, bundle, gate_step="none", threads=1)
    assert eager.vae is own["vae"], "apply leaves components alone unless it is asked"
    tgate_trt.apply(eager, bundle, gate_step="none", threads=1, components=True)
    assert isinstance(eager.vae, CompiledVae)
    assert (draw(eager) - expected).abs().max() < 1e-4
    tgate_trt.remove(eager)
    assert {name: part for name, part in eager.components.items() if name in own} == own


def test_sdxls_vae_stays_in_fp32(tiny_sdxl: Path, tmp_path: Path) -> None:
    """SDXL's own configuration says ``force_upcast``: its decoder overflows in fp16."""
    bundle = tgate_trt.build(tiny_sdxl, tmp_path / "bundle", precision="fp16", graphs=["fidelity"], verify=False)
    assert {name: spec.outputs[0].dtype for name, spec in bundle.manifest.graphs.items()} == {
        "fidelity": "float16",
        "text_encoder": "float16",
        "text_encoder_2": "float16",
        "vae_decoder": "float32",
    }
    for name, dtype in {"vae": "torch.float32", "text_encoder": "torch.float16"}.items():
        (file,) = (bundle.pipeline / name).glob("*.safetensors")
        with safe_open(file, "pt") as stored:
            assert {str(stored.get_tensor(key).dtype) for key in stored.keys()} == {dtype}  # noqa: SIM118
    task = Task(ModelReference(str(tiny_sdxl)), bundle.folder, bundle.graph("vae_decoder"), bundle.manifest.built_for)
    report = verify(task)
    assert report["tolerance"] == 1e-4, "that of fp32"
    assert {check["rows"] for check in report["checks"]} == {1, 2}


@pytest.mark.parametrize("gate_step", [1, 2])
def test_low_memory_draws_the_same_with_one_engine_at_a_time(bundle: Bundle, gate_step: int) -> None:
    plain = quiet(tgate_trt.load(bundle, gate_step=gate_step, threads=1))
    frugal = quiet(tgate_trt.load(bundle, gate_step=gate_step, threads=1, low_memory=True))
    engines = (frugal.unet.engines["planning"], frugal.unet.engines["fidelity"])
    held = []

    def look(pipeline: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        held.append([engine._session is not None for engine in engines])
        return kept

    expected = draw(plain)
    for _ in range(2):
        assert torch.equal(draw(frugal, callback_on_step_end=look), expected)
    assert held == 2 * [[step < gate_step, step >= gate_step] for step in range(3)]


def test_a_closed_engine_does_not_come_back(sd_bundle: Bundle) -> None:
    pipeline = quiet(tgate_trt.load(sd_bundle, gate_step=1, threads=1))
    pipeline.unet.close()
    with pytest.raises(GateError, match="has been closed"):
        draw(pipeline)
