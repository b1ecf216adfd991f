"""Contrastive training of a small CLIP on the embedded digits and their captions.

    (1)  loss = (H(P, softmax(S)) + H(P^T, softmax(S^T))) / 2,    S[i, j] = exp(logit_scale) cos(image_i, text_j)
    (2)  P[i, j] = 1 / n_i for the n_i captions of the batch that are true of image i, else 0

(1) is CLIP's loss (arXiv 2103.00020, figure 3) over the batch of all devices. With ten classes many captions of a batch
are true of an image; (2) lets all of them count, as UniCL does (arXiv 2204.03610, equation 3).
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxdiff.io import digits
from jaxdiff.io.digit_captions import ANYWHERE, CAPTIONS, CLASS_NAMES, CONTEXT, caption_ids, caption_vocabulary
from jaxdiff.io.digits import SIZE
from jaxdiff.io.preprocess import FILE, Preprocessor
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.runs import write_json
from jaxdiff.io.tokenizer import CLIPTokenizer, write_tokenizer
from jaxdiff.mesh import round_up
from jaxdiff.models.clip import CLIP
from jaxdiff.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jaxdiff.recipes.clip_features import normalize_pixels
from jaxdiff.recipes.pretrained import FlaxCLIPModel
from jaxdiff.recipes.training import (
    LossFn,
    Stream,
    create_state,
    fit,
    make_optimizer,
    make_train_step,
    stream_key,
)

TRAIN_STEPS = 900
BATCH = 128
"""Pairs of a training step, or a few more where they do not split over the devices."""
MAX_LOGIT_SCALE = float(np.log(100))
"""As in arXiv 2103.00020, section 2.5."""
PREPROCESSOR = Preprocessor(SIZE, (SIZE, SIZE), image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25))


class Pairs(NamedTuple):
    """A batch of pictures, each with one caption that is true of it.

    Attributes:
      images: pixels in 0..255.
      labels: class of each picture.
      domains: domain of each picture.
      input_ids: the captions.
      classes: whether each caption is true of each class, (B, classes).
      spoken: domain that each caption names, or `ANYWHERE`.
    """

    images: Any
    labels: Any
    domains: Any
    input_ids: Any
    classes: Any
    spoken: Any


def tiny_config(vocab_size: int, eos_token_id: int) -> CLIPConfig:
    """Return the config of a CLIP that two cores train in two minutes."""
    text = CLIPTextConfig(vocab_size, 64, 128, 64, 2, 2, CONTEXT, bos_token_id=None, eos_token_id=eos_token_id)
    vision = CLIPVisionConfig(96, 256, 64, 3, 4, image_size=SIZE, patch_size=4)
    return CLIPConfig(text, vision, 64)


def tiny_digits_config() -> CLIPConfig:
    """Return the config of tiny-digits, whether it is trained already or not."""
    vocab, merges = caption_vocabulary()
    return tiny_config(len(vocab), CLIPTokenizer(vocab, merges, CONTEXT).pad_id)


def true_pairs(labels: Array, domains: Array, classes: Array, spoken: Array) -> Bool[Array, "B B"]:
    """Tell which captions (second axis) are true of which pictures (first axis); arguments as in `Pairs`."""
    same_domain = (spoken[None, :] == ANYWHERE) | (spoken[None, :] == domains[:, None])
    return classes.T[labels] & same_domain


def contrastive_loss(logits: Float[Array, "B B"], true: Bool[Array, "B B"]) -> Float[Array, ""]:
    """Return equation (1) for logits S of pictures (first axis) against captions."""

    def entropy(logits: Float[Array, "B B"], true: Bool[Array, "B B"]) -> Float[Array, ""]:
        wanted = true / jnp.sum(true, axis=1, keepdims=True)
        return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits, axis=1), axis=1))

    return (entropy(logits, true) + entropy(logits.T, true.T)) / 2


def make_contrastive_loss(model: CLIP) -> LossFn:
    """Return the loss of a batch of `Pairs`."""
    table = PREPROCESSOR.table

    def loss_fn(params: Any, pairs: Pairs, keys: Any) -> jax.Array:
        params = {**params, "logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}
        logits, *_ = model.apply({"params": params}, pairs.input_ids, normalize_pixels(pairs.images, table))
        true = true_pairs(pairs.labels, pairs.domains, pairs.classes, pairs.spoken)
        return contrastive_loss(logits, true)

    return loss_fn


def make_batches(tokenizer: CLIPTokenizer, batch_size: int, seed: int) -> Callable[[int], Pairs]:
    """Return the pairs of any step, a pure function of the seed and the step."""
    images, labels, domains = digits.embedded_digits(held_out=False)
    ids = caption_ids(tokenizer)
    spoken = np.array([domain for _, domain in CAPTIONS], np.int32)
    fitting = [np.flatnonzero((spoken == ANYWHERE) | (spoken == domain)) for domain in range(2)]

    def batch_at(step: int) -> Pairs:
        rng = np.random.default_rng([seed, Stream.TRAINING, step])
        chosen = rng.integers(len(images), size=batch_size)
        caption = np.array([rng.choice(fitting[domain]) for domain in domains[chosen]])
        return Pairs(
            images[chosen],
            labels[chosen],
            domains[chosen],
            ids[caption, labels[chosen]],
            labels[chosen][:, None] == np.arange(len(CLASS_NAMES))[None],
            spoken[caption],
        )

    return batch_at


def train_tiny_clip(num_steps: int, seed: int, mesh: Mesh) -> tuple[CLIPConfig, Any]:
    """Train on the embedded digits; return the config and the averaged parameters."""
    tokenizer = CLIPTokenizer(*caption_vocabulary(), CONTEXT)
    config = tiny_digits_config()
    batch_at = make_batches(tokenizer, round_up(BATCH, mesh), seed)
    return config, train_clip(config, batch_at, num_steps, seed, mesh, "tiny-digits")


def train_clip(
    config: CLIPConfig, batch_at: Callable[[int], Pairs], num_steps: int, seed: int, mesh: Mesh, name: str
) -> Any:
    """Train a small CLIP and return the averaged parameters; `name` stands before the progress bar."""
    model = CLIP(config)
    images = jnp.zeros((1, SIZE, SIZE, 3))
    params = jax.jit(model.init)(stream_key(seed, Stream.INITIAL), batch_at(0).input_ids[:1], images)["params"]
    optimizer, _ = make_optimizer(2e-3, 50, num_steps, 0.05, 1.0)
    state = create_state(params, optimizer, stream_key(seed, Stream.TRAINING), mesh)
    train_step = make_train_step(make_contrastive_loss(model), optimizer, mesh, ema_decay=0.98)
    with progress_bar(num_steps, name, "step") as bar:
        for result in fit(state, train_step, batch_at, num_steps, mesh):
            bar.update()
            state = result.state
            if result.step % 50 == 0:
                bar.set_postfix(loss=f"{float(result.metrics['loss']):.3f}")
    return state.ema_params


def tiny_digits_folder(cache: Path, num_steps: int, mesh: Mesh) -> Path:
    """Return the folder of the trained model, trained now unless an earlier call kept it there.

    It holds what a published model's folder holds, so it is read like one.
    """
    recipe = repr((tiny_config(1, 0), CAPTIONS, BATCH, PREPROCESSOR))
    # Another recipe is another model, which must not be taken for this one.
    folder = cache / f"tiny-digits-{num_steps}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if (folder / FILE).is_file():
        return folder
    print(f"training tiny-digits, a small CLIP of the embedded digits, {num_steps} steps, once; kept in {folder}")
    config, params = train_tiny_clip(num_steps, 0, mesh)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        partial = Path(place) / "model"
        model = FlaxCLIPModel(config, _do_init=False)
        model.save_pretrained(partial, jax.device_get(params), safe_serialization=True)
        write_tokenizer(partial, *caption_vocabulary())
        write_json(partial / FILE, PREPROCESSOR.to_dict())
        # Whole or not at all, and the first of two runs at a time wins.
        if not folder.exists():
            partial.rename(folder)
    return folder
