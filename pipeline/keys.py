"""A sample's key in its shard, derived from the utterance's id: safe in a tar, and reversible.

WebDataset splits a member's name at its first dot and takes folders as part of the key. So a key keeps letters, digits,
`_`, `-` and single slashes between parts, which keeps Libriheavy's ids readable, and percent-encodes everything else as
UTF-8: dots (also those of `..`), spaces, leading, trailing and doubled slashes.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from pipeline.utterances import Unusable

_PLAIN = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LOOSE_SLASH = re.compile(r"^/|/$|(?<=/)/")

LONGEST_SUFFIX = len(".phones.txt")
_USTAR_NAME, _USTAR_PREFIX = 100, 155


def key_of(id: str) -> str:
    """The key of an id; `id_of` gives the id back.

    Raises:
        Unusable: `bad-id` for an empty one, control characters (NUL among them), a `..` part or text that is not
            Unicode; `id-too-long` where the key would not fit a USTAR header.
    """
    if _PLAIN.fullmatch(id):
        key = id
    else:
        if not id or _CONTROL.search(id) or ".." in id.split("/"):
            raise Unusable("bad-id", f"id {id[:80]!r} is empty, or has control characters or a '..' part; rename it")
        try:
            key = _LOOSE_SLASH.sub("%2F", quote(id, safe="/").replace(".", "%2E").replace("~", "%7E"))
        except UnicodeEncodeError:
            raise Unusable("bad-id", f"id {id[:80]!r} is not valid Unicode; rename it") from None
    if not _fits_ustar(key):
        raise Unusable("id-too-long", f"id of {len(id)} characters does not fit a tar header ({id[:60]}…); shorten it")
    return key


def id_of(key: str) -> str:
    return unquote(key, errors="strict")


def _fits_ustar(key: str) -> bool:
    """USTAR holds 100 bytes, or 155 + 100 bytes split at a slash."""
    length = len(key) + LONGEST_SUFFIX
    if length <= _USTAR_NAME:
        return True
    cut = key.find("/", length - _USTAR_NAME - 1)
    return 0 < cut <= _USTAR_PREFIX
