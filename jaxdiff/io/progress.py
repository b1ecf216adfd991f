"""Progress bars: live on a terminal, a line every ten seconds in a log file."""

import sys

from tqdm import tqdm

from jaxdiff.processes import is_leader


def progress_bar(total: int, doing: str, unit: str, initial: int = 0, leave: bool = True) -> tqdm:
    """Return a bar to `update()`, as a context manager.

    Args:
      total: units until it is full.
      doing: what is done, one word.
      unit: what is counted.
      initial: units done before.
      leave: whether the bar stays on the screen when it is full.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        initial=initial,
        leave=leave,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
        disable=not is_leader(),
    )
