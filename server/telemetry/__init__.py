"""What the server tells its operator: metrics, traces, and whose log line is whose."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.telemetry.tracing import Tracing


def open_tracing() -> Tracing:
    """Begin to send traces, as the ``OTEL_*`` variables say.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    try:
        from server.telemetry.tracing import Tracing
    except ImportError as error:
        raise ValueError(
            f"tracing needs OpenTelemetry, and there is no module {error.name}: install the extra 'otel' "
            "(pip install 'rmd[otel]'), or leave tracing out"
        ) from None
    return Tracing(version("rmd"))
