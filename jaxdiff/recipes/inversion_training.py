"""Textual inversion from what is prepared to learned rows, with resume and pictures along the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxdiff.io.adapters import at_rank
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import write_overview
from jaxdiff.io.metrics import METRICS, MetricsLog, read_lines
from jaxdiff.mesh import any_process, bring_home, own_copy, put_batch
from jaxdiff.processes import is_leader
from jaxdiff.recipes.best_scored import BestScored
from jaxdiff.recipes.custom_diffusion import Trained
from jaxdiff.recipes.image_score import has_stopped_rising
from jaxdiff.recipes.inversion_parts import InversionParts, prompts_of
from jaxdiff.recipes.loop import TrainingLoop
from jaxdiff.recipes.text_to_image import make_jobs
from jaxdiff.recipes.text_to_image_report import shrink
from jaxdiff.recipes.textual_inversion import make_inversion_loss, with_trained
from jaxdiff.recipes.timestep_bands import make_check
from jaxdiff.recipes.training import make_train_step
from jaxdiff.textual_inversion_settings import InversionSettings


class Outcome(NamedTuple):
    """What a run ends with.

    Attributes:
      trained: the averages of all that is learned.
      step: after which they were taken: the last one, or with --patience the one of the best score.
    """

    trained: dict[str, np.ndarray]
    step: int


def train(parts: InversionParts, training: InversionSettings, out: Path) -> Outcome:
    """Train from the last good checkpoint, or from step 0, to the end; return what is to be saved."""
    checkpoints = Checkpoints(out / "checkpoints")
    state, start = checkpoints.restore(parts.state) or (parts.state, 0)
    if start:
        print(f"going on from step {start} of {training.train_steps}")
    log = MetricsLog(out, start)
    model, mesh = parts.drawing.model, parts.mesh
    loss_fn = make_inversion_loss(model, parts.words, training.loss_weighting)
    check = make_check(model, parts.words, parts.frozen, parts.check_at, parts.finish, mesh)
    patience, score = training.patience, parts.score
    best = None if score is None else BestScored(out, log, checkpoints, keeping=patience is not None)

    def draw_grid(step: int, trained: Any) -> bool:
        own = bring_home(trained, mesh)
        if is_leader():
            draw(step, own)
        return enough()

    def draw(step: int, trained: Any) -> None:
        finished = kept(trained)
        pixels = draw_pictures(parts, training, finished)
        grid = make_grid(pixels, prompts_of(parts, training), f"Step {step:,}")
        write_overview(grid_at(step), grid)
        if score is not None and best is not None:
            best.note(step, score(pixels), finished)

    def kept(trained: Any) -> dict[str, np.ndarray]:
        # As they are written, so that what is drawn and scored is what is kept.
        finished = {name: np.asarray(leaf) for name, leaf in parts.finish(trained).items()}
        return {n: leaf if n in parts.words else at_rank(leaf, training.adapter_rank) for n, leaf in finished.items()}

    def grid_at(step: int) -> Path:
        return out / "grids" / f"step_{step:07d}.png"

    def drawn(step: int) -> bool:
        scored = best is None or step in best.scores
        return any_process(is_leader() and grid_at(step).is_file() and scored, mesh)

    def enough() -> bool:
        # Only the first process has scores.
        stopped = best is not None and patience is not None and has_stopped_rising(list(best.scores.values()), patience)
        if patience is None or not any_process(stopped, mesh):
            return False
        if best is not None:
            print(
                f"image score: none of the last {patience} is above {best.scores[best.step]:.2f}, that of step "
                f"{best.step}; nothing more is learned"
            )
        return True

    try:
        # The first process's line may be there before another one looks.
        if any_process(is_leader() and not read_lines(out / METRICS), mesh):
            log.write(0, {name: float(value) for name, value in check(parts.state.params).items()})
        train_step = make_train_step(
            loss_fn, parts.optimizer, mesh, training.ema_decay, training.accumulation_steps, frozen=parts.frozen
        )
        held = train_step.bytes_on_device(state, put_batch(parts.batch_at(start), mesh))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.frozen))
        print(f"learning takes {held / 1e9:.2f} GB of a device's memory, {weights / 1e9:.2f} GB of it weights")
        run = TrainingLoop(
            train_step,
            parts.batch_at,
            training,
            mesh,
            checkpoints,
            log,
            parts.learning_rate,
            check,
            draw_grid,
            drawn,
        ).run
        state = state if start < training.train_steps and enough() else run(state)
        step, own = int(state.step), bring_home(state.ema_params, mesh)
        if best is None or not best.keeping:
            return Outcome(kept(own), step)
        if step not in best.scores:
            draw(step, own)
        print(
            f"image score: {best.scores[best.step]:.2f} at step {best.step} is the best of {len(best.scores)}; "
            "what was learned by then is saved"
        )
        return Outcome(best.read(), best.step)
    finally:
        checkpoints.close()
        log.close()


def draw_pictures(
    parts: InversionParts, training: InversionSettings, trained: Trained
) -> list[UInt8[np.ndarray, "H W 3"]]:
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
