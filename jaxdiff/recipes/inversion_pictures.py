"""Pictures with what is learned: along the way, scored where that is asked for, and at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxdiff.io.adapters import at_rank
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import write_overview
from jaxdiff.mesh import any_process, bring_home, own_copy
from jaxdiff.processes import is_leader
from jaxdiff.recipes.best_scored import BestScored
from jaxdiff.recipes.custom_diffusion import Trained
from jaxdiff.recipes.image_score import has_stopped_rising
from jaxdiff.recipes.inversion_parts import InversionParts, prompts_of
from jaxdiff.recipes.text_to_image import make_jobs
from jaxdiff.recipes.text_to_image_report import shrink
from jaxdiff.recipes.textual_inversion import with_trained
from jaxdiff.textual_inversion_settings import InversionSettings

Pictures = list[UInt8[np.ndarray, "H W 3"]]


class PicturesAlong:
    """What the training loop shows at intervals; of several processes the first draws, and all decide alike.

    Attributes:
      best: the scores; None in other processes than the first, and where nothing is scored.
    """

    def __init__(self, parts: InversionParts, training: InversionSettings, out: Path, best: BestScored | None):
        """Write grids into a folder `grids` of `out`."""
        self.best = best
        self._parts, self._training, self._folder = parts, training, out / "grids"

    def show(self, step: int, trained: Any) -> bool:
        """Draw and score what had been learned by a step; return whether that is enough."""
        own = bring_home(trained, self._parts.mesh)
        if is_leader():
            self.draw(step, finished(self._parts, self._training, own))
        return self.enough()

    def draw(self, step: int, trained: Trained) -> None:
        """Write the grid of a step, and its score."""
        pictures = draw_pictures(self._parts, self._training, trained)
        grid = make_grid(pictures, prompts_of(self._parts, self._training), f"Step {step:,}")
        write_overview(self._grid_at(step), grid)
        if self.best is not None and self._parts.score is not None:
            self.best.note(step, self._parts.score(pictures), trained)

    def shown(self, step: int) -> bool:
        """Tell whether that was done before."""
        scored = self.best is None or step in self.best.scores
        return any_process(is_leader() and self._grid_at(step).is_file() and scored, self._parts.mesh)

    def enough(self) -> bool:
        """Tell whether the scores have stopped rising, if that is asked for; say so."""
        patience = self._training.patience
        if patience is None:
            return False
        scores = [] if self.best is None else list(self.best.scores.values())
        stopped = any_process(has_stopped_rising(scores, patience), self._parts.mesh)
        if stopped and self.best is not None:
            print(f"image score: none of the last {patience} is the best; nothing more is learned")
        return stopped

    def _grid_at(self, step: int) -> Path:
        return self._folder / f"step_{step:07d}.png"


def finished(parts: InversionParts, training: InversionSettings, trained: Any) -> dict[str, np.ndarray]:
    """Return averages as they are written, so that what is drawn and scored is what is kept."""
    arrays = {name: np.asarray(leaf) for name, leaf in parts.finish(trained).items()}
    return {n: leaf if n in parts.words else at_rank(leaf, training.adapter_rank) for n, leaf in arrays.items()}


def draw_pictures(parts: InversionParts, training: InversionSettings, trained: Trained) -> Pictures:
    """Draw all texts with what is learned, from the same noises every time, in this process alone."""
    prompts = prompts_of(parts, training)
    learned = {name: jnp.asarray(leaf) for name, leaf in trained.items()}
    params = with_trained(own_copy(parts.frozen), learned, parts.words)
    jobs = make_jobs(prompts, training.sample_images)
    return [pixels for _, pixels in parts.drawing.draw(jobs, prompts, params)]


def make_grid(
    pictures: Sequence[UInt8[np.ndarray, "H W 3"]], prompts: Sequence[str], title: str
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw pictures prompt by prompt."""
    small = np.stack([shrink(picture) for picture in pictures])
    columns = len(pictures) // len(prompts)
    return labelled_grid(
        small, prompts, [str(n) for n in range(columns)], title, style=GridStyle(cell=max(128, *small.shape[1:3]))
    )
