# ruff: noqa: N818  -- "EngineMissing" says what is wrong; "EngineMissingError" says it no better
"""What can go wrong between a checkpoint and a running engine; every message names the way out."""

from __future__ import annotations


class EngineError(ValueError):
    """Base of all errors of this package."""


class BackendUnavailable(EngineError):
    """A backend cannot build or run on this machine; the message says why and which can."""


class EngineMismatch(EngineError):
    """An engine was built for another machine or with other library versions."""


class EngineCorrupt(EngineError):
    """Files of an engine are missing, cut short or altered."""


class EngineMissing(EngineError):
    """The store lacks engines that the checkpoint needs."""


class EngineInputError(EngineError):
    """Inputs whose names, shapes or dtypes are not the engine's."""


class EngineAccuracyError(EngineError):
    """An engine's output is too far from eager's; it is not published."""


class NotEnoughMemory(EngineError):
    """The memory plan does not fit the device."""


class NotEnoughDisk(EngineError):
    """The store's disk is full; nothing half-written was left behind."""


def of_kind(kind: str, message: str) -> EngineError:
    """The error of this package that another process named; an :class:`EngineError` where it is none of them."""
    known = globals().get(kind)
    return known(message) if isinstance(known, type) and issubclass(known, EngineError) else EngineError(message)
