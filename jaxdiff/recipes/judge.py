"""The judge: a classifier trained on real images that says which class and domain a picture shows.

A judge is only as good as its accuracy on real images that it has never seen, so that figure comes first.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Int, UInt8

from jaxdiff import processes
from jaxdiff.errors import InputError
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.datasets import Batch, Dataset, Splits, batches
from jaxdiff.io.images import to_float
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.runs import Figures, read_json, write_json
from jaxdiff.io.strict_json import decode
from jaxdiff.mesh import put_whole, replicated, round_up
from jaxdiff.models.classifier import Classifier, ClassifierConfig
from jaxdiff.recipes.training import (
    LossFn,
    Stream,
    TrainState,
    create_state,
    fit,
    make_optimizer,
    make_train_step,
    stream_key,
)
from jaxdiff.shapes import ImageKeys

JUDGE = "judge.json"
JUDGE_BATCH = 128
"""Images of a training step of the judge, or a few more where they do not split over the devices."""


class Judge(NamedTuple):
    """A trained classifier."""

    config: ClassifierConfig
    params: Any


class JudgeRecord(NamedTuple):
    """What judge.json says: what the judge tells apart, and how well."""

    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    figures: Figures


class Verdict(NamedTuple):
    """What the judge says of each image."""

    classes: Int[np.ndarray, "N"]
    domains: Int[np.ndarray, "N"]


def make_judge_loss(model: Classifier) -> LossFn:
    """Return the sum of both heads' cross-entropies."""

    def loss_fn(params: Any, batch: Batch, keys: ImageKeys) -> jax.Array:
        class_logits, domain_logits = model.apply(
            {"params": params}, to_float(batch.images), train=True, rngs={"dropout": keys[0]}
        )
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(entropy(class_logits, batch.labels) + entropy(domain_logits, batch.domains))

    return loss_fn


def train_judge(train: Dataset, num_steps: int, batch_size: int, seed: int, mesh: Mesh, directory: Path) -> Judge:
    """Train a judge on the training images, or load the finished one from `directory`."""
    config = ClassifierConfig(len(train.class_names), len(train.domain_names))
    height, width, channels = train.images.shape[1:]
    optimizer, state = initial_judge(config, (height, width, channels), num_steps, seed, mesh)
    checkpoints = Checkpoints(directory, keep_last=1)
    # A damaged judge is trained again rather than mourned: that takes minutes, and the run beside it is untouched.
    restored = checkpoints.restore(state) if processes.from_leader(checkpoints.steps) else None
    if restored is not None and restored[1] == num_steps:
        state = restored[0]
    else:
        step = make_train_step(make_judge_loss(Classifier(config)), optimizer, mesh, ema_decay=0.99)
        batch_at = batches(train, seed, batch_size, processes.index(), processes.count())
        results = fit(state, step, batch_at, num_steps, mesh)
        with progress_bar(num_steps, "judge", "step") as bar:
            for result in results:
                state = result.state
                float(result.metrics["loss"])  # keeps the bar honest: one step at a time
                bar.update()
        checkpoints.save(num_steps, state)
    checkpoints.close()
    return Judge(config, state.ema_params)


def prepare_judge(splits: Splits, num_steps: int, seed: int, mesh: Mesh, run: Path) -> tuple[Judge, Figures]:
    """Train or load a run's judge, measure it on held-out real images, print that, and write judge.json."""
    judge = train_judge(splits.train, num_steps, round_up(JUDGE_BATCH, mesh), seed, mesh, run / "judge")
    held_out = splits.held_out
    verdict = recognise(judge, held_out.images, mesh)
    figures: Figures = {}
    for d, domain in enumerate(held_out.domain_names):
        here = held_out.domains == d
        figures[f"judge.real_accuracy.{domain}"] = float((verdict.classes == held_out.labels)[here].mean())
        figures[f"judge.real_domain_accuracy.{domain}"] = float((verdict.domains == d)[here].mean())
        figures[f"judge.real_images.{domain}"] = int(here.sum())
        print(
            f"judge: {100 * figures[f'judge.real_accuracy.{domain}']:.1f} % of {here.sum():,} held-out real "
            f"{domain} images recognised"
        )
    height, width, channels = held_out.images.shape[1:]
    record = JudgeRecord(held_out.class_names, held_out.domain_names, (height, width, channels), figures)
    if processes.is_leader():
        write_json(run / JUDGE, record._asdict())
    return judge, figures


def read_judge_record(run: Path) -> JudgeRecord:
    """Read a run's judge.json.

    Raises:
      InputError: the run has no judge yet, or the file is not one that `prepare_judge` wrote.
    """
    path = run / JUDGE
    if not path.is_file():
        raise InputError(f"{run}: its judge is not trained yet; run train_cfg again, to the end")
    found = read_json(path)
    try:
        kinds = {"class_names": tuple[str, ...], "domain_names": tuple[str, ...], "image_shape": tuple[int, ...]}
        decoded = {name: decode(kind, found[name], name) for name, kind in kinds.items()}
        figures: Figures = found["figures"]
        for name, value in figures.items():
            decode(float, value, name)
        height, width, channels = decoded.pop("image_shape")
    except (KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: not the record of a judge ({error!r}); run train_cfg again") from error
    return JudgeRecord(**decoded, image_shape=(height, width, channels), figures=figures)


def load_judge(run: Path, config: ClassifierConfig, image_shape: tuple[int, int, int], mesh: Mesh) -> Judge:
    """Load the finished judge of a run.

    Raises:
      InputError: there is none, or it is damaged.
    """
    _, state = initial_judge(config, image_shape, 1, 0, mesh)
    checkpoints = Checkpoints(run / "judge", read_only=True)
    restored = checkpoints.restore(state) if processes.from_leader(checkpoints.steps) else None
    checkpoints.close()
    if restored is None:
        raise InputError(f"{run}: its judge is missing or damaged; run train_cfg again, which trains it")
    return Judge(config, restored[0].ema_params)


def initial_judge(
    config: ClassifierConfig, image_shape: tuple[int, int, int], num_steps: int, seed: int, mesh: Mesh
) -> tuple[optax.GradientTransformation, TrainState]:
    """Return a judge's optimizer and its state at step 0."""
    init_key, train_key = jax.random.split(stream_key(seed, Stream.JUDGE))
    params = Classifier(config).init(init_key, jnp.zeros((1, *image_shape)))["params"]
    optimizer, _ = make_optimizer(2e-3, num_steps // 20, num_steps, weight_decay=0.02, clip_norm=1.0)
    return optimizer, create_state(params, optimizer, train_key, mesh)


def recognise(judge: Judge, images: UInt8[np.ndarray, "N H W C"], mesh: Mesh) -> Verdict:
    """Return the judge's class and domain of every image."""
    model = Classifier(judge.config)
    batch_size = 32 * mesh.size

    def classify(params, pixels):
        logits: Any = model.apply({"params": params}, to_float(pixels))
        return [jnp.argmax(head, axis=-1) for head in logits]

    compiled = jax.jit(classify, out_shardings=replicated(mesh))
    answers = []
    for start in range(0, len(images), batch_size):
        # The last batch is padded to the same size, so that only one program is compiled.
        chosen = np.arange(start, start + batch_size).clip(max=len(images) - 1)
        answers.append([np.asarray(a) for a in compiled(judge.params, put_whole(images[chosen], mesh))])
    classes, domains = (np.concatenate(column)[: len(images)] for column in zip(*answers))
    return Verdict(classes, domains)


def confusion_matrix(
    wanted: Int[np.ndarray, "N"], recognised: Int[np.ndarray, "N"], num_classes: int
) -> Int[np.ndarray, "K K"]:
    """Count images by wanted class (row) and recognised class (column)."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (wanted, recognised), 1)
    return counts


def bootstrap_interval(correct: Bool[np.ndarray, "N M"], seed: int, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean (Efron 1979), resampling rows.

    Rows are what varies independently: here the starting noises, each shared by the M images of its row.
    """
    rng = np.random.default_rng(seed)
    row_means = correct.mean(axis=1)
    means = row_means[rng.integers(0, len(row_means), (resamples, len(row_means)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
