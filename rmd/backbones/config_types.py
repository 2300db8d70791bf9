"""Whether a configuration's values are of the kinds that its class takes, by that class's own signature.

The libraries keep whatever a file says: a word where a number belongs comes up in the middle of a picture, as a
traceback or as another picture, or never.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rmd.backbones.base import BackboneError
from rmd.backbones.random_weights import resolve

_DIVISORS = ("scaling_factor", "latents_std", "mid_block_scale_factor", "resnet_out_scale_factor")
_STATISTICS = ("latents_mean", "latents_std")
_CHANNELS = ("latent_channels", "z_dim")
_PLAIN = (bool, int, float, str)
# Schedulers are never built, and some of their signatures are wrong (UniPC's sigma_max); these mean the same in all.
_SCHEDULER = "diffusers:DDPMScheduler"
_SCHEDULER_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def check_config(path: Path, config: Mapping[str, Any], target: str) -> None:
    """Check the fields of a network's configuration; those that its class does not know may hold anything.

    Args:
        path: the file, for the message.
        config: its content.
        target: the class as ``module:Class``.

    Raises:
        BackboneError: a value is of another kind than the class's signature says (a word, a list, true or null for a
            number, say), not finite, negative where it cannot be, or a list of another length than there are channels;
            the message names file and field.
    """
    fields = _fields(target)
    _check(path, config, fields)
    known = {name: default for name, (_, default) in fields.items()} | dict(config)
    channels = next((known[name] for name in _CHANNELS if name in known), None)
    for name in _STATISTICS:
        value = config.get(name) if name in fields else None
        if value is not None and channels is not None and len(value) != channels:
            raise _refusal(path, name, f"{channels} numbers, one a channel", f"{len(value)} of them")


def check_scheduler(path: Path, config: Mapping[str, Any]) -> None:
    """The same of those fields of a scheduler's configuration that say what the network was trained on."""
    _check(path, config, {name: kind for name, kind in _fields(_SCHEDULER).items() if name in _SCHEDULER_FIELDS})


def check_tokenizer(path: Path, config: Mapping[str, Any]) -> None:
    """The same of a ``tokenizer_config.json``: its length, and what its class takes as numbers and switches."""
    name = str(config.get("tokenizer_class"))
    known = (
        _fields(f"transformers:{name}") if inspect.isclass(getattr(import_module("transformers"), name, None)) else {}
    )
    fields = {name: kind for name, kind in known.items() if isinstance(kind[1], bool | int)}
    # A length that nobody has set is stored as 1e30, in whole digits. null is the same.
    _check(path, config, {**fields, "model_max_length": (float | None, 1)})
    if config.get("model_max_length") == 0:
        raise _refusal(path, "model_max_length", "above 0", "0")


def check_flag(path: Path, config: Mapping[str, Any], name: str) -> None:
    """The same of one switch, where the file has it."""
    _check(path, config, {name: (bool, True)})


def _check(path: Path, config: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (hint, default) in fields.items():
        if name not in config:
            continue
        value = config[name]
        if value is None:
            if not _may_be_null(hint, default):
                raise _refusal(path, name, _told(hint).removesuffix(" or null"), "null")
            continue
        numbers = list(_numbers(value))
        if not all(map(math.isfinite, numbers)):
            raise _refusal(path, name, "finite", _shown(value))
        if not _fits(value, hint) and not (default is None and _is_number(value) and _takes_number(hint)):
            raise _refusal(path, name, _told(hint), _shown(value))
        if name in _DIVISORS and min(numbers, default=1) <= 0:
            raise _refusal(path, name, "above 0", _shown(value))
        if _is_number(default) and default > 0 and min(numbers, default=0) < 0:
            raise _refusal(path, name, "0 or more", _shown(value))


@lru_cache(maxsize=64)
def _fields(target: str) -> Mapping[str, tuple[Any, Any]]:
    """What a class takes by name: its kind (``Any`` where it does not say), and its default."""
    cls = resolve(target)
    cls = getattr(cls, "config_class", None) or cls  # transformers' networks take a configuration object
    parameters = inspect.signature(cls.__init__).parameters
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # of what is imported for type checkers alone
        hints = {}
    return {
        name: (hints.get(name, _hint(one)), None if one.default is one.empty else one.default)
        for name, one in parameters.items()
        if name != "self" and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }


def _hint(parameter: inspect.Parameter) -> Any:
    """As it is written, if not as text; of what has none the kind of its default, if that is a plain one."""
    if parameter.annotation is not parameter.empty:
        return Any if isinstance(parameter.annotation, str) else parameter.annotation
    return type(parameter.default) if type(parameter.default) in _PLAIN else Any


def _may_be_null(hint: Any, default: Any) -> bool:
    """Published files write null for a switch that is off, and for no shift; an epsilon that may be null cannot."""
    if isinstance(default, float) and default > 0:
        return False
    return not default or NoneType in get_args(hint) or hint is Any or bool in (hint, *get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return type(value) in {type(one) for one in inner}  # which of them, the class says itself
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in _PLAIN:
        return isinstance(value, hint)
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        kinds = [one for one in inner if one is not Ellipsis]
        return isinstance(value, list | tuple) and all(not kinds or any(_fits_in(v, k) for k in kinds) for v in value)
    # Dictionaries, and what no file can hold (arrays, objects): not said here.
    return kind is not NoneType


def _fits_in(value: Any, hint: Any) -> bool:
    """Whether an item of a list fits; a number may stand for a list of equal ones (SSD-1B's layers)."""
    if _fits(value, hint):
        return True
    if (get_origin(hint) or hint) not in (list, tuple, Sequence):
        return False
    kinds = [one for one in get_args(hint) if one is not Ellipsis]
    return any(_fits_in(value, one) for one in kinds) if kinds else _is_number(value)


def _takes_number(hint: Any) -> bool:
    """Whole numbers are what is said of PixArt's interpolation scale, which is a half at 256 pixels."""
    return bool({int, float} & {hint, *get_args(hint)})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif _is_number(value):
        yield value


def _told(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_told(one) for one in get_args(hint)))
    if get_origin(hint) is Literal:
        return _told(type(get_args(hint)[0]))
    if (get_origin(hint) or hint) in (list, tuple, Sequence):
        kinds = [_told(one) for one in get_args(hint) if one is not Ellipsis]
        return f"a list, each of it {' or '.join(dict.fromkeys(kinds))}" if kinds else "a list"
    return words.get(hint, "what its class takes")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refusal(path: Path, name: str, wanted: str, found: str) -> BackboneError:
    return BackboneError(f"{path}, field {name!r}: must be {wanted}, not {found}; put it right, or copy the file again")
