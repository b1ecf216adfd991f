"""Figures by training step: metrics.jsonl, and TensorBoard's files beside it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdiff.processes import is_leader

METRICS = "metrics.jsonl"


class MetricsLog:
    """Figures by step in metrics.jsonl and TensorBoard; a resumed log reads like an uninterrupted one.

    Of several processes only the first writes.
    """

    def __init__(self, folder: Path, resumed_step: int):
        """Open the log, forgetting everything after `resumed_step`, which will be done again."""
        self._writes = is_leader()
        if not self._writes:
            return
        from tensorboardX import SummaryWriter  # here, because it imports torch where there is one

        path = folder / METRICS
        kept = [line for line in read_lines(path) if line["step"] <= resumed_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")
        # tensorboardX names a file by the second alone and would overwrite the file of a run stopped within it.
        suffix = f".{resumed_step:09d}"
        board = folder / "tensorboard"
        self._board = SummaryWriter(str(board), purge_step=resumed_step + 1, filename_suffix=suffix)

    def write(self, step: int, figures: Mapping[str, float | int]) -> None:
        """Append figures of one step.

        Raises:
          ValueError: one of them is not finite.
        """
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} at step {step}")
        if not self._writes:
            return
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush and close both files."""
        if self._writes:
            self._file.close()
            self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the logged lines in order, up to the first that is none: a crash may cut the last one short."""
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines
