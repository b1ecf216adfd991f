"""Textual inversion from folders of pictures to learned rows, with resume and pictures along the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxdiff.io.cache import cache_folder
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.concept_pictures import Concept, read_concept_pictures, texts_of
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import write_png
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.metrics import METRICS, MetricsLog, read_lines
from jaxdiff.io.provenance import tree_hash
from jaxdiff.mesh import replicated
from jaxdiff.recipes.directional import directional, with_norm
from jaxdiff.recipes.learned_words import TABLE, get_leaf
from jaxdiff.recipes.loop import TrainingLoop
from jaxdiff.recipes.stable_diffusion import Params
from jaxdiff.recipes.text_to_image import TextToImage, make_jobs
from jaxdiff.recipes.text_to_image_model import prepare
from jaxdiff.recipes.text_to_image_report import shrink
from jaxdiff.recipes.textual_inversion import (
    InversionBatch,
    Rows,
    encode_pictures,
    initial_rows,
    make_batches,
    make_inversion_loss,
    with_rows,
)
from jaxdiff.recipes.timestep_bands import make_check
from jaxdiff.recipes.tiny_world import PICTURES, TEXTS, UNKNOWN, tiny_world_folder
from jaxdiff.recipes.training import Stream, TrainState, create_state, make_optimizer, make_train_step, stream_key
from jaxdiff.text2image_settings import LatentModelSettings
from jaxdiff.textual_inversion_settings import InversionSettings


@dataclass(frozen=True)
class InversionParts:
    """What is built before the first step.

    Attributes:
      concepts: to learn.
      drawing: draws pictures; its model has room for the rows, and its tokenizer knows the words.
      frozen: the parameters of the model, which never change.
      batch_at: batch of step k.
      check_at: the same with as many pictures as a step has in memory at once.
      optimizer: of the rows, with its learning rate.
      state: at step 0.
      start: the rows at step 0.
      originals: the pictures of each concept.
      texts: that speak of each concept.
      finish: from averaged rows to those that are kept.
    """

    concepts: Sequence[Concept]
    drawing: TextToImage
    frozen: Params
    batch_at: Callable[[int], InversionBatch]
    check_at: Callable[[int], InversionBatch]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    state: TrainState
    start: Learned
    originals: Sequence[UInt8[np.ndarray, "_ H W 3"]]
    texts: Sequence[list[str]]
    finish: Callable[[Rows], Rows]

    @property
    def words(self) -> list[str]:
        """What is learned, in the order of the rows."""
        return [concept.word for concept in self.concepts]

    @property
    def data(self) -> dict[str, Any]:
        """What the data check of a run's folder keeps: how many pictures and texts each word has, and a hash of all.

        The hash covers the weights too, so that a run cannot go on with others from a folder of the same name.
        """
        pictures = dict(zip(self.words, self.originals))
        texts = {word: np.array(found) for word, found in zip(self.words, self.texts)}
        weights = np.array(self.drawing.about["sha256"])
        return {
            "pictures": {word: len(pixels) for word, pixels in pictures.items()},
            "texts": {word: len(found) for word, found in texts.items()},
            "sha256": tree_hash({"pictures": pictures, "texts": texts, "weights": weights}),
        }

    @property
    def prompts(self) -> list[str]:
        """Texts that show what was learned: two for each word, and one for each pair."""
        found = []
        for concept in self.concepts:
            if concept.kind == "style":
                found += [f"a city in the style of {concept.word}", f"a tree in the style of {concept.word}"]
            else:
                found += [f"a photo of {concept.word}", f"a painting of {concept.word}"]
        for number, one in enumerate(self.concepts):
            for other in self.concepts[number + 1 :]:
                thing, style = (one, other) if one.kind == "object" else (other, one)
                between = "in the style of" if style.kind == "style" else "next to"
                found.append(f"{thing.word} {between} {style.word}")
        return found


def own_concept(training: InversionSettings, mesh: Mesh) -> tuple[list[Concept], InversionSettings]:
    """Return the digit that the tiny world has no name for, and the settings with the texts that it knows.

    Digits are not learned from their mirror images.
    """
    folder = tiny_world_folder(cache_folder(), mesh)
    concept = Concept("<new1>", folder / PICTURES, UNKNOWN)
    templates = training.templates or folder / TEXTS
    prompts = training.sample_prompts or ("a photo of the digit <new1>.", f"a photo of the digit {UNKNOWN}.")
    return [concept], replace(training, templates=templates, flip=False, sample_prompts=prompts)


def prepare_inversion(
    concepts: Sequence[Concept],
    model: LatentModelSettings,
    training: InversionSettings,
    mesh: Mesh,
) -> InversionParts:
    """Read the model, encode the pictures, and build everything that training needs.

    Raises:
      InputError: the model or a concept cannot be read, or they do not fit each other.
    """
    texts = texts_of(concepts, training.templates)
    frozen: list[Params] = []
    first: list[Learned] = []

    def learn(params: Params, tokenizer: Any) -> Learned:
        frozen.append(params)
        first.append(initial_rows(params, tokenizer, concepts, training.vectors_per_token, training.mean_initializer))
        return first[0]

    drawing = prepare(model, training.pictures, mesh, learn)
    size = drawing.size[0]
    views = [read_concept_pictures(concept, size, training.crops, training.seed) for concept in concepts]
    originals = [found[: len(found) // (1 + training.crops)] for found in views]
    for concept, found in zip(concepts, originals):
        kind = "a style" if concept.kind == "style" else "an object"
        print(f"{concept.word}: {len(found)} pictures, learned as {kind} from {concept.initializer!r}")
    if training.flip:
        views = [np.concatenate([found, found[:, :, ::-1]]) for found in views]
    latents = [encode_pictures(drawing.model, drawing.params, pixels, mesh) for pixels in views]
    start, finish, optimizer, learning_rate = choose_optimizer(training, first[0], get_leaf(frozen[0], TABLE))
    whole = training.batch_size
    batch_at, check_at = (
        make_batches(texts, latents, drawing.tokenizer, start, count, training.seed)
        for count in (whole, whole // training.accumulation_steps)
    )
    rows = {word: jnp.asarray(row) for word, row in start.items()}
    return InversionParts(
        concepts,
        drawing,
        jax.device_put(frozen[0], replicated(mesh)),
        batch_at,
        check_at,
        optimizer,
        learning_rate,
        create_state(rows, optimizer, stream_key(training.seed, Stream.TRAINING), mesh),
        start,
        originals,
        texts,
        finish,
    )


def choose_optimizer(
    training: InversionSettings, initial: Learned, table: Any
) -> tuple[Learned, Callable[[Rows], Rows], optax.GradientTransformation, optax.Schedule]:
    """Return where the rows start, what is done with their average, and the optimizer with its learning rate."""
    adamw, learning_rate = make_optimizer(
        training.learning_rate,
        training.warmup_steps,
        training.train_steps,
        training.weight_decay,
        training.clip_norm,
    )
    if not training.fixed_norm:
        return initial, lambda rows: rows, adamw, learning_rate
    norms = np.linalg.norm(np.asarray(table, np.float32), axis=1)
    norm = float(norms[norms > 0].mean())
    start = {word: np.asarray(row) for word, row in with_norm(initial, norm).items()}
    prior = 1e-4 if training.direction_prior is None else training.direction_prior
    # The average of directions lies inside the sphere.
    return start, lambda rows: with_norm(rows, norm), directional(learning_rate, norm, initial, prior), learning_rate


def train(parts: InversionParts, training: InversionSettings, out: Path) -> Learned:
    """Train from the last good checkpoint, or from step 0, to the end; return the averaged rows."""
    checkpoints = Checkpoints(out / "checkpoints")
    state, start = checkpoints.restore(parts.state) or (parts.state, 0)
    if start:
        print(f"going on from step {start} of {training.train_steps}")
    log = MetricsLog(out, start)
    drawing = parts.drawing
    loss_fn = make_inversion_loss(drawing.model, parts.words, training.loss_weighting)
    check = make_check(drawing.model, parts.words, parts.frozen, parts.check_at, parts.finish, drawing.mesh)

    def draw_grid(step: int, rows: Any) -> None:
        pixels = draw_pictures(parts, training, parts.finish(rows))
        write_png(
            out / "grids" / f"step_{step:07d}.png", make_grid(pixels, prompts_of(parts, training), f"Step {step:,}")
        )

    try:
        if not read_lines(out / METRICS):
            log.write(0, {name: float(value) for name, value in check(parts.state.params).items()})
        state = TrainingLoop(
            make_train_step(
                loss_fn,
                parts.optimizer,
                drawing.mesh,
                training.ema_decay,
                training.accumulation_steps,
                frozen=parts.frozen,
            ),
            parts.batch_at,
            training,
            drawing.mesh,
            checkpoints,
            log,
            parts.learning_rate,
            check,
            draw_grid,
        ).run(state)
    finally:
        log.close()
        checkpoints.close()
    return {word: np.asarray(row) for word, row in parts.finish(state.ema_params).items()}


def prompts_of(parts: InversionParts, training: InversionSettings) -> list[str]:
    """Return the texts that are drawn."""
    return list(training.sample_prompts) or parts.prompts


def draw_pictures(parts: InversionParts, training: InversionSettings, rows: Any) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Draw all texts with these rows, from the same noises every time."""
    prompts = prompts_of(parts, training)
    params = with_rows(parts.frozen, {word: jnp.asarray(rows[word]) for word in parts.words})
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
