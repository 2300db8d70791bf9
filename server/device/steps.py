"""The device's work at each station: encode prompts, one denoising step, decode.

Every function computes all its results before it changes any entry, so that a batch that raises leaves its entries
as they were and each can be tried again alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rmd.backbones.base import Backbone, Conditioning
from rmd.backbones.family import DiffusersBackbone
from rmd.cascade import Step
from rmd.sampler import advance_batch, initial_noise, needs_noise, noise_intensity, step_noise
from rmd.size import Size
from server.core.latency import StationKey
from server.core.request import Item, Preview, partial_steps
from server.device.model import ServedModel
from server.front.media import Pixels, to_pixels

_KEPT_UNCONDITIONALS = 16


class NonFiniteError(RuntimeError):
    """A network returned NaN or infinity."""


class StageRunner:
    """Runs batches on the device that the calling thread owns."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._unconditionals: OrderedDict[str, Conditioning] = OrderedDict()

    def encode(self, items: Sequence[Item]) -> int:
        """Encode the prompts of the items' generations, each distinct text once.

        Negative prompts are encoded in the same batch; the most recent ones are kept, since nearly all are empty.

        Returns:
            How many texts the network was run on: none where a generation's first items brought them all.
        """
        generations = list({id(item.generation): item.generation for item in items}.values())
        waiting = [generation for generation in generations if generation.conditioning is None]
        prompts = {generation.spec.prompt for generation in waiting}
        negatives = {g.spec.negative_prompt for g in waiting if g.spec.guided} - self._unconditionals.keys()
        empty_is_special = "" in negatives
        texts = sorted(prompts | (negatives - {""}))
        rows = _split(self._model.backbone.encode_prompts(texts), len(texts)) if texts else []
        encoded = dict(zip(texts, rows, strict=True))
        for text, row in encoded.items():
            _check_finite(row.values(), f"the text encoder's output for a prompt of {len(text)} characters")
        fresh = {text: encoded[text] for text in negatives if text}
        if empty_is_special:
            fresh[""] = self._model.backbone.encode_unconditional(1)
        self._unconditionals.update(fresh)
        counts = text_tokens(self._model.backbone, texts)
        for generation in waiting:
            generation.text_tokens = counts.get(generation.spec.prompt, 0)
            if generation.spec.guided:
                generation.unconditional = self._unconditionals[generation.spec.negative_prompt]
                self._unconditionals.move_to_end(generation.spec.negative_prompt)
            generation.conditioning = encoded[generation.spec.prompt]
        while len(self._unconditionals) > _KEPT_UNCONDITIONALS:
            self._unconditionals.popitem(last=False)
        return len(texts) + empty_is_special

    def denoise(self, key: StationKey, items: Sequence[Item]) -> list[Preview]:
        """Do one step for items that stand at the same size, whatever their step, seed, guidance or schedule.

        Returns:
            The partial pictures that are due after this step.
        """
        assert key.size is not None
        backbone = self._model.lanes[key.lane]
        latents = torch.cat([_latents(backbone, item) for item in items])
        x0 = _predict(backbone, key.size, items, latents)
        advanced = _advance(backbone, items, latents, x0)
        previews = [_preview(item, row) for item, row in zip(items, torch.split(x0, 1), strict=True)]
        for item, state in zip(items, advanced, strict=True):
            item.latents = state
            item.step += 1
        return [preview for preview in previews if preview is not None]

    def decode(self, size: Size, entries: Sequence[Item | Preview]) -> list[Pixels]:
        """Decode latents at one size; pictures come back as (H, W, 3) uint8."""
        latents = torch.cat([entry.latents for entry in entries if entry.latents is not None])
        decoded = self._model.backbone.decode(latents, size)
        _check_finite([decoded], f"the decoder's output at {size}")
        return to_pixels(decoded)


def text_tokens(backbone: Backbone, prompts: Sequence[str]) -> dict[str, int]:
    """Return the number of tokens of each prompt, as the backbone's first tokenizer cuts it, padding left out."""
    if not isinstance(backbone, DiffusersBackbone) or not backbone.tokenizers or not prompts:
        return {}
    mask = backbone.tokenize(next(iter(backbone.tokenizers)), prompts)["attention_mask"]
    return dict(zip(prompts, mask.sum(dim=1).tolist(), strict=True))


def _latents(backbone: Backbone, item: Item) -> Tensor:
    """The item's state; before its first step, noise from its own seed and nothing else."""
    if item.latents is not None:
        return item.latents
    shape = backbone.latent_shape(item.generation.spec.cascade.steps[0].size)
    return initial_noise(shape, [item.seed], backbone.device, torch.float32)


def _predict(backbone: Backbone, size: Size, items: Sequence[Item], latents: Tensor) -> Tensor:
    """Predict x0 (B, C, H, W) in one network call; guided items ride with a second, unconditional row.

    Guidance is applied to the network's output, ``u + s (c - u)``, as :meth:`Backbone.guided_x0` does.
    """
    guided = [i for i, item in enumerate(items) if item.rows == 2]
    times = _numbers([_step(item).t for item in items], latents)
    conditions = [_required(item.generation.conditioning) for item in items]
    conditions += [_required(items[i].generation.unconditional) for i in guided]
    conditioning = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
    rows = torch.cat([latents, latents[guided]]) if guided else latents
    row_times = torch.cat([times, times[guided]]) if guided else times
    output = backbone.predict_output(rows, row_times, conditioning, size)
    given = output[: len(items)]
    if guided:
        scales = torch.tensor([items[i].generation.spec.cascade.guidance_scale for i in guided], device=output.device)
        scales = scales.view(-1, *[1] * (output.ndim - 1))
        without = output[len(items) :]
        given = given.clone()
        given[guided] = without + scales * (given[guided] - without)
    return backbone.x0_from_output(latents, given, times)


def _advance(backbone: Backbone, items: Sequence[Item], latents: Tensor, x0: Tensor) -> list[Tensor]:
    """Take every item to its next time and size through the sampler's own step function.

    Items that go to the same size share a call, each with its own times and noise intensity; an item after its last
    step keeps its x0 prediction.
    """
    results: list[Tensor] = list(torch.split(x0.float(), 1))
    groups: dict[tuple[Size, str, bool], list[int]] = {}
    for i, item in enumerate(items):
        cascade, step = item.generation.spec.cascade, item.step
        if step + 1 < cascade.num_steps:
            key = (cascade.steps[step + 1].size, cascade.noise_upsampling, needs_noise(cascade, step))
            groups.setdefault(key, []).append(i)
    for (size, noise_upsampling, noisy), members in groups.items():
        cascades = [items[i].generation.spec.cascade for i in members]
        steps = [items[i].step for i in members]
        pairs = list(zip(cascades, steps, strict=True))
        shape = backbone.latent_shape(size)
        seeds = [items[i].seed for i in members]
        state = advance_batch(
            backbone.schedule,
            latents[members],
            x0[members],
            _numbers([cascade.steps[k].t for cascade, k in pairs], latents),
            _numbers([cascade.steps[k + 1].t for cascade, k in pairs], latents),
            target_shape=shape,
            intensity=_numbers([noise_intensity(cascade, k) for cascade, k in pairs], latents) if noisy else 1.0,
            noise=step_noise(shape, seeds, steps, backbone.device) if noisy else None,
            noise_upsampling=noise_upsampling,
        )
        for i, row in zip(members, torch.split(state, 1), strict=True):
            results[i] = row
    return results


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _preview(item: Item, x0: Tensor) -> Preview | None:
    spec = item.generation.spec
    due = partial_steps(spec.cascade, spec.partial_images)
    if item.step not in due:
        return None
    return Preview(item, x0, spec.cascade.steps[item.step].size, due.index(item.step))


def _step(item: Item) -> Step:
    return item.generation.spec.cascade.steps[item.step]


def _required(conditioning: Conditioning | None) -> Conditioning:
    if conditioning is None:
        raise RuntimeError("an item reached the denoiser before its prompt was encoded")
    return conditioning


def _split(conditioning: Conditioning, rows: int) -> list[Conditioning]:
    """Cut a batch of conditions into rows that own their memory, so that one row does not keep its batch alive."""
    return [{name: value[i : i + 1].clone() for name, value in conditioning.items()} for i in range(rows)]


def _check_finite(tensors: Iterable[Tensor], what: str) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in tensors if value.is_floating_point()):
        raise NonFiniteError(f"{what} holds NaN or infinity")
