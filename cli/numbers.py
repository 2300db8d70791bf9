"""Numbers on the command line: lists such as `--buckets 1,2,4,8`, and `--threads`."""

from __future__ import annotations


def whole_numbers(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """The numbers of "1,2,4".

    Args:
        option: its name, for the message.
        text: comma-separated.
        least: the smallest that is allowed.

    Raises:
        ValueError: something else, none, or a number below `least`.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: give whole numbers separated by commas, such as 1,2,4") from None
    if min(found) < least:
        raise ValueError(f"{option} {text!r}: every number must be at least {least}")
    return found


def buckets_option(text: str | None) -> tuple[int, ...] | None:
    """Batch sizes of `--buckets`; None stays None.

    Raises:
        ValueError: as :func:`whole_numbers`.
    """
    return None if text is None else whole_numbers("--buckets", text)


def use_threads(count: int | None) -> None:
    """Set torch's CPU threads; None leaves its choice. Before engines are looked for: their keys hold it."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
