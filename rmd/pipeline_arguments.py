"""What a pipeline's call may be given: each argument read, or refused by its name."""

from __future__ import annotations

import numbers
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rmd.fields import LARGEST_SEED

_ELSEWHERE = {
    "num_inference_steps": "a cascade's steps are its schedule's: schedule=...",
    "guidance_scale": "it is part of the schedule: schedule='teacher' is guided, a student needs none",
    "height": "the sizes are the schedule's: schedule=...",
    "width": "the sizes are the schedule's: schedule=...",
    "negative_prompt": "a student is not guided, and the teacher is guided against the empty text",
    "num_videos_per_prompt": "num_images_per_prompt counts films too",
    "latents": "the start is drawn from the seed; a callback_on_step_end may change what follows",
    "callback_on_step_end_tensor_inputs": "a callback is given 'latents' and 'pred_original_sample'",
}


def refuse_others(who: str, others: Mapping[str, Any]) -> None:
    """Refuse arguments that a cascade does not have; those left at None say nothing.

    Raises:
        TypeError: it names the first, and where it went.
    """
    for name in (name for name, value in others.items() if value is not None):
        hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise TypeError(f"{who} takes no {name!r}{hint}")


def texts_of(prompt: str | Sequence[str]) -> list[str]:
    """The prompts.

    Raises:
        TypeError: one is no text.
        ValueError: one is empty, or no Unicode; or there is none.
    """
    prompts = [prompt] if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence) else list(prompt)
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"prompt must be a text or a list of texts; it holds {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {text[:40]!r} is not valid Unicode") from None
    if not prompts or any(not text.strip() for text in prompts):
        raise ValueError("the prompt is empty")
    return prompts


def count_of(name: str, value: Any) -> int:
    """A number of pictures.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)


def latents_of(answer: Any, shown: Mapping[str, Any], latents: Tensor, prediction: Tensor) -> Tensor | None:
    """What a callback wants to go on with, if anything, where and in the dtype in which the state is.

    Args:
        answer: what it returned; where that is None, what it made of ``shown`` counts.
        shown: the mapping that it was given.
        latents: the state that was in it.
        prediction: the step's prediction, of which it was given a copy: the state is made of it already.

    Raises:
        TypeError: its answer is no mapping, or its latents are no tensor of floating-point numbers.
        ValueError: they are of another shape, or something else is to be changed.
    """
    copy = shown.get("pred_original_sample")
    answer = shown if answer is None else answer
    if not isinstance(answer, Mapping):
        raise TypeError(f"callback_on_step_end must return None or a mapping, not {type(answer).__name__}")
    for name in answer:
        if name not in ("latents", "pred_original_sample"):  # the second may come back with all that was given
            raise ValueError(f"callback_on_step_end may change 'latents' alone, and returned {name!r}")
    for own in (copy, answer.get("pred_original_sample")):
        if own is not None and not _same(own, prediction):
            raise ValueError(
                "callback_on_step_end: 'pred_original_sample' is for looking at, and was changed; the state that "
                "follows is made of it already: change 'latents'"
            )
    other = answer.get("latents")
    if other is None:
        return None
    if not isinstance(other, Tensor):
        raise TypeError(f"callback_on_step_end: 'latents' must be a tensor, not {type(other).__name__}")
    if not other.is_floating_point():
        raise TypeError(f"callback_on_step_end: 'latents' must be floating-point numbers, not {other.dtype}")
    if other.shape != latents.shape:
        raise ValueError(f"callback_on_step_end: 'latents' must keep their shape {tuple(latents.shape)}")
    return other.to(latents)


def _same(value: Any, expected: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return False
    return torch.allclose(value.to(expected), expected, rtol=0, atol=0, equal_nan=True)


def seeds_of(
    count: int, seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[int]:
    """One a picture.

    Raises:
        TypeError: a generator that is none.
        ValueError: seeds and generators both, one that is no seed, or another number of them.
    """
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if isinstance(generator, torch.Generator):
        return [_draw_seed(generator) for _ in range(count)]
    if generator is not None:
        many: list[Any] = list(generator) if isinstance(generator, Iterable) else [generator]
        for one in many:
            if not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, or one a picture, not {type(one).__name__}")
        seed = [_draw_seed(one) for one in many]
    if seed is None:
        seed = secrets.randbelow(2**32)
    # Arrays and tensors of no dimension are iterable by name alone.
    several = isinstance(seed, Iterable) and not isinstance(seed, str | bytes | Mapping)
    several = several and getattr(seed, "ndim", None) != 0
    given: list[Any] = list(seed) if several else [seed]  # type: ignore[arg-type]
    for one in given:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral) or not 0 <= int(one) <= LARGEST_SEED:
            raise ValueError(f"seed {one!r} is no whole number from 0 to {LARGEST_SEED}")
    seeds = [int(one) for one in given]
    if not several:  # counted on as the server does
        seeds = [(seeds[0] + number) % (LARGEST_SEED + 1) for number in range(count)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds or generators for {count} pictures: give one a picture, or one in all")
    return seeds


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**32, (1,), generator=generator, device=generator.device))
