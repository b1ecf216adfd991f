"""Work on a long list, cut into numbered files: what is there is not done again, and processes share what is missing.

    about.json               what the files depend on; with anything else they are made anew
    0000000.safetensors      the arrays of piece 0, the same bytes whichever process wrote them

Killed at any moment and run again, such work goes on where it stopped: a file is there whole or not at all.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.run_lock import hold_folder
from jaxdiff.io.runs import read_json, write_json
from jaxdiff.io.weights import read_safetensors, write_safetensors
from jaxdiff.processes import from_leader, on_leader, own_share

ABOUT = "about.json"


class Shards:
    """The numbered files of one piece of work, in a folder of their own."""

    def __init__(self, folder: Path, about: Callable[[], Mapping[str, Any]], total: int):
        """Open the folder; process 0 first deletes in it what was made from something else.

        Args:
          folder: need not exist.
          about: returns the JSON values that decide every byte of the files; called by process 0 alone.
          total: number of files when all is done.
        """
        self.folder = folder
        self.total = total
        on_leader(lambda: self._clear(about()))

    def _clear(self, about: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        hold_folder(self.folder.parent)
        path = self.folder / ABOUT
        if path.exists() and read_json(path) == json.loads(json.dumps(about)):  # JSON has no tuples
            return
        there = list(self.folder.iterdir())
        if any(not entry.name.startswith(ABOUT) for entry in there) and not path.exists():
            raise InputError(f"{self.folder}: has no {ABOUT}, so it may not be jaxdiff's to empty; remove it")
        # What says whose they are goes last, so that one who is killed here may go on.
        for entry in there:
            if entry != path:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        path.unlink(missing_ok=True)
        write_json(path, about)

    def missing(self) -> Iterator[int]:
        """Yield the numbers of those files that are this process's to make."""
        # The files of a killed run are no even share, so what is missing is shared out, not all numbers.
        absent = from_leader(lambda: [number for number in range(self.total) if not self._path(number).exists()])
        yield from (absent[place] for place in own_share(len(absent)))

    def write(self, number: int, arrays: Mapping[str, Any]) -> None:
        """Write one file."""
        write_safetensors(self._path(number), arrays)

    def read(self) -> dict[str, np.ndarray]:
        """Return the arrays of all files, joined in order, once every process has written its own."""
        parts = [read_safetensors(self._path(number)) for number in range(self.total)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:07d}.safetensors"
