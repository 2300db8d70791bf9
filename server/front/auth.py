"""Optional API keys: ``Authorization: Bearer <key>``, compared in constant time."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import SecretStr

from server.core.faults import Fault, RequestError

# Padded base64, which ends in "=", is a key without a name.
_NAMED = re.compile(r"(?P<name>[A-Za-z][\w.-]{0,31})=(?P<key>[^=].*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        name: of the key, as logs and metrics tell it; empty where no key is asked for.
        account: whose films these are. A name keeps its account when its key is changed.
    """

    name: str = ""
    account: str = ""


class KeyRing:
    """The accepted keys, kept as SHA-256 digests so that comparing leaks neither length nor prefix.

    Args:
        keys: each "key" or "name=key"; several may have one name. Without one they are called key-1, key-2 ...
    """

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._callers: dict[bytes, Caller] = {}
        for number, secret in enumerate(keys, start=1):
            key = secret.get_secret_value()
            named = _NAMED.fullmatch(key)
            if named:
                key = named["key"]
                caller = Caller(named["name"], f"name:{named['name']}")
            else:
                caller = Caller(f"key-{number}", _digest(key.encode()).hex())
            for encoding in ("utf-8", "latin-1"):  # clients differ in how they write letters beyond ASCII
                with contextlib.suppress(UnicodeEncodeError):
                    self._callers.setdefault(_digest(key.encode(encoding)), caller)

    @property
    def open(self) -> bool:
        """True where no key is configured and every caller is let in."""
        return not self._callers

    @property
    def names(self) -> tuple[str, ...]:
        """The keys' names, each once."""
        return tuple(dict.fromkeys(caller.name for caller in self._callers.values()))

    def caller(self, authorization: str | None) -> Caller:
        """Say who sends this header, as ASGI servers give it (latin-1), or raise :class:`RequestError` (401).

        Every configured key is compared, found or not, so that the time says nothing.
        """
        if self.open:
            return Caller()
        scheme, _, key = (authorization or "").partition(" ")
        offered = _digest(key.strip().encode("latin-1", "replace"))
        found = [caller for digest, caller in self._callers.items() if hmac.compare_digest(offered, digest)]
        if scheme.lower() != "bearer" or not found:
            raise RequestError(
                Fault.BAD_KEY,
                "This server asks for an API key: send it as 'Authorization: Bearer <key>'.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
