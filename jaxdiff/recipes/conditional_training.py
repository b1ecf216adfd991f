"""Training a conditional diffusion model from a data set to a parameter average, with everything around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdiff import processes
from jaxdiff.errors import InputError
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.datasets import Dataset, Splits, batches
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import write_overview
from jaxdiff.io.metrics import METRICS, MetricsLog, read_lines
from jaxdiff.io.runs import Figures
from jaxdiff.mesh import any_process, put_whole
from jaxdiff.models.classifier import ClassifierConfig
from jaxdiff.recipes.conditional import ConditionalModel, build_conditional_model
from jaxdiff.recipes.evaluation import draw_samples
from jaxdiff.recipes.judge import Judge, load_judge, read_judge_record
from jaxdiff.recipes.loop import TrainingLoop
from jaxdiff.recipes.objective import make_diffusion_loss
from jaxdiff.recipes.sampling import ImageSampler
from jaxdiff.recipes.training import (
    LossFn,
    Stream,
    TrainState,
    create_state,
    image_keys_at,
    make_optimizer,
    make_train_step,
    stream_key,
)
from jaxdiff.settings import DiffusionSettings, TrainingSettings

GRID_COLUMNS = 5
VALIDATION_IMAGES = 512


@dataclass(frozen=True)
class TrainingParts:
    """What is built before the first step."""

    model: ConditionalModel
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    loss_fn: LossFn
    validation_loss_fn: LossFn
    state: TrainState


def build_training(
    data: Dataset,
    preset: str,
    dtype: str,
    diffusion: DiffusionSettings,
    training: TrainingSettings,
    seed: int,
    mesh: Mesh,
) -> TrainingParts:
    """Build model, optimizer, losses and the state at step 0 for the images, classes and domains of `data`."""
    height, width, channels = data.images.shape[1:]
    model = build_conditional_model(
        preset, dtype, diffusion, (height, width, channels), data.class_names, data.domain_names
    )
    optimizer, learning_rate = optimizer_of(training)
    return TrainingParts(
        model,
        optimizer,
        learning_rate,
        make_diffusion_loss(model, diffusion, training, train=True),
        make_diffusion_loss(model, diffusion, training, train=False),
        create_state(
            model.compile_init()(stream_key(seed, Stream.INITIAL)), optimizer, stream_key(seed, Stream.TRAINING), mesh
        ),
    )


def train(
    parts: TrainingParts,
    splits: Splits,
    training: TrainingSettings,
    sampler: ImageSampler,
    sample_batch_size: int,
    seed: int,
    out: Path,
    mesh: Mesh,
) -> tuple[Any, Figures]:
    """Train from the last good checkpoint, or from step 0, to the end; return EMA parameters and figures."""
    checkpoints = Checkpoints(out / "checkpoints")
    state, start = checkpoints.restore(parts.state) or (parts.state, 0)
    if start:
        print(f"going on from step {start} of {training.train_steps}")
    log = MetricsLog(out, start)

    def draw_grid(step: int, ema_params: Any) -> None:
        images = draw_samples(sampler, parts.model, ema_params, GRID_COLUMNS, seed, sample_batch_size, mesh)
        if processes.is_leader():
            write_overview(grid_at(step), side_by_side(parts.model, images, step))

    def grid_at(step: int) -> Path:
        return out / "grids" / f"step_{step:07d}.png"

    try:
        state = TrainingLoop(
            make_train_step(parts.loss_fn, parts.optimizer, mesh, training.ema_decay, training.accumulation_steps),
            batches(splits.train, seed, training.batch_size, processes.index(), processes.count()),
            training,
            mesh,
            checkpoints,
            log,
            parts.learning_rate,
            fixed_validation_loss(
                parts.validation_loss_fn, splits.held_out, mesh, training.batch_size // training.accumulation_steps
            ),
            draw_grid,
            lambda step: any_process(processes.is_leader() and grid_at(step).is_file(), mesh),
        ).run(state)
    finally:
        checkpoints.close()
        log.close()
    return state.ema_params, training_figures(out, parts)


def restore_trained(
    run: Path,
    preset: str,
    dtype: str,
    diffusion: DiffusionSettings,
    training: TrainingSettings,
    which: str,
    mesh: Mesh,
) -> tuple[ConditionalModel, Any, Judge, Figures]:
    """Return model, EMA parameters, judge and the judge's figures of a finished or interrupted run.

    Args and errors are those of `restore_model`.
    """
    model, params, step = restore_model(run, preset, dtype, diffusion, training, which, mesh)
    config = ClassifierConfig(len(model.class_names), len(model.domain_names))
    judge = load_judge(run, config, model.image_shape, mesh)
    print(f"sampling step {step} of {training.train_steps}")
    return model, params, judge, {"training.step": step, **read_judge_record(run).figures}


def restore_model(
    run: Path,
    preset: str,
    dtype: str,
    diffusion: DiffusionSettings,
    training: TrainingSettings,
    which: str,
    mesh: Mesh,
) -> tuple[ConditionalModel, Any, int]:
    """Return model, EMA parameters and step of a finished or interrupted run.

    Args:
      run: folder of train_cfg.
      preset: UNet of the run, and so on from its config.
      dtype: type to compute in.
      diffusion: schedule and prediction.
      training: optimizer, whose state is part of a checkpoint.
      which: "last" or "best" checkpoint.
      mesh: devices.

    Raises:
      InputError: the run has no judge, which knows its classes and domains, or no such checkpoint yet.
    """
    record = read_judge_record(run)
    model = build_conditional_model(
        preset, dtype, diffusion, record.image_shape, record.class_names, record.domain_names
    )
    optimizer, _ = optimizer_of(training)
    like = create_state(model.compile_init()(jax.random.key(0)), optimizer, jax.random.key(0), mesh)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    best = checkpoints.best_step() if which == "best" else None
    if which == "best" and best is None and checkpoints.steps():
        raise InputError(f"{run}: no checkpoint there has a loss on held-out images yet; use --checkpoint last")
    restored = checkpoints.restore(like, best)
    checkpoints.close()
    if restored is None:
        raise InputError(f"{run}: no checkpoint there yet; run train_cfg first")
    return model, restored[0].ema_params, restored[1]


def optimizer_of(training: TrainingSettings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer and learning rate that the settings describe."""
    return make_optimizer(
        training.learning_rate,
        training.warmup_steps,
        training.train_steps,
        training.weight_decay,
        training.clip_norm,
    )


def fixed_validation_loss(
    loss_fn: LossFn, held_out: Dataset, mesh: Mesh, batch_size: int
) -> Callable[[Any], Mapping[str, jax.Array]]:
    """Return the loss on the same held-out images, timesteps and noise every time, so that steps compare.

    Args:
      loss_fn: mean loss of a batch.
      held_out: drawn from anew where it is smaller than `VALIDATION_IMAGES`.
      mesh: devices.
      batch_size: images at once, no more than training itself has in memory.
    """
    batch_at = batches(held_out, 0, batch_size)
    parts = [
        (put_whole(batch_at(k), mesh), image_keys_at(jax.random.key(0), jnp.int32(k), batch_size))
        for k in range(max(1, VALIDATION_IMAGES // batch_size))
    ]
    part_loss = jax.jit(loss_fn)
    return lambda params: {"validation_loss": jnp.mean(jnp.stack([part_loss(params, *part) for part in parts]))}


def side_by_side(model: ConditionalModel, images: np.ndarray, step: int) -> np.ndarray:
    """Draw a few samples of every class, the domains next to each other."""
    per_class = images.shape[2]
    rows = np.concatenate(list(images), axis=1)
    columns = [str(n + 1) for _ in model.domain_names for n in range(per_class)]
    return labelled_grid(
        rows.reshape(-1, *model.image_shape),
        model.class_names,
        columns,
        f"Step {step:,}",
        row_axis="class",
        column_axis=", ".join(model.domain_names) + ": noise",
        style=GridStyle(cell=48),
    )


def training_figures(out: Path, parts: TrainingParts) -> Figures:
    """Return what the log says of the training."""
    lines = read_lines(out / METRICS)
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    checked = [line["validation_loss"] for line in lines if "validation_loss" in line]
    figures: Figures = {"training.parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.state.params))}
    # A finished run that has lost its log is still sampled and judged.
    if rates and losses:
        figures |= {"training.images_per_second": float(np.median(rates)), "training.final_loss": losses[-1]}
    if checked:
        figures["training.final_validation_loss"] = checked[-1]
    return figures
