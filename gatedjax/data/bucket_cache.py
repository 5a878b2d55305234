"""Token caches that machines share through a bucket: `data.cache_dir=gs://...`.

Tokens are read from anywhere in their file, at every step: that needs a disk. So every machine has
a cache of its own, and the one in the bucket is where it comes from, if it is there, and goes to,
once it is built. `meta.json`, with the checksums of all files, is written last: without it a folder
in the bucket is no cache.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from gatedjax import buckets
from gatedjax.paths import Place

META = "meta.json"


def local_folder(user_cache: Path, cache_dir: Place) -> Path:
    """Where this machine keeps what the bucket holds."""
    digest = hashlib.sha256(os.fspath(cache_dir).encode()).hexdigest()
    return user_cache / f"bucket-{digest[:16]}"


def fetch(folder: Path, place: Place, report: Callable[[str], None]) -> None:
    """Brings a cache from the bucket, if it is there and not here.

    Args:
      folder: the cache, on this machine.
      place: the cache, in the bucket.
      report: called with a line if it is brought.

    Raises:
      InputError: the bucket cannot be used.
    """
    with buckets.errors(f"config.data.cache_dir: cannot use {place.parent}", place):
        names = buckets.sizes(place)
        if folder.is_dir() or META not in names:
            return
        report(f"token cache: fetching {place}")
        partial = folder.with_name(f".{folder.name}.fetched-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        try:
            for name in names:
                # Names that we give, and no folders.
                if "/" not in name and name not in (".", ".."):
                    buckets.download(place / name, partial / name)
            # Another process may have been faster.
            if not folder.is_dir():
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def store(folder: Path, place: Place) -> None:
    """Takes a whole cache to the bucket, unless it is there.

    Raises:
      InputError: the bucket cannot be written to.
    """
    with buckets.errors(f"config.data.cache_dir: cannot write to {place.parent}", place):
        if META in buckets.sizes(place):
            return
        others = [file for file in sorted(folder.iterdir()) if file.name != META]
        for file in [*others, folder / META]:
            buckets.upload(file, place / file.name)
