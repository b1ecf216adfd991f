"""What had been learned at the best image score so far, in files beside the checkpoints.

A checkpoint holds what is being learned, which by its time may have passed its best. So whatever scores above all
before it is kept in a file of its own, written before its score is logged; of each checkpoint the best until there is
kept. Wherever a killed run is taken up, the best of the steps until there is at hand.
"""

from pathlib import Path

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.metrics import METRICS, MetricsLog, read_lines
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.runs import BEST_SCORED
from jaxdiff.io.weights import TensorFile, write_safetensors
from jaxdiff.recipes.custom_diffusion import Trained

SCORE, DIGEST = "image_score", "sha256"
OWN = "step_[0-9]*.safetensors*"
"""Names of its files, those that a killed run left half written among them."""


class BestScored:
    """The scores of a run by step and, where that is asked for, what had been learned at the best.

    Of several processes only the first has scores and files.

    Attributes:
      scores: by step, in their order.
      keeping: whether what was learned is kept.
    """

    def __init__(self, out: Path, log: MetricsLog, checkpoints: Checkpoints, keeping: bool):
        """Take up the scores that are logged, and forget what was kept of other steps: those will be done again.

        Raises:
          InputError: what was learned at the best of them is no longer there.
        """
        self.keeping = keeping
        self._folder, self._log, self._checkpoints = out / BEST_SCORED, log, checkpoints
        lines = read_lines(out / METRICS)
        self.scores: dict[int, float] = {line["step"]: line[SCORE] for line in lines if SCORE in line}
        if keeping:
            self._keep_only(set(self.scores))
        if keeping and self.scores:
            self.read()

    @property
    def step(self) -> int:
        """The step of the best score, of several the first."""
        return self._best_until(max(self.scores))

    def note(self, step: int, score: float, trained: Trained) -> None:
        """Log the score of a step, having kept what was learned if it is above all before; once for each step."""
        if step in self.scores:
            return
        if self.keeping and score > max(self.scores.values(), default=-np.inf):
            self._folder.mkdir(exist_ok=True)
            arrays = {name: np.asarray(leaf) for name, leaf in trained.items()}
            write_safetensors(self._file(step), arrays, {DIGEST: tree_hash(arrays)})
        self._log.write(step, {SCORE: score})
        self.scores[step] = score
        if self.keeping:
            # A run goes on from a checkpoint, with the scores until there.
            ends = [*self._checkpoints.steps(), step]
            self._keep_only({self._best_until(end) for end in ends if end >= min(self.scores)})

    def read(self) -> dict[str, np.ndarray]:
        """Return what had been learned at the best score.

        Raises:
          InputError: its file is not there, or damaged.
        """
        path = self._file(self.step)
        remedy = "restore it, or start over with --resume never"
        if not path.is_file():
            raise InputError(f"{path}: missing, though the step scored best of this run: {remedy}")
        file = TensorFile(path)
        trained = dict(file)
        if file.metadata.get(DIGEST) != tree_hash(trained):
            raise InputError(f"{path}: has changed since it was written: {remedy}")
        return trained

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step:07d}.safetensors"

    def _best_until(self, end: int) -> int:
        """Return the step of the best score up to a step, of several the first."""
        return max((step for step in self.scores if step <= end), key=self.scores.__getitem__)

    def _keep_only(self, steps: set[int]) -> None:
        """Delete what was kept of other steps."""
        kept = {self._file(step) for step in steps}
        for path in self._folder.glob(OWN):
            if path not in kept:
                path.unlink()
