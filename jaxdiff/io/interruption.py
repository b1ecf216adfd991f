"""Ctrl-C and SIGTERM as a polite request: finish the step, save, leave; the second one leaves at once."""

import os
import signal
from types import FrameType


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
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # The system itself obeys the second one, because Python would only do so after the running computation.
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)
        # Not print: this may run in the middle of another print, which Python's files do not allow.
        os.write(2, b"\nstopping after this step; once more to leave at once\n")
