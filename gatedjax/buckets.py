"""Buckets: Google Cloud Storage (gs://) and S3 (s3://), and what is not as with files there.

An object is written whole or not at all, nothing can be appended to it, and nothing can be renamed:
what is "renamed" here is copied, then deleted. A folder is there as long as something is in it.
gcsfs and s3fs (the extra `buckets`) do the work, below etils.epath; credentials are theirs:
`gcloud auth application-default login`, a service account, AWS_PROFILE and the like. Endpoints of
other servers that speak the same protocols are taken from STORAGE_EMULATOR_HOST (gs) and
AWS_ENDPOINT_URL (s3).
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gatedjax.errors import InputError, StorageError
from gatedjax.paths import Place, is_bucket

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
# Parts of the libraries' messages: what they raise is of many types, which only they know.
_NO_CREDENTIALS = (
    "NoCredentials",
    "Unable to locate credentials",
    "DefaultCredentialsError",
    "RefreshError",
    "UNAUTHENTICATED",
    "Invalid Credentials",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "Anonymous caller",
)
_DENIED = (
    "PermissionError",
    "PERMISSION_DENIED",
    "AccessDenied",
    "Access Denied",
    "Forbidden",
)
_NO_ANSWER = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "Cannot connect",
    "Could not connect",
    "ClientConnector",
    "ServerDisconnected",
    "TransportError",
    "TimeoutError",
    "SlowDown",
    "RequestTimeout",
    "InternalError",
)
# HTTP's codes, which some exceptions have as `code`.
_CODE_NO_CREDENTIALS = 401
_CODE_DENIED = 403
_CODES_NO_ANSWER = (408, 429, 500, 502, 503, 504)
# Modules whose exceptions may be about a bucket; and of Python's own those that they raise, and
# that tensorstore does.
_LIBRARIES = ("gcsfs", "s3fs", "fsspec", "google", "botocore", "aiobotocore", "aiohttp", "requests")
_BUILTINS = (OSError, ValueError)
_DEEPEST_CAUSE = 8


class Trouble(NamedTuple):
    """Why a bucket cannot be used.

    reason: in words.
    passes: whether the same call may succeed later.
    """

    reason: str
    passes: bool


def file_system(place: str | os.PathLike) -> Any:
    """The fsspec file system of a path in a bucket.

    Raises:
      InputError: its package is not installed.
    """
    scheme = os.fspath(place).partition(":")[0]
    _settle_environment()
    try:
        importlib.import_module(_PACKAGES[scheme])
        fsspec = importlib.import_module("fsspec")
        settings = importlib.import_module("fsspec.config").conf
    except ImportError as error:
        raise InputError(
            f"{place}: {scheme}:// needs {_PACKAGES[scheme]} ({error}): "
            "pip install 'gatedjax[buckets]'"
        ) from None
    # Other processes, and tensorstore, write where this one has looked before.
    for name in ("gs", "gcs", "s3"):
        settings.setdefault(name, {}).setdefault("use_listings_cache", False)
    if scheme == "gs":
        # As epath asks for it: the two are one.
        return fsspec.filesystem("gcs", finalize_on_close=True)
    return fsspec.filesystem(scheme)


def _settle_environment() -> None:
    """Tells all libraries of a Cloud Storage server elsewhere that one of them is told of."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        url = emulator if "://" in emulator else f"http://{emulator}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", url)
        # Only Google's own servers have the interface that tells kinds of buckets apart.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        os.environ.setdefault("FSSPEC_GCS_TOKEN", "anon")
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")


def require_reachable(place: Place, name: str) -> None:
    """Nothing for a path on this machine. Asks once whether the bucket is there and may be read.

    Args:
      place: what the user gave.
      name: the flag or configuration key, for the message.

    Raises:
      InputError: a package is missing, no such bucket, no credentials, no permission.
      StorageError: nobody answers.
    """
    if not is_bucket(place):
        return
    try:
        files = file_system(place)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    with errors(f"{name}: cannot use {place}", place):
        # Of a bucket that is there the answer is a list, if an empty one.
        files.find(os.fspath(place), prefix="lock-")


@contextlib.contextmanager
def errors(attempt: str, place: str | os.PathLike) -> Iterator[None]:
    """What a store refuses becomes one line: the attempt, and why.

    Args:
      attempt: what failed, for the message.
      place: in the bucket.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        bucket = "/".join(os.fspath(place).split("/")[:3])
        raise InputError(f"{attempt}: not found, is there a bucket {bucket}?") from error
    except Exception as error:
        found = trouble(error, os.fspath(place).partition(":")[0])
        if found is None:
            raise
        kind = StorageError if found.passes else InputError
        raise kind(f"{attempt}: {found.reason}") from error


def trouble(error: BaseException, scheme: str = "") -> Trouble | None:
    """What a library's exception says of a bucket; None if it is about something else.

    Args:
      error: with its causes.
      scheme: of the bucket, to say where its credentials come from.
    """
    texts = []
    codes = set()
    cause: BaseException | None = error
    for _ in range(_DEEPEST_CAUSE):
        if cause is None:
            break
        kind = type(cause)
        if isinstance(cause, _BUILTINS) or kind.__module__.partition(".")[0] in _LIBRARIES:
            texts.append(f"{kind.__name__}: {cause}")
            codes.add(getattr(cause, "code", None))
        cause = cause.__cause__ or cause.__context__
    said = "\n".join(texts)
    first = " ".join(said.split())[:300]
    if _holds(said, _NO_CREDENTIALS) or _CODE_NO_CREDENTIALS in codes:
        where = _CREDENTIALS.get(scheme, "; ".join(_CREDENTIALS.values()))
        return Trouble(f"no valid credentials ({where}): {first}", passes=False)
    if _holds(said, _DENIED) or _CODE_DENIED in codes:
        return Trouble(f"permission denied: {first}", passes=False)
    if _holds(said, _NO_ANSWER) or not codes.isdisjoint(_CODES_NO_ANSWER):
        return Trouble(f"the store does not answer: {first}", passes=True)
    return None


def _holds(text: str, parts: tuple[str, ...]) -> bool:
    return any(part in text for part in parts)


def exists(place: Place) -> bool:
    """Whether there is an object of that name, or any below it."""
    return file_system(place).exists(os.fspath(place))


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of everything below a folder in a bucket, by relative name."""
    files = file_system(folder)
    root = files._strip_protocol(os.fspath(folder))
    found = files.find(os.fspath(folder), detail=True)
    return {name.removeprefix(f"{root}/"): info["size"] or 0 for name, info in found.items()}


def read(place: Place, largest: int) -> bytes:
    """The contents of an object of at most `largest` bytes.

    Raises:
      FileNotFoundError: there is none.
      InputError: it is larger.
    """
    files = file_system(place)
    size = files.info(os.fspath(place))["size"]
    if size > largest:
        raise InputError(f"{place}: has {size:,} bytes, expected at most {largest:,}")
    return files.cat_file(os.fspath(place))


def write(place: Place, data: bytes) -> None:
    """Writes an object, whole or not at all."""
    file_system(place).pipe_file(os.fspath(place), data)


def create(place: Place, data: bytes) -> bool:
    """Writes an object unless there is one of that name; whether it was written."""
    try:
        file_system(place).pipe_file(os.fspath(place), data, mode="create")
    except FileExistsError:
        return False
    return True


def upload(file: Path, place: Place) -> None:
    """Copies a file of this machine to an object."""
    file_system(place).put_file(str(file), os.fspath(place))


def download(place: Place, file: Path) -> None:
    """Copies an object to a file of this machine."""
    file_system(place).get_file(os.fspath(place), str(file))


def move(
    folder: Place,
    to: Place,
    *,
    marker: str,
    leave: str = "",
) -> None:
    """Copies everything below a folder, and deletes it there when all is copied.

    Args:
      folder: what moves.
      to: where nothing is yet.
      marker: the name of the objects that say of others that they are whole: the last ones that are
        copied, and the first that are deleted.
      leave: what begins with this stays; empty for nothing.
    """
    files = file_system(folder)
    names = [name for name in sizes(folder) if not (leave and name.startswith(leave))]
    markers = [name for name in names if name.rpartition("/")[2] == marker]
    others = [name for name in names if name not in set(markers)]
    for name in [*others, *markers]:
        files.cp_file(os.fspath(folder / name), os.fspath(to / name))
    delete(folder, [*markers, *others])


def delete(folder: Place, names: list[str] | None = None) -> None:
    """Deletes what is below a folder: these relative names, in order, or all."""
    files = file_system(folder)
    for name in sizes(folder) if names is None else names:
        files.rm_file(os.fspath(folder / name))
