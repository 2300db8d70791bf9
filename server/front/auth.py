"""Optional API keys: ``Authorization: Bearer <key>``, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr

from server.core.faults import Fault, RequestError


class KeyRing:
    """The accepted keys, kept as SHA-256 digests so that comparing leaks neither length nor prefix."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = tuple(hashlib.sha256(key.get_secret_value().encode()).digest() for key in keys)

    @property
    def open(self) -> bool:
        """True where no key is configured and every caller is let in."""
        return not self._digests

    def account(self, authorization: str | None) -> str:
        """Return whose requests these are: a digest of the key; all callers are one where no key is asked for."""
        return "" if self.open else _digest(authorization).hex()

    def check(self, authorization: str | None) -> None:
        """Let the caller in or raise :class:`RequestError` (401).

        Every configured key is compared, found or not, so that the time says nothing.
        """
        if self.open:
            return
        scheme = (authorization or "").partition(" ")[0]
        offered = _digest(authorization)
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(
                Fault.BAD_KEY,
                "This server asks for an API key: send it as 'Authorization: Bearer <key>'.",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(authorization: str | None) -> bytes:
    """Return the SHA-256 of the key in an Authorization header."""
    key = (authorization or "").partition(" ")[2].strip()
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
