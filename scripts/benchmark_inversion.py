"""Textual inversion beside PyTorch: one training step of the rows of a new word, all else frozen.

Both sides read the same files, written once with random weights, and learn from the same latents and texts; their
losses are compared first. The other side does what diffusers' textual_inversion.py does, with latents known beforehand:
AdamW on the whole table of tokens, of which all but the new rows is put back after each step. Where JAX has an
accelerator, jaxdiff alone is measured, at full size, against the matrix product peak of the same run.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from measuring import Settings, Task, bfloat16_peak, measure

SAMPLE_TFLOP = 1.64
"""Of one picture of 512x512 pixels: the UNet forwards and back, without gradients of its weights, and the texts."""
TINY = {
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "sample_size": 32,
}
FULL = {"cross_attention_dim": 768, "sample_size": 64}
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FULL_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
RATE = 5e-3


@dataclass(frozen=True)
class Inversion(Settings):
    """Time a training step of textual inversion."""

    batch_size: int = 4
    """Pictures of a step."""
    steps: int = 5
    """Steps that are timed together."""
    full: bool = False
    """Stable Diffusion 1's size, at 64x64 latents, which is long work for a CPU; an accelerator always takes it."""


class World(NamedTuple):
    """What both sides learn with.

    Attributes:
      folder: holds the pipeline.
      model: with room for the rows, as `params`, without them.
      rows: where learning starts.
      batch_at: batch k.
    """

    folder: Path
    model: Any
    params: Any
    rows: Any
    batch_at: Callable[[int], Any]


def compare(config: Inversion) -> dict[str, Any]:
    """Run the whole comparison and return its figures under flat names."""
    import jax

    if jax.default_backend() != "cpu":
        return on_accelerator(config)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(config, Path(folder))
        ours, our_loss = make_ours(config, world)
        theirs, their_loss = make_theirs(config, world)
        side = FULL["sample_size"] if config.full else TINY["sample_size"]
        print(f"textual inversion, {side}x{side} latents, batch {config.batch_size}, float32")
        difference = abs(our_loss / their_loss - 1)
        print(f"  relative difference of the two sides' losses of one step: {difference:.1e}")
        images = config.steps * config.batch_size
        rates = measure([Task("jaxdiff", ours, images), Task("eager", theirs, images)], config.repeats)
    for name, rate in rates.items():
        seconds = config.batch_size / rate
        print(f"  {name:8s} {rate:8.3f} pictures/s, {seconds:7.3f} s a step, "
              f"jaxdiff is {rates['jaxdiff'] / rate:.2f} times as fast")  # fmt: skip
    found: dict[str, Any] = {f"inversion.per_second.{name}": rate for name, rate in rates.items()}
    ratio = rates["jaxdiff"] / rates["eager"]
    return found | {"inversion.ratio_to_eager": ratio, "inversion.loss_difference": difference}


def make_world(config: Inversion, folder: Path) -> World:
    """Write a pipeline of random weights; read it; make latents and texts."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from jaxdiff import FlaxStableDiffusionPipeline
    from jaxdiff.io.digit_captions import caption_vocabulary
    from jaxdiff.io.tokenizer import write_tokenizer
    from jaxdiff.models.autoencoder import LatentNormal
    from jaxdiff.recipes.inversion_batches import Source, make_batches
    from jaxdiff.recipes.learned_words import add_words

    torch.manual_seed(0)
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", *caption_vocabulary())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    sizes = FULL_TEXT if config.full else TINY_TEXT
    text = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    vae = AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1)  # fmt: skip
    unet = UNet2DConditionModel(**(FULL if config.full else TINY))
    StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    del unet
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    rows = {"<new1>": np.random.default_rng(0).standard_normal((1, sizes["hidden_size"]), np.float32)}
    model, _ = add_words(pipeline.model, params, pipeline.tokenizer, rows)
    side = model.unet.config.sample_size
    mean = np.random.default_rng(1).standard_normal((5, side, side, 4), np.float32)
    source = Source(["a photo of <new1>", "<new1>"], LatentNormal(mean, np.full_like(mean, -6)))
    batch_at = make_batches([source], pipeline.tokenizer, rows, config.batch_size, seed=0)
    return World(folder, model, params, rows, batch_at)


def make_ours(config: Inversion, world: World) -> tuple[Callable[[], Any], float]:
    """Return what takes some steps, and the loss of the first one."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.mesh import make_mesh, put_batch
    from jaxdiff.recipes.textual_inversion import make_inversion_loss
    from jaxdiff.recipes.training import create_state, make_optimizer, make_train_step

    mesh = make_mesh(1)
    optimizer, _ = make_optimizer(RATE, 1, 10**6, 0.0, 1.0)
    rows = {word: jnp.asarray(row) for word, row in world.rows.items()}
    loss_fn = make_inversion_loss(world.model, list(rows))
    step = make_train_step(loss_fn, optimizer, mesh, 0.99, frozen=world.params)
    state = create_state(rows, optimizer, jax.random.key(0), mesh)
    state, metrics = step(state, put_batch(world.batch_at(0), mesh))
    kept = [state]

    def run():
        state = kept.pop()
        for number in range(config.steps):
            state, metrics = step(state, put_batch(world.batch_at(number), mesh))
        kept.append(jax.block_until_ready(state))
        return metrics

    return run, float(metrics["loss"])


def make_theirs(config: Inversion, world: World) -> tuple[Callable[[], Any], float]:
    """Return the same in PyTorch; its first loss is of the random numbers that jaxdiff drew."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from jaxdiff.recipes.training import image_keys_at

    pipeline = StableDiffusionPipeline.from_pretrained(world.folder)
    encoder, unet = pipeline.text_encoder, pipeline.unet
    for module in (encoder, unet):
        module.requires_grad_(False)
    (rows,) = world.rows.values()
    old = encoder.get_input_embeddings().weight.detach().clone()
    encoder.resize_token_embeddings(len(old) + len(rows), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[: len(old)], table[len(old) :] = old, torch.from_numpy(rows)
    table.requires_grad_(True)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    adam = torch.optim.AdamW([table], lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def loss_of(batch, z, t, eps):
        mean, log_variance = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in batch[1:3])
        x_0 = pipeline.vae.config.scaling_factor * (mean + torch.exp(0.5 * log_variance) * z)
        context = encoder(torch.from_numpy(batch.input_ids).long())[0]
        return torch.nn.functional.mse_loss(unet(scheduler.add_noise(x_0, eps, t), t, context).sample, eps)

    def run():
        for number in range(config.steps):
            batch = world.batch_at(number)
            shape = batch.mean.transpose(0, 3, 1, 2).shape
            adam.zero_grad()
            loss_of(batch, torch.randn(shape), torch.randint(0, 1000, shape[:1]), torch.randn(shape)).backward()
            torch.nn.utils.clip_grad_norm_([table], 1.0)
            adam.step()
            with torch.no_grad():
                table[: len(old)] = old

    batch = world.batch_at(0)
    keys = image_keys_at(jax.random.key(0), jnp.int32(0), config.batch_size)
    key_z, key_t, key_eps = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    z, eps = (np.array(jax.vmap(lambda key: jax.random.normal(key, batch.mean.shape[1:]))(k)) for k in (key_z, key_eps))
    t = np.array(jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(key_t))
    z, eps = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (z, eps))
    with torch.no_grad():
        first = loss_of(batch, z, torch.from_numpy(t).long(), eps).item()
    return run, first


def on_accelerator(config: Inversion) -> dict[str, Any]:
    """Time the full size in bfloat16, as a share of the peak, and the seconds until the first step is done."""
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
    from jaxdiff.models.clip import CLIPText
    from jaxdiff.models.clip_config import CLIPTextConfig
    from jaxdiff.models.conditional_unet import ConditionalUNet, ConditionalUNetConfig
    from jaxdiff.recipes.diffusers_scheduler import translate_scheduler
    from jaxdiff.recipes.learned_words import TABLE, get_leaf, set_leaf
    from jaxdiff.recipes.stable_diffusion import StableDiffusion, choose_attention
    from jaxdiff.recipes.textual_inversion import InversionBatch
    from jaxdiff.recipes.tiny_stable_diffusion import SCHEDULER

    half = jnp.bfloat16
    text = CLIPTextConfig(vocab_size=49409, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    unet, encoder = ConditionalUNet(ConditionalUNetConfig(), half), CLIPText(text, dtype=half)
    scheduler = translate_scheduler("the scheduler", SCHEDULER)
    model, chosen = choose_attention(StableDiffusion(encoder, unet, Autoencoder(AutoencoderConfig(), half), *scheduler))
    print(chosen)
    key, ids = jax.random.key(0), jnp.zeros((1, 77), jnp.int32)
    shapes = {
        "unet": jax.eval_shape(
            unet.init, key, jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, 768))
        ),
        "text_encoder": jax.eval_shape(encoder.init, key, ids),
    }
    # Small normal numbers, so that nothing overflows; speed does not depend on them.
    draw = jax.jit(lambda: jax.tree.map(lambda leaf: 0.02 * jax.random.normal(key, leaf.shape, half), shapes))
    params = {part: tree["params"] for part, tree in draw().items()}
    params = set_leaf(params, TABLE, get_leaf(params, TABLE)[:-1])
    count = config.batch_size
    mean = np.random.default_rng(0).standard_normal((count, 64, 64, 4), np.float32)
    batch = InversionBatch(np.full((count, 77), 49408, np.int32), mean, np.full_like(mean, -6))
    started = time.perf_counter()
    world = World(Path(), model, params, {"<new1>": 0.02 * np.ones((1, 768), np.float32)}, lambda k: batch)
    ours, _ = make_ours(config, world)
    compiled = time.perf_counter() - started
    rate = measure([Task("jaxdiff", ours, config.steps * count)], config.repeats)["jaxdiff"]
    peak = bfloat16_peak()
    share = rate * SAMPLE_TFLOP * 1e12 / peak
    print(f"batch {count}: {rate:.1f} pictures/s, {share:.0%} of the peak; 12,000 in {12000 / rate:.0f} s, "
          f"and {compiled:.0f} s until the first step is done")  # fmt: skip
    return {
        "inversion.per_second.jaxdiff": rate,
        "inversion.share_of_peak": share,
        "inversion.seconds_to_first_step": compiled,
        "peak_tflops": peak / 1e12,
    }
