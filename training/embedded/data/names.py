"""Which icon of a set shows which emoji, for sets that name their icons but ship no table of codes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

CHANGED = frozenset({"PISTOL"})
"""Unicode names whose old drawings show something else than today's label: that of a pistol is "water pistol"."""


def name_key(name: str) -> str:
    """What icon names, labels and Unicode names have in common: their ASCII letters and digits."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and")).encode("ascii", "ignore").decode()
    plain = re.sub(r"^flag-for-(flag-)?", "flag-", plain)  # "flag-for-peru": the label is "flag: Peru"
    return re.sub(r"[^a-z0-9]", "", plain)


def codes_by_name(labels: Mapping[str, str]) -> dict[str, str]:
    """Name key -> code, from today's labels and, for older sets, from the Unicode names of single code points.

    A name that two labels share stands for neither; a label goes before another code's Unicode name.

    Args:
        labels: code -> label.
    """
    found: dict[str, str] = {}
    unicode_names = {code: unicodedata.name(chr(int(code, 16)), "") for code in labels if "-" not in code}
    unicode_names = {code: name for code, name in unicode_names.items() if name not in CHANGED}
    for table in (labels, unicode_names):
        fresh: dict[str, str | None] = {}
        for code, name in table.items():
            key = name_key(name.replace("keycap: #", "keycap pound").replace("keycap: *", "keycap asterisk"))
            fresh[key] = None if key in fresh else code
        found = {**{key: code for key, code in fresh.items() if code is not None and key}, **found}
    return found


def match_names(names: Iterable[str], labels: Mapping[str, str]) -> dict[str, str]:
    """Code -> icon name.

    Of several drawings of one emoji ("cloud-1", "cloud-2") the first is taken, the unnumbered one before all.
    """
    codes = codes_by_name(labels)
    chosen: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (bool(re.search(r"-\d+$", name)), name)):
        code = codes.get(name_key(name)) or codes.get(name_key(re.sub(r"-\d+$", "", name)))
        if code is not None:
            chosen.setdefault(code, name)
    return chosen
