"""Log lines: text for people, or a JSON object each for machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, facts, ``exception`` where there is one.

    Args:
        facts: of whatever is being done where the line is written, such as a request's id. A line's own, given as
            ``extra={"facts": {...}}``, go before.
    """

    def __init__(self, facts: Callable[[], Mapping[str, Any]] = dict) -> None:
        super().__init__()
        self._facts = facts

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._facts(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(
    level: str, form: LogFormat, facts: Callable[[], Mapping[str, Any]] = dict, place: str = ""
) -> None:
    """Send this process's log lines to its standard error.

    Args:
        facts: see :class:`JsonLines`.
        place: the device, in an engine's process.
    """
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JsonLines(lambda: {"device": place, **facts()} if place else facts()))
    else:
        name = f"%(name)s [{place}]" if place else "%(name)s"
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
