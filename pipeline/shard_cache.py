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
                self._load(shard, path)

    def _load(self, shard: ShardFile, path: str) -> None:
        with locked(os.path.join(self.folder, f"lock-{int(shard.sha256[:8], 16) % _LOCKS:02d}")):
            if os.path.exists(path):
                return
            temporary = f"{path}.part-{uuid.uuid4().hex[:8]}"
            try:
                fs, remote = storage.filesystem(shard.url)
                fs.get_file(remote, temporary)
                size = os.path.getsize(temporary)
                if size != shard.bytes:
                    raise DamagedShard(f"it has {size} bytes instead of {shard.bytes}")
                os.replace(temporary, path)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
        with locked(os.path.join(self.folder, "lock-evict")):
            self._evict(path)

    def _evict(self, newest: str) -> None:
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".tar") and entry.path != newest:
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files) + os.path.getsize(newest)
        for _, size, path in sorted(files):
            if total <= self.limit_bytes:
                return
            os.unlink(path)
            total -= size
