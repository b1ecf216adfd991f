"""The training loop of a command: progress, metrics, checkpoints, resume, a clean stop, and no NaN saved."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdiff.errors import InputError, InterruptedRun
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.interruption import StopRequest
from jaxdiff.io.metrics import MetricsLog
from jaxdiff.io.progress import progress_bar
from jaxdiff.mesh import AgreedStop, any_process
from jaxdiff.recipes.training import StepResult, TrainState, find_not_finite, fit
from jaxdiff.settings import OptimizationSettings


@dataclass
class TrainingLoop:
    """Everything around `fit`; `run` is the loop itself.

    Attributes:
      train_step: from `make_train_step`.
      batch_at: batch of step k, a pure function of k.
      settings: number of steps, images of a batch, intervals.
      mesh: devices.
      checkpoints: where states go.
      log: where figures go.
      learning_rate: step -> rate, for the log.
      validate: EMA parameters -> figures on fixed images, "validation_loss" among them, or None.
      sample: (step, EMA parameters) -> whether to end here, draws pictures along the way; or None.
      sampled: step -> whether `sample` was done there, the same in all processes: not where a run was stopped in it;
        None means that nobody asks.
    """

    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batch_at: Callable[[int], Any]
    settings: OptimizationSettings
    mesh: Mesh
    checkpoints: Checkpoints
    log: MetricsLog
    learning_rate: Callable[[int], Any]
    validate: Callable[[Any], Mapping[str, jax.Array]] | None
    sample: Callable[[int, Any], bool | None] | None
    sampled: Callable[[int], bool] | None = None

    def run(self, state: TrainState) -> TrainState:
        """Train to the last step, or until `sample` says that it is enough; return the final state, saved.

        Raises:
          InputError: the loss, its gradient or a parameter is not finite; nothing bad has been saved.
          InterruptedRun: Ctrl-C or SIGTERM; the state has been saved.
        """
        start = int(state.step)
        sample = self._sampler_at(start)
        if start and sample and self.sampled and not self.sampled(start) and sample(start, state.ema_params):
            return state
        results = fit(state, self.train_step, self.batch_at, self.settings.train_steps, self.mesh)
        bar = progress_bar(self.settings.train_steps, "training", "step", start)
        with StopRequest() as request, bar:
            stop = AgreedStop(lambda: request.requested, self.mesh)
            for result, figures in self._with_figures(results, bar):
                request.protect()
                state = result.state
                last = result.step == self.settings.train_steps
                due = result.step % self.settings.save_every == 0 or last
                stop.ask()
                # Logged before it is saved, so that a run killed in between does not lose the line.
                if figures:
                    self.log.write(result.step, figures)
                saving = due or stop.requested
                if saving:
                    self._save(result, validate=due)
                # A picture takes longer than whoever stops a run may wait.
                sample = self._sampler_at(result.step)
                if sample and not stop.requested:
                    enough = sample(result.step, state.ema_params)
                    if enough and not saving:
                        self._save(result, validate=True)
                    if enough:
                        break
                if stop.requested:
                    if not saving:
                        self._save(result, validate=False)
                    self.checkpoints.wait()
                    raise InterruptedRun(
                        f"stopped and saved at step {result.step} of {self.settings.train_steps}; "
                        "run the same command again to go on"
                    )
            self.checkpoints.wait()
            # In the last step, or while the last checkpoint was written.
            if any_process(request.requested, self.mesh):
                raise InterruptedRun("trained to the end and saved; run the same command again for what follows")
        return state

    def _sampler_at(self, step: int) -> Callable[[int, Any], bool | None] | None:
        """Return `sample` where pictures are due; those after the last step are not its."""
        return self.sample if step % self.settings.sample_every == 0 and step < self.settings.train_steps else None

    def _with_figures(self, results: Iterator[StepResult], bar: tqdm) -> Iterator[tuple[StepResult, dict[str, float]]]:
        """Pair each result with the figures to log at its step (most often none), having checked the last one."""
        unread: list[tuple[int, dict[str, jax.Array]]] = []
        losses: list[float] = []
        norms: list[float] = []
        since = time.perf_counter()
        for result in results:
            unread.append((result.step, result.metrics))
            logged = result.step % self.settings.log_every == 0 or result.step == self.settings.train_steps
            # One step is left unread so that the device is never waited for, except when its figures are due.
            while len(unread) > (0 if logged else 1):
                loss, norm = self._read(*unread.pop(0))
                losses.append(loss)
                norms.append(norm)
            bar.update()
            figures = {}
            if logged:
                now = time.perf_counter()
                rate = len(losses) * self.settings.batch_size / (now - since)
                figures = {
                    "loss": float(np.mean(losses)),
                    "gradient_norm": float(np.mean(norms)),
                    "learning_rate": float(self.learning_rate(result.step - 1)),
                    "images_per_second": rate,
                }
                bar.set_postfix_str(f"loss {figures['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                since, losses, norms = now, [], []
            yield result, figures

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> tuple[float, float]:
        """Wait for a step's loss and gradient norm and check that both are finite."""
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        self._require_finite(step, {"loss": loss, "gradient norm": norm})
        return loss, norm

    def _require_finite(self, step: int, figures: dict[str, float]) -> None:
        """Raise InputError, naming the step and the last good checkpoint, unless all figures are finite."""
        if not all(map(math.isfinite, figures.values())):
            raise self._diverged(step, ", ".join(f"{name} {value}" for name, value in figures.items()))

    def _diverged(self, step: int, what: str) -> InputError:
        good = self.checkpoints.steps()
        return InputError(
            f"training diverged at step {step}: {what}. "
            + (f"The last good checkpoint is step {good[-1]}. " if good else "Nothing was saved. ")
            + "Try a lower --learning-rate or --clip-norm"
        )

    def _save(self, result: StepResult, validate: bool) -> None:
        """Save a state whose numbers are all finite, with its validation loss where one is due."""
        self._read(result.step, result.metrics)
        # Loss and gradient are those before the update, which may itself have gone too far.
        if leaf := find_not_finite(result.state):
            raise self._diverged(result.step, f"{leaf} is not finite")
        loss = None
        if validate and self.validate is not None:
            figures = {name: float(value) for name, value in self.validate(result.state.ema_params).items()}
            self._require_finite(result.step, {name.replace("_", " "): value for name, value in figures.items()})
            self.log.write(result.step, figures)
            loss = figures["validation_loss"]
        self.checkpoints.save(result.step, result.state, loss)
