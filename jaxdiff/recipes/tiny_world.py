"""A complete small world for textual inversion: a Stable Diffusion of the embedded digits that lacks one word.

As in Stable Diffusion (arXiv 2112.10752), a CLIP learns pictures and captions, an autoencoder the pictures, and a
latent UNet to draw what captions say, as CLIP's frozen text transformer reads them: all on the embedded digits.
Captions name nine of the ten digits, or tell the parts of any (`jaxdiff.io.world_captions`). So the model has seen
nines and knows their parts, but no word of it means a nine, until one is learned.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int, UInt8

from jaxdiff.io.digit_captions import CONTEXT
from jaxdiff.io.digits import SIZE, embedded_digits
from jaxdiff.io.images import to_float, write_png
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.runs import write_json
from jaxdiff.io.tokenizer import END, CLIPTokenizer, write_tokenizer
from jaxdiff.io.world_captions import (
    DESCRIBED,
    EMPTY,
    NAMED,
    NUMBERS_OF_PARTS,
    PART_BEFORE_NAME,
    PARTS,
    UNKNOWN,
    UNSPOKEN,
    WORLD_CAPTIONS,
    Caption,
    draw_captions,
    world_vocabulary,
)
from jaxdiff.mesh import round_up
from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from jaxdiff.models.clip import CLIPText
from jaxdiff.models.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from jaxdiff.recipes.contrastive import BATCH as CLIP_BATCH
from jaxdiff.recipes.contrastive import TRAIN_STEPS, Pairs, tiny_config, train_clip
from jaxdiff.recipes.diffusers_scheduler import translate_scheduler
from jaxdiff.recipes.pipeline_folder import INDEX, describe_pipeline
from jaxdiff.recipes.pretrained import FlaxCLIPTextModel
from jaxdiff.recipes.pretrained_diffusion import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from jaxdiff.recipes.stable_diffusion import StableDiffusion
from jaxdiff.recipes.textual_inversion import InversionBatch, encode_pictures, make_latent_loss
from jaxdiff.recipes.training import LossFn, Stream, create_state, fit, make_optimizer, make_train_step, stream_key
from jaxdiff.shapes import ImageKeys

AUTOENCODER_STEPS, DIFFUSION_STEPS, BATCH = 600, 2000, 64
KL_WEIGHT = 1e-4
AUTOENCODER = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, sample_size=SIZE)
UNET = ConditionalUNetConfig(
    sample_size=SIZE // 2,
    block_out_channels=(64, 128),
    attention=(False, True),
    layers_per_block=1,
    num_attention_heads=(4, 4),
    norm_num_groups=16,
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
TINY_WORLD = "tiny-world"
"""What `--model` calls it."""
PICTURES, TEXTS = "pictures", "texts.txt"
"""Five pictures of the digit that has no name, and texts to learn its word from, in the folder."""
STYLE_PICTURES, STYLE_TEXTS = "style_pictures", "style_texts.txt"
"""Five pictures of the second domain, none of them of that digit, and texts to learn its style from."""


class World(NamedTuple):
    """The trained networks: configs and parameters under the names of a pipeline's folder."""

    model: StableDiffusion
    params: dict[str, Any]


def tiny_world_models(dtypes: Mapping[str, DTypeLike]) -> tuple[dict[str, Any], StableDiffusion]:
    """Return the networks by name, without parameters, and the whole; `dtypes` is what each computes in.

    The autoencoder's scale is only known once it is trained.
    """
    vocab, _ = world_vocabulary()
    text = tiny_config(len(vocab), vocab[END]).text_config
    models: dict[str, Any] = {
        "text_encoder": FlaxCLIPTextModel(text, dtype=dtypes["text_encoder"], _do_init=False),
        "unet": FlaxUNet2DConditionModel(
            replace(UNET, cross_attention_dim=text.hidden_size), dtype=dtypes["unet"], _do_init=False
        ),
        "vae": FlaxAutoencoderKL(AUTOENCODER, dtype=dtypes["vae"], _do_init=False),
    }
    text_encoder, unet, vae = (model.module for model in models.values())
    return models, StableDiffusion(text_encoder, unet, vae, *translate_scheduler("the scheduler", SCHEDULER))


def make_autoencoder_loss(module: Autoencoder) -> LossFn:
    """Return squared error plus a little divergence to the standard normal (arXiv 1312.6114, equation 10)."""

    def loss_fn(params: Any, images: Any, keys: ImageKeys) -> jax.Array:
        pixels = to_float(images)
        found: Any = module.apply({"params": params}, pixels, method="encode")
        noise = jax.vmap(lambda key: jax.random.normal(key, found.mean.shape[1:]))(keys)
        latents = found.mean + jnp.exp(0.5 * found.log_variance) * noise
        decoded: Any = module.apply({"params": params}, latents, method="decode")
        divergence = 0.5 * (jnp.square(found.mean) + jnp.exp(found.log_variance) - 1 - found.log_variance)
        return jnp.mean(jnp.square(decoded - pixels)) + KL_WEIGHT * jnp.mean(divergence)

    return loss_fn


class Reader:
    """Token ids of captions, each text read once."""

    def __init__(self, tokenizer: CLIPTokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, captions: Sequence[Caption]) -> Int[np.ndarray, "N L"]:
        """Return one row for each caption."""
        for text in {caption.text for caption in captions} - self._known.keys():
            self._known[text] = self._tokenizer([text], length=CONTEXT).input_ids[0]
        return np.stack([self._known[caption.text] for caption in captions]).astype(np.int32)


def captioned_pictures(read: Reader, batch_size: int, seed: int) -> Callable[[int], Pairs]:
    """Return the pictures and captions of any step that CLIP learns from, a pure function of the seed and the step."""
    images, labels, domains = embedded_digits(held_out=False)

    def batch_at(step: int) -> Pairs:
        chosen, captions = draw_captions(np.random.default_rng([seed, step]), labels, domains, batch_size, empty=0.0)
        classes = np.array([[number in caption.digits for number in range(10)] for caption in captions])
        spoken = np.array([caption.domain for caption in captions], np.int32)
        return Pairs(images[chosen], labels[chosen], domains[chosen], read(captions), classes, spoken)

    return batch_at


def captioned_latents(
    read: Reader, latents: Any, labels: np.ndarray, domains: np.ndarray, batch_size: int, seed: int
) -> Callable[[int], InversionBatch]:
    """Return the captioned latents of any step, a pure function of the seed and the step."""

    def batch_at(step: int) -> InversionBatch:
        chosen, captions = draw_captions(np.random.default_rng([seed, step]), labels, domains, batch_size)
        return InversionBatch(read(captions), latents.mean[chosen], latents.log_variance[chosen])

    return batch_at


def train_world(clip_steps: int, autoencoder_steps: int, diffusion_steps: int, mesh: Mesh) -> World:
    """Train CLIP, autoencoder and UNet on the training part of the embedded digits."""
    images, labels, domains = embedded_digits(held_out=False)
    vocab, merges = world_vocabulary()
    read = Reader(CLIPTokenizer(vocab, merges, CONTEXT))
    config, batch = tiny_config(len(vocab), vocab[END]), round_up(BATCH, mesh)
    clip = train_clip(config, captioned_pictures(read, round_up(CLIP_BATCH, mesh), 5), clip_steps, 0, mesh, "CLIP")
    first, second = jax.random.split(stream_key(0, Stream.INITIAL))
    vae = Autoencoder(AUTOENCODER)

    def pictures_at(step: int) -> np.ndarray:
        return images[np.random.default_rng([1, step]).integers(len(images), size=batch)]

    init = jax.jit(vae.init)(first, jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    vae_params = run(make_autoencoder_loss(vae), init, pictures_at, autoencoder_steps, 2e-3, "autoencoder", mesh)
    text = CLIPText(config.text_config)
    unet = ConditionalUNet(replace(UNET, cross_attention_dim=text.config.hidden_size))
    model = StableDiffusion(text, unet, vae, *translate_scheduler("the scheduler", SCHEDULER))
    latents = encode_pictures(model, {"vae": vae_params}, images, mesh, at_once=256)
    scale = float(1 / np.std(latents.mean))
    model = replace(model, autoencoder=Autoencoder(replace(AUTOENCODER, scaling_factor=round(scale, 5))))
    side, width = UNET.sample_size, text.config.hidden_size
    blank = jnp.zeros((1, side, side, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, CONTEXT, width))
    start = jax.jit(unet.init)(second, *blank)["params"]
    loss_fn = make_latent_loss(model)

    def loss_of_unet(params: Any, batch: InversionBatch, keys: ImageKeys, frozen: Any) -> jax.Array:
        return loss_fn({**frozen, "unet": params}, batch, keys)

    batch_at = captioned_latents(read, latents, labels, domains, batch, 2)
    frozen = {"text_encoder": {"text_model": clip["text_model"]}}
    trained = run(loss_of_unet, start, batch_at, diffusion_steps, 1.5e-3, "diffusion", mesh, frozen)
    return World(model, {**frozen, "unet": trained, "vae": vae_params})


def run(
    loss_fn: LossFn,
    params: Any,
    batch_at: Callable[[int], Any],
    steps: int,
    learning_rate: float,
    name: str,
    mesh: Mesh,
    frozen: Any = None,
) -> Any:
    """Train to the end and return the averaged parameters."""
    optimizer, _ = make_optimizer(learning_rate, 100, steps, 0.01, 1.0)
    state = create_state(params, optimizer, stream_key(0, Stream.TRAINING), mesh)
    train_step = make_train_step(loss_fn, optimizer, mesh, ema_decay=0.995, frozen=frozen)
    with progress_bar(steps, name, "step") as bar:
        for result in fit(state, train_step, batch_at, steps, mesh):
            bar.update()
            state = result.state
            if result.step % 50 == 0:
                bar.set_postfix(loss=f"{float(result.metrics['loss']):.4f}")
    return state.ema_params


def tiny_world_folder(
    cache: Path,
    mesh: Mesh,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    diffusion_steps: int = DIFFUSION_STEPS,
    clip_steps: int = TRAIN_STEPS,
) -> Path:
    """Return the folder of the trained pipeline, trained now unless an earlier call kept it there.

    It holds what a published pipeline's folder holds, so it is read like one.
    """
    captions = WORLD_CAPTIONS, sorted((word, sorted(digits)) for word, digits in PARTS.items())
    shares = NAMED, DESCRIBED, EMPTY, NUMBERS_OF_PARTS, PART_BEFORE_NAME
    recipe = repr((AUTOENCODER, UNET, SCHEDULER, captions, shares, BATCH, CLIP_BATCH, KL_WEIGHT, UNSPOKEN, UNKNOWN))
    steps = f"{clip_steps}-{autoencoder_steps}-{diffusion_steps}"
    folder = cache / f"tiny-world-{steps}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if (folder / INDEX).is_file():
        return folder
    print(f"training the tiny world, a small Stable Diffusion of the embedded digits, once; kept in {folder}")
    world = train_world(clip_steps, autoencoder_steps, diffusion_steps, mesh)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        partial = Path(place) / "world"
        write_world(partial, world)
        # Whole or not at all, and the first of two runs at a time wins.
        if not folder.exists():
            partial.rename(folder)
    return folder


def example_pictures(number: int, style: bool) -> UInt8[np.ndarray, "N H W 3"]:
    """Return pictures to learn from, drawn by a fixed seed: the digit without a name, or other ones in the street."""
    images, labels, domains = embedded_digits(held_out=False)
    fitting = np.flatnonzero((labels != UNSPOKEN) & (domains == 1) if style else (labels == UNSPOKEN) & (domains == 0))
    return images[np.random.default_rng(0).choice(fitting, number, replace=False)]


def write_world(folder: Path, world: World) -> None:
    """Write a folder of diffusers."""
    model, params = world
    parts: dict[str, Any] = {
        "text_encoder": FlaxCLIPTextModel(model.text_encoder.config, _do_init=False),
        "unet": FlaxUNet2DConditionModel(model.unet.config, _do_init=False),
        "vae": FlaxAutoencoderKL(model.autoencoder.config, _do_init=False),
    }
    for part, pretrained in parts.items():
        pretrained.save_pretrained(folder / part, jax.device_get(params[part]), safe_serialization=True)
    for part in ("tokenizer", "scheduler"):
        (folder / part).mkdir()
    for name, style in ((PICTURES, False), (STYLE_PICTURES, True)):
        for number, pixels in enumerate(example_pictures(5, style)):
            write_png(folder / name / f"{number}.png", pixels)
    (folder / TEXTS).write_text("\n".join(text for text, domain in WORLD_CAPTIONS if domain != 1) + "\n")
    (folder / STYLE_TEXTS).write_text(f"{UNKNOWN} in the style of a {{}}.\n")
    write_tokenizer(folder / "tokenizer", *world_vocabulary())
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / INDEX, describe_pipeline(str(SCHEDULER["_class_name"]), ""))
