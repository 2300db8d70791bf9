"""The device's work at each station: encode prompts, one denoising step, decode.

Every function computes all its results before it changes any ticket, so that a batch that raises leaves its tickets
as they were and each can be tried again alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from rmd.backbones.base import Backbone, Conditioning
from rmd.backbones.family import DiffusersBackbone
from rmd.cascade import Step
from rmd.pixels import Pixels, to_pixels
from rmd.sampler import (
    advance_batch,
    initial_noise,
    needs_noise,
    next_size,
    next_time,
    noise_intensity,
    step_noise,
)
from rmd.size import Size
from server.core.stations import StationKey
from server.core.tickets import Picture, Request, Ticket
from server.core.work import PictureState
from server.device.model import DeviceModel
from server.device.prompts import EncodedText, PromptCache

T = TypeVar("T")


class NonFiniteError(RuntimeError):
    """A network returned NaN or infinity."""


@dataclass(frozen=True)
class Done:
    """What a batch gave.

    Attributes:
        rows: that the network ran on; 0 where there was nothing to do.
        shown: for pictures whose step's result is to be shown: x0 (1, C, [T], h, w).
        pixels: of a decoding, one entry a ticket.
    """

    rows: int
    shown: dict[Picture, Tensor] = field(default_factory=dict)
    pixels: Sequence[Pixels] = ()


class StageRunner:
    """Runs batches on the device, or the track of it, that the calling thread owns.

    Args:
        model: the networks.
        prompt_bytes: encoded texts that are kept.
    """

    def __init__(self, model: DeviceModel, prompt_bytes: int = 64 << 20) -> None:
        self._model = model
        self._texts = PromptCache(prompt_bytes)
        self._encoding = threading.Lock()  # tokenizers do not bear two tracks at once

    @torch.inference_mode()
    def run(self, key: StationKey, tickets: Sequence[Ticket]) -> Done:
        """Do one batch's work. Raises whatever the network raises, before any ticket is changed."""
        if key.kind == "encode":
            with self._encoding:
                return Done(self._encode([ticket for ticket in tickets if isinstance(ticket, Picture)]))
        if key.kind == "decode":
            assert key.size is not None
            return Done(len(tickets), pixels=self._decode(key.size, tickets))
        pictures = [ticket for ticket in tickets if isinstance(ticket, Picture)]
        shown = self._denoise(key, pictures)
        return Done(sum(2 if picture.request.guided else 1 for picture in pictures), shown)

    def recall(self, request: Request) -> bool:
        """Give a request its encoded texts where they are kept; False where they have to be computed."""
        work = request.work
        text = self._texts.get(work.prompt)
        against = self._texts.get(work.negative_prompt, negative=True) if request.guided else None
        if text is None or (request.guided and against is None):
            return False
        request.conditioning, request.text_tokens, request.cut_tokens = text.conditioning, text.tokens, text.cut
        request.unconditional = None if against is None else against.conditioning
        return True

    def _encode(self, pictures: Sequence[Picture]) -> int:
        """Encode the texts of the pictures' requests, each distinct one once; negative prompts in the same batch.

        Returns:
            How many texts the network was run on: none where all were kept.
        """
        requests = list({id(picture.request): picture.request for picture in pictures}.values())
        waiting = [request for request in requests if not self.recall(request)]
        # What is kept is taken out first: a small cache may let it go for what is computed now.
        kept = {r.work.prompt: self._texts.get(r.work.prompt) for r in waiting}
        kept_against = {r.work.negative_prompt: self._texts.get(r.work.negative_prompt, True) for r in waiting}
        prompts = {text for text, known in kept.items() if known is None}
        against = {r.work.negative_prompt for r in waiting if r.guided}
        against = {text for text in against if kept_against[text] is None}
        texts = sorted(prompts | (against - {""}))
        backbone = self._model.backbone
        rows = _split(backbone.encode_prompts(texts), len(texts)) if texts else []
        for text, row in zip(texts, rows, strict=True):
            check_finite(row.values(), f"the text encoder's output for a prompt of {len(text)} characters")
        counts = _token_counts(backbone, texts)
        known = [EncodedText(row, *heard_and_cut) for row, heard_and_cut in zip(rows, counts, strict=True)]
        encoded = dict(zip(texts, known, strict=True))
        empty = EncodedText(backbone.encode_unconditional(1), 0, 0) if "" in against else None
        if empty is not None:
            check_finite(empty.conditioning.values(), "the text encoder's output for the empty prompt")
        for text in prompts:
            self._texts.put(text, encoded[text])
        for text in against:
            self._texts.put(text, encoded[text] if text else _required(empty), negative=True)
        for request in waiting:
            work = request.work
            own = _required(kept[work.prompt] or encoded.get(work.prompt))
            if request.guided:
                other = kept_against[work.negative_prompt] or encoded.get(work.negative_prompt)
                request.unconditional = _required(other if work.negative_prompt else other or empty).conditioning
            request.conditioning, request.text_tokens, request.cut_tokens = own.conditioning, own.tokens, own.cut
        return len(texts) + (empty is not None)

    def _denoise(self, key: StationKey, pictures: Sequence[Picture]) -> dict[Picture, Tensor]:
        """Do one step for pictures that stand at the same size, whatever their step, seed, guidance or schedule."""
        assert key.size is not None
        backbone = self._model.lanes[key.lane]
        latents = torch.cat([_latents(backbone, picture) for picture in pictures])
        x0 = _predict(backbone, key.size, pictures, latents)
        advanced = _advance(backbone, pictures, latents, x0)
        check_finite([x0], f"the denoiser's output at {key.size}")  # at last: a GPU is waited for here
        for picture, state in zip(pictures, advanced, strict=True):
            picture.data = state
        return {picture: x0[i : i + 1] for i, picture in enumerate(pictures) if picture.preview_due}

    def _decode(self, size: Size, tickets: Sequence[Ticket]) -> list[Pixels]:
        """Decode latents at one size; pictures come back as ([T], H, W, 3) uint8."""
        latents = torch.cat([ticket.data for ticket in tickets])
        decoded = self._model.backbone.decode(latents, size)
        check_finite([decoded], f"the decoder's output at {size}")
        return to_pixels(decoded)


def dump_latents(latents: Tensor) -> tuple[tuple[int, ...], bytes]:
    """Return the shape and the bytes of a picture's state, or of a step's x0: float32, as the sampler has them."""
    return tuple(latents.shape), latents.to("cpu", torch.float32).contiguous().numpy().tobytes()


def load_latents(state: PictureState, device: torch.device) -> Tensor:
    """Return what :func:`dump_latents` was given on another engine.

    Raises:
        ValueError: they are not of their shape.
    """
    if 4 * math.prod(state.shape) != len(state.latents):
        raise ValueError(f"latents of {len(state.latents)} bytes were handed over, said to be float32 of {state.shape}")
    return torch.frombuffer(bytearray(state.latents), dtype=torch.float32).view(state.shape).to(device)


def _token_counts(backbone: Backbone, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return each text's tokens: those that are heard, and those cut off."""
    if not isinstance(backbone, DiffusersBackbone) or not backbone.tokenizers or not texts:
        return [(0, 0)] * len(texts)
    return backbone.token_counts(texts)


def _latents(backbone: Backbone, picture: Picture) -> Tensor:
    """The item's state; before its first step, noise from its own seed and nothing else."""
    if picture.data is not None:
        latents: Tensor = picture.data
        return latents
    cascade = picture.request.cascade
    shape = backbone.latent_shape(cascade.steps[0].size)
    return initial_noise(shape, [picture.seed], backbone.device, torch.float32) * cascade.initial_noise_scale


def _predict(backbone: Backbone, size: Size, pictures: Sequence[Picture], latents: Tensor) -> Tensor:
    """Predict x0 (B, C, H, W) in one network call; guided pictures ride with a second, unconditional row.

    Guidance is applied to the network's output, ``u + s (c - u)``, as :meth:`Backbone.guided_x0` does.
    """
    guided = [i for i, picture in enumerate(pictures) if picture.request.guided]
    times = _numbers([_step(picture).t for picture in pictures], latents)
    conditions = [_required(picture.request.conditioning) for picture in pictures]
    conditions += [_required(pictures[i].request.unconditional) for i in guided]
    conditioning = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
    rows = torch.cat([latents, latents[guided]]) if guided else latents
    row_times = torch.cat([times, times[guided]]) if guided else times
    output = backbone.predict_output(rows, row_times, conditioning, size)
    given = output[: len(pictures)]
    if guided:
        scales = _numbers([pictures[i].request.cascade.guidance_scale for i in guided], output).float()
        scales = scales.view(-1, *[1] * (output.ndim - 1))
        without = output[len(pictures) :]
        given = given.clone()
        given[guided] = without + scales * (given[guided] - without)
    return backbone.x0_from_output(latents, given, times)


def _advance(backbone: Backbone, pictures: Sequence[Picture], latents: Tensor, x0: Tensor) -> list[Tensor]:
    """Take every picture to its next time and size through the sampler's own step function.

    Those that go to the same size share a call, each with its own times and noise intensity; one after its last
    step keeps its x0 prediction, unless its cascade ends at a time of its own.
    """
    results: list[Tensor] = list(torch.split(x0.float(), 1))
    groups: dict[tuple[Size, str, str, bool], list[int]] = {}
    for i, picture in enumerate(pictures):
        cascade, step = picture.request.cascade, picture.step
        if next_time(cascade, step) is not None:
            ways = cascade.noise_upsampling, cascade.x0_upsampling
            groups.setdefault((next_size(cascade, step), *ways, needs_noise(cascade, step)), []).append(i)
    for (size, noise_upsampling, x0_upsampling, noisy), members in groups.items():
        cascades = [pictures[i].request.cascade for i in members]
        steps = [pictures[i].step for i in members]
        pairs = list(zip(cascades, steps, strict=True))
        shape = backbone.latent_shape(size)
        seeds = [pictures[i].seed for i in members]
        state = advance_batch(
            backbone.schedule,
            latents[members],
            x0[members],
            _numbers([cascade.steps[k].t for cascade, k in pairs], latents),
            _numbers([next_time(cascade, k) or 0.0 for cascade, k in pairs], latents),
            target_shape=shape,
            intensity=_numbers([noise_intensity(cascade, k) for cascade, k in pairs], latents) if noisy else 1.0,
            noise=step_noise(shape, seeds, steps, backbone.device) if noisy else None,
            noise_upsampling=noise_upsampling,
            x0_upsampling=x0_upsampling,
        )
        for i, row in zip(members, torch.split(state, 1), strict=True):
            results[i] = row
    return results


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """A step's constants. To a GPU they are queued: a plain copy would wait for the network, then it for the host."""
    numbers = torch.tensor(values, dtype=torch.float64, pin_memory=like.is_cuda)
    return numbers.to(like.device, non_blocking=True)


def _step(picture: Picture) -> Step:
    return picture.request.cascade.steps[picture.step]


def _required(value: T | None) -> T:
    if value is None:
        raise RuntimeError("a picture reached the denoiser before its prompt was encoded")
    return value


def _split(conditioning: Conditioning, rows: int) -> list[Conditioning]:
    """Cut a batch of conditions into rows that own their memory, so that one row does not keep its batch alive."""
    return [{name: value[i : i + 1].clone() for name, value in conditioning.items()} for i in range(rows)]


def check_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raise where a network has returned something that no later step can mend.

    Args:
        tensors: what it returned; integers are looked over.
        what: to call it.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    # A sum is not finite where a term is not, and is much quicker than asking each (in float64 it is not).
    if not all(math.isfinite(value.sum(dtype=torch.float32)) for value in tensors if value.is_floating_point()):
        raise NonFiniteError(f"{what} holds NaN or infinity")
