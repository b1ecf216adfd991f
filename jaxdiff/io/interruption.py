"""Ctrl-C and SIGTERM as a polite request: finish the step, save, leave; the second one leaves at once.

Python runs its handlers between two of its own instructions, and a compiled program may compute for minutes. So a
thread is told of every signal too: it ends a process that is too busy to notice, unless there is work to be saved.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jaxdiff import processes

GRACE = 5.0
"""Seconds that a process without work to save may go on computing after the first signal."""
SAME = 0.5
"""Seconds within which a second signal is the first one again: `timeout` and some schedulers send it twice."""
RESENT_AFTER = 0.1
"""Seconds after which a signal that Python has swallowed is sent again."""
INTERRUPTED = 130
"""Exit code of an interrupted command."""

_watched = threading.Event()
"""Set while a thread is told of every signal."""
_swallowed = threading.Event()
"""Set by a KeyboardInterrupt that Python has swallowed, as it does while it collects garbage."""
_at_stake = threading.Event()
"""Set while there is work that a stop must save first."""


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into `requested`, and restores the old handlers on exit."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _at_stake.clear()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def protect(self) -> None:
        """Say that there is work by now which a stop must save first; before, a stop need not wait for a compiler."""
        _at_stake.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _swallowed.clear()
        if self.requested:
            return  # the thread ends the process, unless it is the first one again
        self.requested = True
        if not _watched.is_set():
            # The system itself obeys the second one, because Python would only do so after the running computation.
            for other in self._previous:
                signal.signal(other, signal.SIG_DFL)
        # Not print: this may run in the middle of another print, which Python's files do not allow.
        os.write(2, b"\nstopping after this step; once more to leave at once\n")


@contextlib.contextmanager
def obey_signals(sentence: str) -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt as Ctrl-C does, and end this process where it is too busy to notice.

    Args:
      sentence: printed before the process is ended with INTERRUPTED, `GRACE` seconds after the first signal.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handler = signal.signal(signal.SIGTERM, _interrupt)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    report = sys.unraisablehook
    _swallowed.clear()

    def raise_again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _swallowed.set()
        else:
            report(unraisable)

    sys.unraisablehook = raise_again
    thread = threading.Thread(target=_watch, args=(reading, threading.get_ident(), sentence), daemon=True)
    thread.start()
    _watched.set()
    try:
        yield
    finally:
        sys.unraisablehook = report
        _watched.clear()
        _swallowed.clear()
        # Until the thread has ended, because it sends SIGTERM, and so that another one does not cut this short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            signal.set_wakeup_fd(before)
            os.close(writing)  # ends the thread
            thread.join()
            os.close(reading)
        finally:
            signal.signal(signal.SIGTERM, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _swallowed.clear()
    raise KeyboardInterrupt


def _watch(reading: int, main: int, sentence: str) -> None:
    """Read the numbers of signals from a pipe until it is closed; end the process where they are not obeyed."""
    first: float | None = None
    sent = -RESENT_AFTER
    own = 0  # signals that come from here
    while True:
        if _swallowed.is_set() and time.monotonic() - sent >= RESENT_AFTER:
            # Again and again until a handler runs, because one that comes just before a sleep does not end it.
            own, sent = own + 1, time.monotonic()
            signal.pthread_kill(main, signal.SIGTERM)
        if select.select([reading], [], [], None if first is None else 0.1)[0]:
            numbers = os.read(reading, 64)
            if not numbers:
                return
            stops = [number for number in numbers if number in (signal.SIGINT, signal.SIGTERM)]
            while own and signal.SIGTERM in stops:
                stops.remove(signal.SIGTERM)
                own -= 1
            if stops and first is None:
                first = time.monotonic()
            elif stops and first is not None and time.monotonic() - first > SAME:
                os._exit(128 + stops[0])
        if first is not None and not _at_stake.is_set() and time.monotonic() - first > GRACE:
            os.write(2, f"\n{sentence}\n".encode())
            processes.fail(INTERRUPTED, sentence)
            os._exit(INTERRUPTED)
