"""The folder of compiled programs: an entry is used only under the name it was written for.

jax names an entry by what the program is compiled from, and believes whatever it finds under that
name. A file that was exchanged with another, by a copy gone wrong or a restored backup, would run
another program. So each entry ends with a digest of its name and its contents; one that does not
match is removed, and its program compiled again. (At the end, plain jax reads over it.)

That guards against accidents. The folder must be your own all the same: the programs in it are
executed, and whoever can write there can write a digest too.
"""

import contextlib
import hashlib

import jax
from absl import logging
from etils import epath
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from gatedjax.errors import printable
from gatedjax.paths import Place

# How the end of an entry begins.
_MARK = b"named-1\0"
_END_BYTES = len(_MARK) + 32


def use(folder: Place) -> None:
    """Keeps compiled programs in `folder`, from the next compilation on."""
    compilation_cache.get_file_cache = _named_cache
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))


class NamedCache(CacheInterface):
    """Another cache, whose entries know their names."""

    def __init__(self, cache: CacheInterface):
        self._cache = cache
        self._path = cache._path

    def get(self, key: str) -> bytes | None:  # pyrefly: ignore  (jax says nothing of the result)
        """The entry of this name; None if there is none, or one that is not of this name."""
        entry = self._cache.get(key)
        if entry is None:
            return None
        value = entry[:-_END_BYTES]
        end = entry[-_END_BYTES:]
        if end == _end_of(key, value):
            return value
        # Without the mark it is an entry of plain jax, which is replaced without a word.
        if end.startswith(_MARK):
            name = printable(key)
            logging.warning("compile cache: %s is not what was written, and is removed", name)
        for file in epath.Path(self._path).glob(f"{key}-*"):
            with contextlib.suppress(OSError):
                file.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Writes an entry."""
        self._cache.put(key, value + _end_of(key, value))


def _end_of(key: str, value: bytes) -> bytes:
    return _MARK + hashlib.sha256(key.encode() + b"\0" + value).digest()


def _named_cache(path: str) -> tuple[CacheInterface, str] | None:
    found = _file_cache(path)
    if found is None:
        return None
    cache, where = found
    return NamedCache(cache), where


_file_cache = compilation_cache.get_file_cache
