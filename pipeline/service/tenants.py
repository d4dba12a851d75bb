"""Who asks: bearer tokens, each of one tenant, of which only the sha256 is stored.

tenants:
  acme:
    tokens: [9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08]
    requests_per_minute: 600

python -m pipeline.service.tenants        # makes a token: shown once, with the digest for this file

Whoever has a token speaks with the voices of its tenant and with shared ones. `requests_per_minute` may be left out; a
tenant may have several tokens, so that one can be replaced without a break. The service reads the file when it starts.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra.config import ConfigError
from pipeline.service.config import NAME, SHARED, ServiceConfig

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tenant:
    name: str
    """Of its folder of voices."""
    requests_per_minute: int


class Tenants:
    """
    Args:
        digests: of tokens, each with its tenant.
    """

    def __init__(self, digests: list[tuple[bytes, Tenant]]) -> None:
        self._digests = digests

    def of(self, token: str) -> Tenant | None:
        """The tenant of a token. Takes as long whichever entry it is, if any."""
        digest, found = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest(), None
        for known, tenant in self._digests:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


def read(config: ServiceConfig) -> Tenants | None:
    """The tenants of `config.tokens`; None where that is not set.

    Raises:
        ConfigError: no such file, or one that is not as above.
    """
    import yaml

    from infra import storage

    if config.tokens is None:
        return None
    where = f"tokens file {config.tokens}"
    try:
        content = yaml.safe_load(storage.read_text(config.tokens))
    except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    entries = content.get("tenants") if isinstance(content, dict) and set(content) == {"tenants"} else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{where}: expected `tenants:` with an entry for each")
    digests: dict[bytes, Tenant] = {}
    for name, entry in entries.items():
        tenant, own = _entry(where, name, entry, config.requests_per_minute)
        for digest in own:
            if digest in digests:
                raise ConfigError(f"{where}: tenant {name} has a token that {digests[digest].name} has")
            digests[digest] = tenant
    return Tenants(list(digests.items()))


def _entry(where: str, name: Any, entry: Any, rate: int) -> tuple[Tenant, list[bytes]]:
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == SHARED:
        raise ConfigError(f"{where}: tenant {name!r} must be letters, digits, _ and -, and not {SHARED!r}")
    if not isinstance(entry, dict) or not entry.keys() <= {"tokens", "requests_per_minute"}:
        raise ConfigError(f"{where}: tenant {name} has tokens and, if others than usual, requests_per_minute")
    tokens, rate = entry.get("tokens"), entry.get("requests_per_minute", rate)
    if not isinstance(tokens, list) or not tokens or not all(_is_digest(token) for token in tokens):
        raise ConfigError(
            f"{where}: tenant {name} needs tokens, a list of sha256 digests of 64 hexadecimal digits: never the "
            "tokens themselves"
        )
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
        raise ConfigError(f"{where}: tenant {name} has requests_per_minute {rate!r}, which must be at least 1")
    return Tenant(name, rate), [bytes.fromhex(token) for token in tokens]


def _is_digest(token: Any) -> bool:
    return isinstance(token, str) and bool(_DIGEST.fullmatch(token))


class Rates:
    """A bucket of requests for each tenant, refilled steadily; it holds a minute's worth.

    Each replica of the ingress has its own, so N of them let up to N times as many through.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, tenant: Tenant) -> float:
        """0 if a request may be carried out now, and counts it; else the seconds until one may be."""
        with self._lock:
            now = self._clock()
            level, then = self._buckets.get(tenant.name, (float(tenant.requests_per_minute), now))
            level = min(tenant.requests_per_minute, level + (now - then) * tenant.requests_per_minute / 60)
            allowed = level >= 1
            self._buckets[tenant.name] = (level - allowed, now)
            return 0.0 if allowed else (1 - level) * 60 / tenant.requests_per_minute


def main(arguments: list[str] | None = None) -> None:
    """Makes a token; `--help` says what the file is."""
    argparse.ArgumentParser(
        "python -m pipeline.service.tenants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    token = f"lina-{secrets.token_urlsafe(32)}"
    print(f"token   {token}\nsha256  {hashlib.sha256(token.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
