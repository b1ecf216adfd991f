"""What textual inversion needs before its first step: the model, the pictures, the rows, and their optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdiff.errors import InputError
from jaxdiff.io.cache import cache_folder
from jaxdiff.io.concept_pictures import Concept, texts_of
from jaxdiff.io.digit_captions import CONTEXT
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.io.world_captions import UNKNOWN, world_vocabulary
from jaxdiff.mesh import own_mesh, replicated
from jaxdiff.processes import count, index, is_leader, leader_first
from jaxdiff.recipes.custom_diffusion import Trained, base_hash, split_trained, zero_deltas
from jaxdiff.recipes.directional import directional, with_norm
from jaxdiff.recipes.image_score import Pictures, make_image_score, prompts_by_word
from jaxdiff.recipes.inversion_batches import make_batches
from jaxdiff.recipes.inversion_data import InversionData, read_data
from jaxdiff.recipes.learned_words import TABLE, first_rows, get_leaf
from jaxdiff.recipes.stable_diffusion import Params
from jaxdiff.recipes.text_to_image import TextToImage
from jaxdiff.recipes.text_to_image_model import check_said, prepare, read_all_learned
from jaxdiff.recipes.textual_inversion import (
    InversionBatch,
    initial_rows,
)
from jaxdiff.recipes.tiny_world import PICTURES, TEXTS, tiny_world_folder
from jaxdiff.recipes.training import Stream, TrainState, create_state, make_optimizer, stream_key
from jaxdiff.recipes.value_adapters import give_values, zero_values
from jaxdiff.recipes.zeroshot import place_of
from jaxdiff.text2image_settings import LatentModelSettings
from jaxdiff.textual_inversion_settings import InversionSettings


@dataclass(frozen=True)
class InversionParts:
    """What is built before the first step.

    Attributes:
      concepts: to learn.
      drawing: draws pictures; its model has room for the rows, and its tokenizer knows the words.
      frozen: the parameters of the model, which never change.
      mesh: of all processes; `drawing` has that of this one alone.
      batch_at: this process's share of the batch of step k.
      check_at: a whole batch k of as many pictures as a step has in memory at once.
      optimizer: of what is learned, with the learning rate of the rows.
      state: at step 0.
      start: the rows at step 0.
      data: the pictures and texts.
      finish: from averages to what is kept.
      base: hash of the model, where an adapter is learned.
      score: of pictures along the way, or None.
    """

    concepts: Sequence[Concept]
    drawing: TextToImage
    mesh: Mesh
    frozen: Params
    batch_at: Callable[[int], InversionBatch]
    check_at: Callable[[int], InversionBatch]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    state: TrainState
    start: Learned
    data: InversionData
    finish: Callable[[Trained], Trained]
    base: str
    score: Callable[[Pictures], float] | None = None

    @property
    def words(self) -> list[str]:
        """What is learned, in the order of the rows."""
        return [concept.word for concept in self.concepts]

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
    folder = tiny_world_folder(cache_folder(), own_mesh(mesh))
    concept = Concept("<new1>", folder / PICTURES, UNKNOWN)
    templates = training.templates or (str(folder / TEXTS),)
    prompts = training.sample_prompts or ("a photo of the digit <new1>.", f"a photo of the digit {UNKNOWN}.")
    return [concept], replace(training, templates=templates, flip=False, sample_prompts=prompts)


def check_tiny_world(concepts: Sequence[Concept], model: LatentModelSettings) -> None:
    """Raise InputError where a concept starts from words that the tiny world has not, before it is trained for it."""
    tokenizer, learned = CLIPTokenizer(*world_vocabulary(), CONTEXT), read_all_learned(model)
    for concept in concepts:
        for word in concept.initializer.split():
            if word not in learned and tokenizer([word]).attention_mask.sum() != 3:
                raise InputError(
                    f"--concept {concept.word}: tiny-world, the model unless --model names another, only knows digits, "
                    f"and has no token for {word!r}"
                )


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
    texts = [text for speaks in texts_of(concepts, training.templates) for text in speaks]
    texts += [*training.sample_prompts, *(concept.initializer for concept in concepts), *training.prior]
    learning = {concept.word: np.zeros((training.vectors_per_token, 1)) for concept in concepts}
    check_said(model, texts, learning)
    given = read_all_learned(model)
    if training.score_model is not None and training.sample_prompts:
        prompts_by_word(list(learning), training.sample_prompts, given | learning)
    known = sum(map(len, given.values()))
    frozen: list[Params] = []
    first: list[Learned] = []
    base: list[str] = []

    def learn(params: Params, tokenizer: Any, learned: Learned) -> Learned:
        # New rows follow those of the tokens, where some tables have more.
        frozen.append(first_rows(params, tokenizer.vocab_size))
        if training.matrices_learning_rate is not None:
            base.append(base_hash(params, tokenizer.vocab_size - known))
        vectors, mean = training.vectors_per_token, training.mean_initializer
        first.append(initial_rows(params, tokenizer, concepts, learned, vectors, mean))
        return first[0]

    drawing = leader_first(lambda: prepare(model, training.pictures, own_mesh(mesh), learn))
    deltas = first_deltas(frozen[0], list(first[0]), training)
    if training.value_learning_rate is not None:
        drawing = replace(drawing, model=give_values(drawing.model, drawing.tokenizer, first[0]))
    data = read_data(concepts, training, drawing)
    start, finish, optimizer, learning_rate = choose_optimizer(training, first[0], get_leaf(frozen[0], TABLE))
    whole, tokenizer, learned = training.batch_size, drawing.tokenizer, drawing.learned
    weight = 1.0 if training.prior_weight is None else training.prior_weight
    parts = InversionParts(
        concepts,
        drawing,
        mesh,
        jax.device_put(frozen[0], replicated(mesh)),
        make_batches(data.concepts, tokenizer, learned, whole, training.seed, data.priors, weight, index(), count()),
        make_batches(data.concepts, tokenizer, learned, whole // training.accumulation_steps, training.seed),
        optimizer,
        learning_rate,
        create_state(
            {name: jnp.asarray(leaf) for name, leaf in (start | deltas).items()},
            optimizer,
            stream_key(training.seed, Stream.TRAINING),
            mesh,
        ),
        start,
        data,
        finish,
        base[0] if base else "",
    )
    remedy = "give the word fewer --vectors-per-token"
    drawing.tokenize(prompts_of(parts, training), remedy)  # refuses now what could not be drawn at the end
    if training.score_model is None:
        return parts
    place = place_of(training.score_model, None, drawing.mesh)
    if not is_leader():
        return parts
    score = make_image_score(
        place, parts.words, data.originals, prompts_of(parts, training), drawing.learned, drawing.mesh
    )
    if training.patience is not None:
        # Else a run could go on with the scores of another CLIP.
        both = {"data": np.array(data.about["sha256"]), "score_model": np.array(score.sha256)}
        data = data._replace(about={**data.about, "sha256": tree_hash(both)})
    return replace(parts, score=score.of, data=data)


def first_deltas(params: Params, words: Sequence[str], training: InversionSettings) -> dict[str, np.ndarray]:
    """Return the matrices that are learned, which change nothing yet; `params` may be shapes."""
    if training.value_learning_rate is not None:
        return zero_values(params, words)
    return zero_deltas(params) if training.kv_learning_rate is not None else {}


def choose_optimizer(
    training: InversionSettings, initial: Learned, table: Any
) -> tuple[Learned, Callable[[Trained], Trained], optax.GradientTransformation, optax.Schedule]:
    """Return where the rows start, what is done with averages, and the optimizer with the learning rate to log.

    It is that of the rows, or, where they stay as they are, that of the matrices.
    """

    def adamw(rate: float) -> tuple[optax.GradientTransformation, optax.Schedule]:
        steps = training.warmup_steps, training.train_steps
        return make_optimizer(rate, *steps, training.weight_decay, training.clip_norm)

    def beside(rows: optax.GradientTransformation, matrices: optax.GradientTransformation):
        kinds = {"rows": rows, "matrices": matrices}
        return optax.multi_transform(
            kinds, lambda trained: {name: "rows" if name in initial else "matrices" for name in trained}
        )

    if training.value_learning_rate is not None:
        optimizer, learning_rate = adamw(training.value_learning_rate)
        # The average of what does not move is rounded.
        return initial, lambda trained: {**trained, **initial}, beside(optax.set_to_zero(), optimizer), learning_rate
    optimizer, learning_rate = adamw(training.learning_rate)
    start, finish = initial, lambda trained: trained
    if training.fixed_norm:
        norms = np.linalg.norm(np.asarray(table, np.float32), axis=1)
        norm = float(norms[norms > 0].mean())
        start = {word: np.asarray(row) for word, row in with_norm(initial, norm).items()}
        prior = 1e-4 if training.direction_prior is None else training.direction_prior
        optimizer = directional(learning_rate, norm, initial, prior)

        def finish(trained: Trained) -> Trained:
            # The average of directions lies inside the sphere.
            rows, deltas = split_trained(trained, list(initial))
            return {**with_norm(rows, norm), **deltas}

    if training.kv_learning_rate is not None:
        optimizer = beside(optimizer, adamw(training.kv_learning_rate)[0])
    return start, finish, optimizer, learning_rate


def prompts_of(parts: InversionParts, training: InversionSettings) -> list[str]:
    """Return the texts that are drawn."""
    return list(training.sample_prompts) or parts.prompts
