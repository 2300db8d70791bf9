"""CascadePipeline on tiny folders: the offline sampler's pictures, in the manners of diffusers' pipelines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rmd
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.dtypes import native_dtype
from rmd.pipeline import CascadeOutput, CascadePipeline
from rmd.pixels import to_pixels
from rmd.sampler import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_folder("sd3", tmp_path_factory.mktemp("tiny") / "sd3")
    record = json.loads((made / "cascade.json").read_text())
    record["teacher"]["steps"] = 3
    (made / "cascade.json").write_text(json.dumps(record))
    return made


@pytest.fixture(scope="module")
def pipe(folder: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(folder)


def drawn(pipe: CascadePipeline, *arguments: Any, **named: Any) -> CascadeOutput:
    output = pipe(*arguments, **named)
    assert isinstance(output, CascadeOutput)
    return output


def test_pictures_are_the_offline_samplers_in_the_devices_own_dtype(folder: Path, pipe: CascadePipeline) -> None:
    assert rmd.CascadePipeline is CascadePipeline and pipe.dtype == native_dtype("cpu")
    backbone, checkpoint = load_checkpoint(folder, dtype=native_dtype("cpu"))
    cascade = checkpoint.default_cascade
    latents = sample(backbone, cascade, backbone.encode_prompts(["a fox", "a ship"]), [5, 6])
    expected = to_pixels(backbone.decode(latents, cascade.full_size))
    output = drawn(pipe, ["a fox", "a ship"], seed=5)
    assert output.seeds == [5, 6] and output.frames is None
    for picture, pixels in zip(output.images, expected, strict=True):
        assert isinstance(picture, Image.Image) and np.array_equal(np.asarray(picture), pixels)


def test_output_types_hold_the_same_picture(pipe: CascadePipeline) -> None:
    (picture,) = drawn(pipe, "a fox", seed=5).images
    floats = drawn(pipe, "a fox", seed=5, output_type="np").images
    tensor = drawn(pipe, "a fox", seed=5, output_type="pt").images
    latents = drawn(pipe, "a fox", seed=5, output_type="latent").images
    height, width = np.asarray(picture).shape[:2]
    assert floats.shape == (1, height, width, 3) and tensor.shape == (1, 3, height, width)
    assert np.array_equal((floats[0] * 255).round().astype(np.uint8), np.asarray(picture))
    assert np.array_equal(tensor.numpy().transpose(0, 2, 3, 1), floats)
    assert tuple(latents.shape[1:]) == pipe.backbone.latent_shape(pipe.cascade().full_size)
    images, seeds = pipe("a fox", seed=5, return_dict=False)  # type: ignore[misc]
    assert seeds == [5] and np.array_equal(np.asarray(images[0]), np.asarray(picture))


def test_several_of_a_prompt_and_parts_of_a_batch(pipe: CascadePipeline) -> None:
    together = drawn(pipe, ["a fox", "a ship"], seed=3, num_images_per_prompt=2, output_type="pt")
    assert together.seeds == [3, 4, 5, 6]
    apart = drawn(pipe, ["a fox", "a ship"], seed=3, num_images_per_prompt=2, output_type="pt", batch_size=1)
    assert (together.images - apart.images).abs().mean() <= 1 / 255
    again = drawn(pipe, ["a ship", "a fox"], seed=[5, 3], output_type="pt")
    assert (again.images - together.images[[2, 0]]).abs().mean() <= 1 / 255


def test_generators_give_seeds(pipe: CascadePipeline) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    first = drawn(pipe, "a fox", generator=generator(), output_type="pt")
    same = drawn(pipe, "a fox", generator=[generator()], output_type="pt")
    assert first.seeds == same.seeds and torch.equal(first.images, same.images)
    one = generator()
    assert drawn(pipe, "a fox", generator=one).seeds != drawn(pipe, "a fox", generator=one).seeds
    assert drawn(pipe, "a fox").seeds != drawn(pipe, "a fox").seeds, "random where nothing is given"


def test_a_callback_sees_every_step_and_may_change_the_state(pipe: CascadePipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def look(_pipe: CascadePipeline, index: int, timestep: float, state: dict[str, Tensor]) -> None:
        seen.append((index, timestep, tuple(state["pred_original_sample"].shape[2:])))

    plain = drawn(pipe, "a fox", seed=5, output_type="latent").images
    watched = drawn(pipe, "a fox", seed=5, output_type="latent", callback_on_step_end=look).images
    assert torch.equal(plain, watched)
    cascade = pipe.cascade()
    shapes = [pipe.backbone.latent_shape(step.size)[1:] for step in cascade.steps]
    assert seen == [
        (i, float(s.timestep), shape) for i, (s, shape) in enumerate(zip(cascade.steps, shapes, strict=True))
    ]

    def blank(_pipe: CascadePipeline, index: int, _t: float, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {"latents": torch.zeros_like(state["latents"])} if index == cascade.num_steps - 1 else {}

    assert not drawn(pipe, "a fox", seed=5, output_type="latent", callback_on_step_end=blank).images.any()

    def double(_pipe: CascadePipeline, _i: int, _t: float, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {**state, "latents": state["latents"].double()}  # all that was given, as diffusers' callbacks return it

    doubled = drawn(pipe, "a fox", seed=5, output_type="latent", callback_on_step_end=double).images
    assert torch.equal(plain, doubled), "the state stays in its own dtype"


def test_a_callback_that_changes_the_prediction_is_refused_by_name(pipe: CascadePipeline) -> None:
    """It was ignored in silence; diffusers' pipelines read back whatever they give."""

    def returned(_pipe: CascadePipeline, _i: int, _t: float, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {"pred_original_sample": state["pred_original_sample"] * 0}

    def in_place(_pipe: CascadePipeline, _i: int, _t: float, state: dict[str, Tensor]) -> None:
        state["pred_original_sample"].zero_()

    def put(_pipe: CascadePipeline, _i: int, _t: float, state: dict[str, Any]) -> None:
        state["pred_original_sample"] = None if _i == 0 else "nothing"

    for change in (returned, in_place, put):
        with pytest.raises(ValueError, match=r"'pred_original_sample' is for looking at, and was changed.*'latents'"):
            pipe("a fox", seed=5, callback_on_step_end=change)

    def same(_pipe: CascadePipeline, _i: int, _t: float, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: value.clone() for name, value in state.items()}

    plain = drawn(pipe, "a fox", seed=5, output_type="latent").images
    assert torch.equal(plain, drawn(pipe, "a fox", seed=5, output_type="latent", callback_on_step_end=same).images)


def test_a_callback_changes_the_state_in_place_and_in_its_mapping_too(pipe: CascadePipeline) -> None:
    last = pipe.cascade().num_steps - 1

    def in_place(_pipe: CascadePipeline, index: int, _t: float, state: dict[str, Tensor]) -> None:
        if index == last:
            state["latents"].zero_()

    def put(_pipe: CascadePipeline, index: int, _t: float, state: dict[str, Tensor]) -> None:
        if index == last:
            state["latents"] = torch.zeros_like(state["latents"])

    for change in (in_place, put):
        assert not drawn(pipe, "a fox", seed=5, output_type="latent", callback_on_step_end=change).images.any()


def test_schedules_and_the_teacher(pipe: CascadePipeline) -> None:
    assert pipe.schedules == ("2+2", "0+4", "teacher")
    pictures = [np.asarray(drawn(pipe, "a fox", seed=5, schedule=name).images[0]) for name in pipe.schedules]
    assert all(not np.array_equal(a, b) for a, b in pairwise(pictures))
    steps: list[int] = []
    pipe("a fox", schedule="teacher", callback_on_step_end=lambda _p, index, _t, _s: steps.append(index))
    assert steps == [0, 1, 2]


def test_threads_that_load_at_once_draw_the_same(folder: Path, pipe: CascadePipeline) -> None:
    """The libraries' loaders change torch for the whole process, and a teacher is read at its first call."""
    expected = np.asarray(drawn(pipe, "a fox", seed=5, schedule="teacher").images[0])
    shared = CascadePipeline.from_pretrained(folder)

    def draw(number: int) -> Any:
        own = shared if number % 2 else CascadePipeline.from_pretrained(folder)
        return drawn(own, "a fox", seed=5, schedule="teacher").images[0]

    with ThreadPoolExecutor(6) as threads:
        pictures = list(threads.map(draw, range(6)))
    assert all(np.array_equal(np.asarray(picture), expected) for picture in pictures)


def test_threads_that_share_a_pipeline_draw_their_own_films(tmp_path: Path) -> None:
    """Wan's decoder keeps the frames before in the network itself."""
    films = CascadePipeline.from_pretrained(write_tiny_folder("wan-1.3b", tmp_path / "wan"), torch_dtype="float32")

    def draw(seed: int) -> Tensor:
        frames: Tensor = drawn(films, "a fox", seed=seed, output_type="pt").frames
        return frames

    expected = [draw(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(draw, range(6)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_films_come_as_frames(tmp_path: Path) -> None:
    films = CascadePipeline.from_pretrained(write_tiny_folder("embedded-video", tmp_path / "v"))
    size = films.cascade().full_size
    output = drawn(films, ["a", "b"], seed=1)
    assert output.images is None and [len(film) for film in output.frames] == [size.num_frames] * 2
    assert output.frames[0][0].size == (size.width, size.height)
    array = drawn(films, "a", seed=1, output_type="np").frames
    tensor = drawn(films, "a", seed=1, output_type="pt").frames
    assert array.shape == (1, size.num_frames, size.height, size.width, 3)
    assert np.array_equal(tensor.numpy().transpose(0, 1, 3, 4, 2), array)


def test_offloading_and_moving_change_no_picture(folder: Path, pipe: CascadePipeline) -> None:
    expected = np.asarray(drawn(pipe, "a fox", seed=5).images[0])
    other = CascadePipeline.from_pretrained(folder)
    other.enable_model_cpu_offload("cpu")
    assert np.array_equal(np.asarray(drawn(other, "a fox", seed=5).images[0]), expected)
    drawn(other, "a fox", seed=5, schedule="teacher")
    assert other.to("cpu").device == torch.device("cpu")
    with pytest.raises(TypeError, match="from_pretrained"):
        other.to(torch.float16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"prompt": " "}, ValueError, "the prompt is empty"),
        ({"prompt": []}, ValueError, "the prompt is empty"),
        ({"schedule": "9+9"}, ValueError, r"schedule '9\+9' is not in .*: 2\+2, 0\+4, teacher"),
        ({"seed": [1, 2]}, ValueError, "2 seeds or generators for 1 pictures"),
        ({"seed": -1}, ValueError, "seed -1 is no whole number from 0"),
        ({"seed": {3: 1}}, ValueError, "seed {3: 1} is no whole number from 0"),
        ({"seed": torch.tensor(5)}, ValueError, r"seed tensor\(5\) is no whole number from 0"),
        ({"callback_on_step_end": 5}, TypeError, "callback_on_step_end must be callable, not int"),
        ({"seed": 2**63}, ValueError, "is no whole number from 0"),
        ({"seed": [1.5]}, ValueError, "seed 1.5 is no whole number"),
        ({"seed": "12"}, ValueError, "seed '12' is no whole number"),
        ({"seed": True}, ValueError, "seed True is no whole number"),
        ({"batch_size": -1}, ValueError, "batch_size must be a whole number of at least 1, not -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, not 0"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be a whole number of at least 1"),
        ({"prompt": None}, TypeError, "prompt must be a text or a list of texts; it holds NoneType"),
        ({"prompt": [b"a fox"]}, TypeError, "it holds bytes"),
        ({"prompt": "a \ud800"}, ValueError, "not valid Unicode"),
        (
            {"negative_prompt": "rain"},
            TypeError,
            "the teacher is guided against the empty text",
        ),
        ({"num_videos_per_prompt": 2}, TypeError, "num_images_per_prompt counts films too"),
        ({"callback_on_step_end": lambda *_: torch.zeros(1)}, TypeError, "must return None or a mapping, not Tensor"),
        ({"callback_on_step_end": lambda *_: {"latents": [1]}}, TypeError, "'latents' must be a tensor, not list"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, ValueError, "must keep their shape"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1).int()}}, TypeError, "numbers, not torch.int32"),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": 1}}, ValueError, "alone, and returned 'prompt_embeds'"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
        ({"generator": 5}, TypeError, "generator must be a torch.Generator, or one a picture, not int"),
        ({"generator": [5]}, TypeError, "generator must be a torch.Generator, or one a picture, not int"),
        ({"latents": torch.zeros(1)}, TypeError, "takes no 'latents': the start is drawn from the seed"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, TypeError, "is given 'latents' and"),
        ({"output_type": "gif"}, ValueError, "is not pil, np, pt or latent"),
        ({"num_inference_steps": 4}, TypeError, "a cascade's steps are its schedule's"),
        ({"eta": 4}, TypeError, "takes no 'eta'"),
    ],
)
def test_bad_input(pipe: CascadePipeline, named: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(**{"prompt": "a fox", **named})


def test_what_is_refused_is_refused_before_any_step(pipe: CascadePipeline) -> None:
    with pytest.raises(ValueError, match="output_type 'PIL'"):
        pipe("a fox", output_type="PIL", callback_on_step_end=lambda *_: pytest.fail("a step was taken"))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_seeds_and_what_is_none_says_nothing(pipe: CascadePipeline) -> None:
    expected = drawn(pipe, ["a fox", "a ship"], seed=[3, 4], output_type="pt")
    given = drawn(pipe, ["a fox", "a ship"], seed=np.array([3, 4]), output_type="pt", negative_prompt=None)
    assert given.seeds == drawn(pipe, ["a fox"] * 2, seed=np.int64(3)).seeds == [3, 4]
    assert torch.equal(given.images, expected.images)
    assert drawn(pipe, "a fox", num_images_per_prompt=2, seed=2**63 - 1).seeds == [2**63 - 1, 0]  # as the server's


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'; use cpu or cuda"),
        ({"device": "meta"}, "device 'meta' holds no weights"),
        ({"backend": "inductor"}, "give engines=FOLDER too"),
        ({"buckets": [1]}, "give engines=FOLDER too"),
        ({"engines": "somewhere", "buckets": "1,2"}, "buckets must be batch sizes"),
        ({"engines": "somewhere", "buckets": [0]}, "buckets must be a whole number of at least 1"),
    ],
)
def test_where_it_cannot_run(folder: Path, named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CascadePipeline.from_pretrained(folder, **named)


def test_moving_ends_offloading(folder: Path) -> None:
    pipe = CascadePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="holds no weights"):
        pipe.to("meta")
    expected = drawn(pipe, "a fox", seed=5, output_type="pt").images
    pipe.enable_model_cpu_offload("cpu")
    drawn(pipe, "a fox", seed=5, schedule="teacher")
    pipe.enable_model_cpu_offload("cpu")
    assert torch.equal(drawn(pipe.to("cpu"), "a fox", seed=5, output_type="pt").images, expected)
    assert pipe._teacher is not None
    for backbone in (pipe.backbone, pipe._teacher):
        assert not any(hasattr(module, "_hf_hook") for module in backbone.component_modules().values())


def test_importing_it_pulls_in_no_server_and_no_compiler() -> None:
    code = (
        "import sys; from rmd import CascadePipeline; "
        "print(sorted({name.split('.')[0] for name in sys.modules} "
        "& {'fastapi', 'uvicorn', 'server', 'engines', 'training', 'torch_tensorrt', 'zmq'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_engines_are_found_by_their_entry_point(folder: Path, tmp_path: Path) -> None:
    from engines.errors import EngineError

    with pytest.raises(EngineError, match="rmd build"):
        CascadePipeline.from_pretrained(folder, engines=tmp_path, backend="inductor")


def test_the_pages_example_runs(tmp_path: Path) -> None:
    """As it is printed, in one interpreter, on the model in the box."""
    root = Path(rmd.__file__).parent.parent
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "python.md").read_text(), re.DOTALL)
    (tmp_path / "models").symlink_to(root / "models")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[7, 8, 9, 10]" in done.stdout and "('2+2'," in done.stdout and "256x256 at" in done.stdout
    with Image.open(tmp_path / "apple.png") as apple:
        red, green, _ = np.asarray(apple.convert("RGB"))[100:200, 80:180].reshape(-1, 3).mean(0)
        assert apple.size == (256, 256) and red > 2 * green
