"""Whole shards of a remote dataset on a local disk: bounded, shared by the processes of a machine, safe to delete.

A shard lies under its sha256, so nothing in the folder is ever stale. It is loaded once: whoever comes first loads it,
the others wait. The least recently used go when the folder outgrows its limit; who still reads one keeps reading it.
"""

from __future__ import annotations

import os
import uuid

from infra import storage
from pipeline.token_index import ShardFile, locked

_LOCKS = 64
_PART = ".part-"


class DamagedShard(OSError):
    """A tar that is not what `dataset.json` says."""


class ShardCache:
    """Reads stretches of remote tars by way of a local folder.

    Args:
        folder: local; processes may share it.
        limit_bytes: that the tars in it may have together. One that is larger alone is kept until the next.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = os.path.join(storage.absolute(folder), "shards"), limit_bytes
        os.makedirs(self.folder, exist_ok=True)

    def read(self, shard: ShardFile, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a shard; fewer where it ends before.

        Raises:
            DamagedShard: it has another size than it should.
            OSError: it cannot be read where it lies.
        """
        path = os.path.join(self.folder, f"{shard.sha256[:40]}.tar")
        while True:
            try:
                os.utime(path)  # file systems may not keep times of access
                return storage.read_range(path, start, stop)
            except FileNotFoundError:
                if (data := self._load(shard, path, start, stop)) is not None:
                    return data

    def _load(self, shard: ShardFile, path: str, start: int, stop: int) -> bytes | None:
        """Puts a shard into the folder, and gives the bytes asked for; None if somebody else has put it there."""
        lock = _lock_of(shard.sha256)
        with locked(os.path.join(self.folder, f"lock-{lock:02d}")):
            if os.path.exists(path):
                return None
            self._remove_leftovers(lock)
            temporary = f"{path}{_PART}{uuid.uuid4().hex[:8]}"
            try:
                storage.download(shard.url, temporary)
                size = os.path.getsize(temporary)
                if size != shard.bytes:
                    raise DamagedShard(f"it has {size} bytes instead of {shard.bytes}")
                data = storage.read_range(temporary, start, stop)  # now: others may soon crowd it out again
                os.replace(temporary, path)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
        self._evict(path)
        return data

    def _remove_leftovers(self, lock: int) -> None:
        """Takes away what killed processes left of the shards under a lock, which is held: nobody else writes them."""
        with os.scandir(self.folder) as entries:
            left = [entry.path for entry in entries if _PART in entry.name and _lock_of(entry.name) == lock]
        for path in left:
            os.unlink(path)

    def _evict(self, newest: str) -> None:
        """Removes what was not used for longest until the rest is within the limit."""
        with locked(os.path.join(self.folder, "lock-evict")):
            with os.scandir(self.folder) as entries:
                tars = [(entry.stat(), entry.path) for entry in entries if entry.name.endswith(".tar")]
            total = sum(status.st_size for status, _ in tars)
            for status, path in sorted(tars, key=lambda tar: tar[0].st_mtime_ns):
                if total <= self.limit_bytes:
                    return
                if path != newest:
                    os.unlink(path)
                    total -= status.st_size


def _lock_of(sha256: str) -> int:
    """The number of the lock under which a shard is loaded; its files' names begin as its sha256 does."""
    return int(sha256[:8], 16) % _LOCKS
