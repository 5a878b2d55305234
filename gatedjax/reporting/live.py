"""A live bar at the foot of a terminal: where the run is, and what it is doing."""

from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

REFRESHES_PER_SECOND = 4


class LiveBar:
    """Steps done of all steps, a line of text, and the time since the start.

    A thread redraws it, so that showing a step costs next to nothing. Lines are printed above it.
    """

    def __init__(self, total_steps: int, out: Any):
        """Draws nothing yet.

        Args:
          total_steps: the last step of the run.
          out: the stream of a terminal.
        """
        self.out = out
        self._progress = Progress(
            BarColumn(bar_width=16),
            # The text of a run may hold brackets, which are no markup.
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=RichConsole(file=out, force_terminal=True, highlight=False),
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total_steps)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        """Removes the bar; the lines above it stay."""
        self._progress.stop()

    def show(self, text: str, step: int | None = None) -> None:
        """From the next time that the bar is drawn.

        Args:
          text: beside the bar.
          step: how many steps are done; None leaves it.
        """
        self._progress.update(self._task, description=text, completed=step)

    def say(self, line: str) -> None:
        """A line above the bar."""
        # Not wrapped: a terminal that is made wider shows the line as it was printed.
        self._progress.console.print(Text(line), soft_wrap=True)
