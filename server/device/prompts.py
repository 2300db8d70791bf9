"""Encoded texts, kept: the same prompt is often drawn again, and nearly every negative prompt is empty."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from rmd.backbones.base import Conditioning


@dataclass(frozen=True)
class EncodedText:
    """One text's conditions (one row), tokens heard and tokens cut off."""

    conditioning: Conditioning
    tokens: int
    cut: int

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(value.numel() * value.element_size() for value in self.conditioning.values())


class PromptCache:
    """The latest texts, bounded in bytes; for any thread. Keys: the text, and whether it stands for 'no condition'.

    Args:
        max_bytes: beyond it the text that was used longest ago goes; one text alone always stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._texts: OrderedDict[tuple[str, bool], EncodedText] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, text: str, negative: bool = False) -> EncodedText | None:
        """Return a text, which is then the latest; None where it is not kept."""
        with self._lock:
            found = self._texts.get((text, negative))
            if found is not None:
                self._texts.move_to_end((text, negative))
            return found

    def put(self, text: str, encoded: EncodedText, negative: bool = False) -> None:
        """Keep a text."""
        with self._lock:
            replaced = self._texts.pop((text, negative), None)
            self._bytes += encoded.bytes - (replaced.bytes if replaced else 0)
            self._texts[text, negative] = encoded
            while self._bytes > self._max_bytes and len(self._texts) > 1:
                _, gone = self._texts.popitem(last=False)
                self._bytes -= gone.bytes
