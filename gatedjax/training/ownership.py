"""Whether a checkpoint was written by this user: what its paths may be trusted with.

A checkpoint of a stranger names folders to read and folders to write to, of the stranger's choice.
Its owner on disk proves nothing: who unpacks an archive owns what was in it. So a run signs the
`data` section of its configuration with a key that lies in the user's home and never leaves it; a
checkpoint whose section fits its signature is the user's own, wherever it was moved.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatedjax.errors import InputError
from gatedjax.files import read_plain
from gatedjax.paths import expand

_KEY_BYTES = 32


def signature(data: Mapping[str, Any]) -> str | None:
    """The signature of a `data` section; None where no key can be kept (no home directory)."""
    key = _read_key() or _make_key()
    return None if key is None else _sign(key, data)


def is_own(data: Mapping[str, Any], signed: Any) -> bool:
    """Whether this user's key made the signature of this `data` section."""
    key = _read_key()
    if key is None or not isinstance(signed, str):
        return False
    return hmac.compare_digest(_sign(key, data).encode(), signed.encode(errors="replace"))


def _sign(key: bytes, data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key_path() -> Path | None:
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return expand(folder, "XDG_STATE_HOME").absolute() / "gatedjax" / "key"
    except InputError:
        return None


def _read_key() -> bytes | None:
    path = _key_path()
    if path is None:
        return None
    try:
        key = read_plain(path, _KEY_BYTES)
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def _make_key() -> bytes | None:
    path = _key_path()
    if path is None:
        return None
    partial = path.with_name(f".key-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        try:
            # A link, unlike a rename, does not replace the key that another process made just now.
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    except OSError:
        return None
    return _read_key()
