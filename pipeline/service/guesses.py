"""Tokens that nobody has, counted by the address that showed them: tokens cannot be tried out at full speed."""

from __future__ import annotations

import hashlib
import ipaddress
import threading
import time
from collections.abc import Callable

A_MINUTE = 30
"""Unknown tokens that an address may show in a minute."""
_EACH = 60 / A_MINUTE
_MOST = 10_000
"""Addresses that are remembered."""


class Guesses:
    """
    An address that showed too many is not listened to for a while, whatever it shows. The same unknown token again is
    none of them: that is a client whose token was replaced, which must not lock out others at its address.

    Each replica of the ingress counts for itself. Behind a reverse proxy on another machine all clients have its
    address, unless nodes are started with FORWARDED_ALLOW_IPS naming it: then its X-Forwarded-For is believed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._seen: dict[str, tuple[float, bytes]] = {}
        """By address, the one heard of last at the end: when all is forgiven, and the digest of its last token."""

    def wait(self, address: str) -> float:
        """Seconds until an address is listened to again; 0: now."""
        forgiven, _ = self._seen.get(_counted_as(address), (0.0, b""))
        return max(0.0, forgiven - self._clock() - 60 + _EACH)

    def note(self, address: str, token: str) -> None:
        """An address showed a token that nobody has."""
        address, digest = _counted_as(address), hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        with self._lock:
            forgiven, last = self._seen.pop(address, (0.0, b""))
            if digest != last:
                forgiven = max(forgiven, self._clock()) + _EACH
            self._seen[address] = (forgiven, digest)
            if len(self._seen) > _MOST:
                del self._seen[next(iter(self._seen))]


def _counted_as(address: str) -> str:
    """The address, or the /64 of IPv6, all of which one machine may have."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4 or parsed.ipv4_mapped:
        return str(getattr(parsed, "ipv4_mapped", None) or parsed)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))
