"""What a person sees in the terminal: plain tables, and edits on their way to rest."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from service.schemas import EditState

# Where there is no terminal there is no width either; rich would assume 80 and break every table.
_WIDTH_WITHOUT_TERMINAL = 150
_SAY_EVERY_S = 15.0


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no highlighting."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, fixed: int = 1) -> Table:
    """A table without lines; the first ``fixed`` columns are never shortened, the others to fit."""
    lines = [["" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        widest = max((len(line[index]) for line in lines), default=0)
        made.add_column(column, no_wrap=True, min_width=widest if index < fixed else None)
    for line in lines:
        made.add_row(*(Text(cell) for cell in line))
    return made


def one_line(text: str) -> str:
    """The text on one line; what a terminal would obey instead of show is shown escaped."""
    spaced = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in spaced)


def ago(seconds: float) -> str:
    """A duration in its largest unit: ``42 s``, ``3 min``, ``5 h``, ``2 d``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


class Follow:
    """Shows edits on their way: one line that changes on a terminal, else a line for each step.

    Attributes:
        seen_at: by edit id and status, the clock's seconds at which that status was first seen.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began = clock()
        self._status = Status("waiting", console=console) if console.is_terminal else None
        self._states: dict[str, EditState] = {}
        self._said = ("", 0.0)
        self.seen_at: dict[tuple[str, str], float] = {}

    def __enter__(self) -> Self:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()
        if self._states:
            self._console.print(self._counts())

    def __call__(self, state: EditState) -> None:
        """Takes note of a state; this is what ``ErrataClient.wait`` calls."""
        self._states[state.id] = state
        self.seen_at.setdefault((state.id, state.status), self._clock())
        if self._status:
            self._status.update(Text(f"{self._counts()}  {_progress(state)}"))
        else:
            self._say(state)

    def _say(self, state: EditState) -> None:
        # Twenty edits move together: one line when the phase changes, and now and then for the loss.
        phase = state.progress.phase if state.progress else state.status
        said, at = self._said
        now = self._clock()
        if phase != said or now - at >= _SAY_EVERY_S:
            self._said = (phase, now)
            self._console.print(f"{now - self._began:5.0f} s  {self._counts()}  {_progress(state)}".rstrip())

    def _counts(self) -> str:
        counts = Counter(state.status.value for state in self._states.values())
        return ", ".join(f"{count} {status}" for status, count in counts.items())


def _progress(state: EditState) -> str:
    if (progress := state.progress) is None:
        return ""
    loss = "" if progress.loss is None else f", epoch {progress.epoch}, loss {progress.loss:.3f}"
    return f"{progress.phase}{loss}, {progress.elapsed_s:.0f} s"
