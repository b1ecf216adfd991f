"""Textual inversion from what is prepared to learned rows, with resume and pictures along the way."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.metrics import METRICS, MetricsLog, read_lines
from jaxdiff.mesh import any_process, bring_home, put_batch
from jaxdiff.processes import is_leader
from jaxdiff.recipes.best_scored import BestScored
from jaxdiff.recipes.inversion_parts import InversionParts
from jaxdiff.recipes.inversion_pictures import PicturesAlong, finished
from jaxdiff.recipes.loop import TrainingLoop
from jaxdiff.recipes.textual_inversion import make_inversion_loss
from jaxdiff.recipes.timestep_bands import make_check
from jaxdiff.recipes.training import TrainState, make_train_step
from jaxdiff.textual_inversion_settings import InversionSettings


class Outcome(NamedTuple):
    """What a run ends with.

    Attributes:
      trained: the averages of all that is learned.
      step: after which they were taken: the last one, or with --patience the one of the best score.
      score: of the pictures then; None where it was not taken.
    """

    trained: dict[str, np.ndarray]
    step: int
    score: float | None


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
    try:
        keeping = training.patience is not None
        best = None if parts.score is None else BestScored(out, log, checkpoints, keeping)
        along = PicturesAlong(parts, training, out, best)
        # The first process's line may be there before another one looks.
        if any_process(is_leader() and not read_lines(out / METRICS), mesh):
            log.write(0, {name: float(value) for name, value in check(parts.state.params).items()})
        train_step = make_train_step(
            loss_fn, parts.optimizer, mesh, training.ema_decay, training.accumulation_steps, frozen=parts.frozen
        )
        held = train_step.bytes_on_device(state, put_batch(parts.batch_at(start), mesh))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.frozen))
        print(f"learning takes {held / 1e9:.2f} GB of a device's memory, {weights / 1e9:.2f} GB of it weights")
        loop = TrainingLoop(
            train_step,
            parts.batch_at,
            training,
            mesh,
            checkpoints,
            log,
            parts.learning_rate,
            check,
            along.show,
            along.shown,
        )
        state = state if start < training.train_steps and along.enough() else loop.run(state)
        return choose_step(parts, training, along, state)
    finally:
        checkpoints.close()
        log.close()


def choose_step(parts: InversionParts, training: InversionSettings, along: PicturesAlong, state: TrainState) -> Outcome:
    """Return the last step, or with --patience that of the best score, which may be the last."""
    step, last = int(state.step), finished(parts, training, bring_home(state.ema_params, parts.mesh))
    best = along.best
    if best is None or not best.keeping:
        return Outcome(last, step, None if best is None else best.scores.get(step))
    if step not in best.scores:
        along.draw(step, last)
    print(
        f"image score: {best.scores[best.step]:.2f} at step {best.step} is the best of {len(best.scores)}; "
        "what had been learned by then is saved"
    )
    return Outcome(best.read(), best.step, best.scores[best.step])
