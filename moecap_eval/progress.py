"""Progress of a run on a terminal, or as plain lines where there is none."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moecap_eval import runner


class RunDisplay:
    """Shows slots done, the arm at work, elapsed time and the time still to go.

    The estimate is the mean time of the slots finished so far in this process, without loading the arms.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._spent_s = 0.0
        self._finished = 0
        self._slot_began_s: float | None = None
        self._done = -1
        self._last_line = ""

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("slots"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("preparing", total=None, eta="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: runner.Progress) -> None:
        """Take in one event of the runner."""
        now_s = time.monotonic()
        if event.done > self._done >= 0 and self._slot_began_s is not None:
            self._spent_s += now_s - self._slot_began_s
            self._finished += 1
        self._slot_began_s = now_s
        self._done = event.done
        eta = self._eta(event.total - event.done)
        text = f"{event.arm}: {event.phase}" if event.arm else event.phase
        if event.phase.startswith("failed"):
            self._console.print(text, markup=False, highlight=False)
        elif self._bar is not None:
            self._bar.update(
                self._task, description=text, completed=event.done, total=event.total or None, eta=eta
            )
        elif text != self._last_line and not text.endswith("done"):
            self._console.print(
                f"[{event.done}/{event.total}] {text}{f', {eta}' if eta else ''}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self._last_line = text

    def _eta(self, left: int) -> str:
        if not self._finished or not left:
            return ""
        seconds = round(left * self._spent_s / self._finished)
        return f"about {seconds // 60}:{seconds % 60:02d} to go"
