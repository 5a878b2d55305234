"""The files of a run that grow: log, metrics, TensorBoard, pictures. And their copies in a bucket.

Nothing can be appended to an object. Where the run directory is in a bucket these files are written
to a folder of this machine, and those that have changed are uploaded, whole: every half minute,
before every checkpoint, and at the end. So a run that is killed loses lines of its last half
minute, and never a record of a step that the next start does not make again.
"""

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gatedjax import buckets
from gatedjax.errors import InputError
from gatedjax.paths import Place, is_bucket
from gatedjax.training.run_directory import plain_errors

SECONDS = 30.0
# Long uploads are made less often: they take a tenth of the time at most.
_REST = 10.0


class Mirror:
    """A context manager. Of a run directory on this machine it is that directory, and no more.

    Attributes:
      folder: where files are to be written.
    """

    def __init__(self, place: Place, report: Callable[[str], None]):
        """Writes nothing to the bucket yet.

        Args:
          place: the run directory.
          report: called with a line when an upload failed.
        """
        self._place = place
        self._report = report
        self._is_remote = is_bucket(place)
        self._temporary: Path | None = None
        self.folder = Path(place)
        if self._is_remote:
            self._temporary = Path(tempfile.mkdtemp(prefix="gatedjax-"))
            self.folder = self._temporary / place.name
            self.folder.mkdir()
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True, name="uploads")

    def begin(self, names: Iterable[str]) -> None:
        """Called once the run directory is this run's: fetches files that it goes on with.

        Raises:
          InputError: they cannot be read.
        """
        if not self._is_remote:
            return
        for name in names:
            with (
                plain_errors(f"could not read {self._place / name}"),
                contextlib.suppress(FileNotFoundError),
            ):
                buckets.download(self._place / name, self.folder / name)
        self._thread.start()

    def upload(self) -> None:
        """Uploads what has changed since the last time.

        Raises:
          InputError: it cannot be written.
        """
        if not self._is_remote:
            return
        with self._one_at_a_time:
            for file in sorted(self.folder.rglob("*")):
                # Those are being written, under another name than they will have.
                if not file.is_file() or file.name.startswith(".") or file.suffix == ".tmp":
                    continue
                status = file.stat()
                version = (status.st_size, status.st_mtime_ns)
                if self._uploaded.get(file) == version:
                    continue
                place = self._place / file.relative_to(self.folder).as_posix()
                with plain_errors(f"could not write {place}"):
                    buckets.write(place, file.read_bytes())
                self._uploaded[file] = version

    def shown(self, text: str) -> str:
        """The text with the bucket's name in the place of the folder's."""
        return text.replace(str(self.folder), str(self._place))

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        *exc_info: object,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._temporary is None:
            return
        if self._thread.ident is not None:
            try:
                self.upload()
            except InputError as error:
                kept = f"{error}; log and metrics are kept in {self.folder}"
                if exception_type is None:
                    raise type(error)(kept) from error
                # The exception that ends the run matters more.
                self._report(kept)
                return
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _keep_up(self) -> None:
        """The thread."""
        rest = SECONDS
        while not self._stop.wait(rest):
            start = time.monotonic()
            try:
                self.upload()
            except InputError as error:
                self._report(f"warning: {error}; it is tried again")
            rest = max(SECONDS, _REST * (time.monotonic() - start))
