"""One network's published weights, held against the network that a base describes: complete, and nothing over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rmd.backbones.guidance_fold import TOUCHED, fold_guidance
from rmd.backbones.random_weights import build_random, resolve
from rmd.dtypes import dtype_name
from rmd.published.files import SCALED, ImportRefused, WeightFiles
from rmd.published.naming import TEXT_WRAPPER
from rmd.published.originals import DENOISER_PREFIX, Traced, converter_of, trace

_SHOWN = 8
_VELOCITY_MARKS = ("v_pred", "ztsnr")
# Tables of schedules and positions that old files carry along; they are no weights, and are made anew.
_TABLES = re.compile(
    r"^(betas|(sqrt_|log_)?(one_minus_)?(recip(m1)?_)?alphas_cumprod(_prev)?|posterior_\w+|denoiser\.sigmas"
    r"|model_sampling\.\w+)$|(^|\.)(position_ids|logit_scale)$"
)
_COMMON_PREFIXES = (DENOISER_PREFIX, "diffusion_model.", "unet.", "transformer.")


@dataclass(frozen=True)
class Expected:
    """The parameters of a network by its configuration.

    Attributes:
        kind: its class's name.
        shapes: of every parameter and stored buffer.
        ties: name -> other names of the same parameter.
        floating: names of those that hold floating-point numbers.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, frozenset[str]]
    floating: frozenset[str] = frozenset()

    @classmethod
    def of(cls, target: str, config: Mapping[str, Any]) -> Expected:
        """Of class ``target`` (``module:Class``), built without values."""
        network = build_random(target, config, torch.float32, torch.device("meta"))
        state = network.state_dict(keep_vars=True)
        by_id: dict[int, set[str]] = {}
        for name, value in state.items():
            by_id.setdefault(id(value), set()).add(name)
        return cls(
            kind=target.split(":")[1],
            shapes={name: tuple(value.shape) for name, value in state.items()},
            ties={name: frozenset(by_id[id(value)] - {name}) for name, value in state.items()},
            floating=frozenset(name for name, value in state.items() if value.is_floating_point()),
        )


@dataclass(frozen=True)
class Network(Mapping[str, Tensor]):
    """A network's tensors under its own names, each read when asked for.

    Attributes:
        files: where they come from.
        shapes, dtypes: by name.
        left_out: keys of the files that have no place in the network.
    """

    files: WeightFiles
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    left_out: tuple[str, ...]
    _renamed: Mapping[str, str] = field(default_factory=dict)
    _converted: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self._converted[name] if name in self._converted else self.files[self._renamed[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def with_guidance_folded(network: Network, config: Mapping[str, Any], guidance_scale: float) -> Network:
    """A UNet that takes its guidance as an input, at one guidance: see :mod:`rmd.backbones.guidance_fold`.

    Raises:
        BackboneError: it takes none.
    """
    kept, _ = fold_guidance({name: network[name] for name in TOUCHED if name in network.shapes}, config, guidance_scale)
    left = [name for name in network.shapes if name in kept or name not in TOUCHED]
    return replace(
        network,
        shapes={name: network.shapes[name] for name in left},
        dtypes={name: network.dtypes[name] for name in left},
        _converted={**network._converted, **kept},
    )


def read_network(
    files: WeightFiles,
    expected: Expected,
    target: str,
    config: Mapping[str, Any],
    *,
    prefix: str = "",
    allow_unmatched: bool = False,
) -> Network:
    """A network's tensors out of its files, under diffusers' or the original names.

    Args:
        files: the whole file or files.
        expected: what the network must have.
        target, config: its class and configuration.
        prefix: of its keys in an all-in-one file; the other keys are not this network's then.
        allow_unmatched: keys without a place go into ``left_out`` instead of being an error.

    Raises:
        ImportRefused: weights are missing, over, of another shape, or two values of one; fp8 with scales; a velocity
            network.
    """
    refuse_scaled(files)
    keys = [key for key in files if key.startswith(prefix)]
    plain = _plain_names(keys, prefix)
    tables = [key for key in keys if _TABLES.search(plain[key])]
    keys = [key for key in keys if key not in set(tables)]
    direct = {plain[key]: key for key in keys if plain[key] in expected.shapes}
    if 2 * len(direct) >= len(expected.shapes):
        over = [key for key in keys if plain[key] not in expected.shapes]
        shapes = {name: files.entries[key].shape for name, key in direct.items()}
        left = _checked(files, expected, shapes, direct, over, allow_unmatched)
        _check_ties(files, expected, direct)
        dtypes = {name: files.entries[key].dtype for name, key in direct.items()}
        return Network(files, shapes, dtypes, (*left, *tables), _renamed=direct)
    return _convert(files, expected, target, config, plain, keys, tables, prefix, allow_unmatched)


def check_text_encoder(
    files: WeightFiles, expected: Expected, target: str, *, allow_unmatched: bool = False
) -> tuple[str, ...]:
    """Hold a text encoder's own files against its class, whose loader only warns of what is missing or over.

    Returns:
        keys without a place: tables, what the class says that it leaves out, and with ``allow_unmatched`` others.

    Raises:
        ImportRefused: as :func:`read_network`.
    """
    refuse_scaled(files)
    ignored = [re.compile(rule) for rule in getattr(resolve(target), "_keys_to_ignore_on_load_unexpected", None) or ()]
    origin: dict[str, str] = {}
    over: list[str] = []
    tables: list[str] = []
    for key in files:
        plain = key.removeprefix(TEXT_WRAPPER)
        name = next((name for name in (key, plain, TEXT_WRAPPER + plain) if name in expected.shapes), None)
        if name is None:
            (tables if is_table(key) or any(rule.search(key) for rule in ignored) else over).append(key)
        elif name in origin:
            raise ImportRefused(f"{files.path}: {origin[name]!r} and {key!r} name the same weights; keep one")
        else:
            origin[name] = key
    shapes = {name: files.entries[key].shape for name, key in origin.items()}
    left = _checked(files, expected, shapes, origin, over, allow_unmatched)
    _check_ties(files, expected, origin)
    return (*left, *tables)


def _convert(
    files: WeightFiles,
    expected: Expected,
    target: str,
    config: Mapping[str, Any],
    plain: Mapping[str, str],
    keys: Sequence[str],
    tables: Sequence[str],
    prefix: str,
    allow_unmatched: bool,
) -> Network:
    convert = converter_of(target, config, prefix or DENOISER_PREFIX)
    # The converters know all-in-one files, whose networks have a prefix.
    given = {(key if prefix else DENOISER_PREFIX + plain[key]): key for key in keys}
    traced = trace(convert, {name: files.entries[key].shape for name, key in given.items()}) if convert else None
    known = sum(name in expected.shapes for name in traced.shapes) if traced else 0
    if convert is None or traced is None or 2 * known < len(expected.shapes):
        raise ImportRefused(
            f"{files.path} fits no {expected.kind} as this base has: of its {len(keys)} keys, such as {_some(keys)}, "
            f"{known} have a place among {len(expected.shapes)} weights"
        )
    kept = {name: shape for name, shape in traced.shapes.items() if name in expected.shapes}
    over = _without_place(traced, kept, given)
    origin = {name: given[min(traced.sources[name], default=next(iter(given)))] for name in kept}
    left = _checked(files, expected, kept, origin, over, allow_unmatched)
    made = convert({name: files[key] for name, key in given.items()})
    converted = {name: made[name] for name in kept}
    dtypes = {name: tensor.dtype for name, tensor in converted.items()}
    return Network(files, kept, dtypes, (*left, *tables), _converted=converted)


def _without_place(traced: Traced, kept: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    """Keys that the converter dropped, and those of which it made something that the network does not have."""
    used = frozenset[str]().union(*(traced.sources[name] for name in kept))
    return [key for name, key in given.items() if name not in used]


def _plain_names(keys: Sequence[str], prefix: str) -> dict[str, str]:
    """Key -> name, without what all keys have in front."""
    if prefix:
        return {key: key.removeprefix(prefix) for key in keys}
    for common in _COMMON_PREFIXES:
        if keys and all(key.startswith(common) for key in keys):
            return {key: key.removeprefix(common) for key in keys}
    return {key: key for key in keys}


def _checked(
    files: WeightFiles,
    expected: Expected,
    shapes: Mapping[str, tuple[int, ...]],
    origin: Mapping[str, str],
    over: Sequence[str],
    allow_unmatched: bool,
) -> tuple[str, ...]:
    """The keys left out; refuses what does not make the whole network."""
    misfits = [
        f"{origin[name]} {list(shape)} for {list(expected.shapes[name])}"
        for name, shape in shapes.items()
        if shape != expected.shapes[name]
    ]
    if misfits:
        raise ImportRefused(
            f"{files.path} fits another {expected.kind} than this base has: {len(misfits)} weights have other shapes, "
            f"such as {_some(misfits)}"
        )
    for name, key in origin.items():
        if name in expected.floating and not files.entries[key].dtype.is_floating_point:
            raise ImportRefused(
                f"{files.path} holds {key!r} in {dtype_name(files.entries[key].dtype)}: it is quantised, which is not "
                f"supported; give the model's bfloat16 or float16 release"
            )
    missing = [name for name in expected.shapes if name not in shapes and not expected.ties[name] & shapes.keys()]
    if missing:
        raise ImportRefused(f"{files.path} lacks {len(missing)} weights of {expected.kind}: {_some(missing)}")
    if over and not allow_unmatched:
        raise ImportRefused(
            f"{files.path} holds {len(over)} keys that {expected.kind} has no place for: {_some(over)}; leaving them "
            f"out (--allow-unmatched) makes another model than was published"
        )
    return tuple(over)


def _check_ties(files: WeightFiles, expected: Expected, origin: Mapping[str, str]) -> None:
    """Refuse two names of one weight with two values: a loader takes either, and says nothing."""
    for name, key in origin.items():
        for other in sorted(expected.ties[name] & origin.keys()):
            if name < other and not files.same(key, origin[other]):
                raise ImportRefused(
                    f"{files.path}: {key!r} and {origin[other]!r} are one weight of {expected.kind} and hold different "
                    f"values; fetch the file again, or remove the one that was not trained"
                )


def refuse_scaled(files: WeightFiles) -> None:
    """Refuse quantised weights whose values need scales, and networks that say that they predict velocity.

    Raises:
        ImportRefused: it does; the message names a key.
    """
    for key in files:
        if SCALED.search(key):
            raise ImportRefused(
                f"{files.path} is an fp8 file with scales (it holds {key!r}), which is not supported: read without "
                f"them it would draw noise; give the model's bfloat16 or float16 release"
            )
        if key in _VELOCITY_MARKS:
            raise ImportRefused(f"{files.path} predicts velocity (it holds {key!r}), which its presets do not")


def is_table(key: str) -> bool:
    """Whether a key is a schedule's or a position's table, which no network has as a weight."""
    return bool(_TABLES.search(key))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
