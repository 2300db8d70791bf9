"""What stands after a start is kept out of the garbage collector's rounds."""

from __future__ import annotations

import gc


def settle_heap() -> None:
    """Have later rounds of the collector pass over all that is alive now, as it will be to the end.

    Modules, networks and routes are half a million objects. To walk through them again and again took a quarter of the
    front's processor time under load, and an engine stands still for 0.2 s whenever it does.
    """
    gc.unfreeze()  # of what was settled before, some may be garbage by now
    gc.collect()
    gc.freeze()
