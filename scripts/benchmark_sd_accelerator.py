"""Stable Diffusion 1 at full size on an accelerator, in bfloat16 with random weights, beside diffusers' PyTorch.

A guided step is one evaluation of the UNet on a doubled batch, guidance and DDIM's arithmetic. The other side runs in a
process of its own: eager, and compiled with CUDA graphs. Shares are of the matrix products of the same run.

    python scripts/benchmark_sd_accelerator.py 1 16     # PyTorch's side alone, at these batches
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from measuring import bfloat16_peak, seconds_of

UNET_TFLOP = 0.8033
"""Operations of one evaluation of Stable Diffusion 1's UNet at 64x64 latents, as PyTorch's counter has them."""
STEPS = 50
IMAGE_TFLOP = STEPS * 2 * UNET_TFLOP + 2.5145
"""Of one picture of 512x512 pixels: the guided steps and the decoder."""
SCALE = 7.5


def on_accelerator(batches: tuple[int, ...], repeats: int, twin: bool) -> dict[str, Any]:
    """Time guided steps and whole pictures at growing batches, until memory ends; `twin` adds PyTorch's side."""
    results: dict[str, Any] = {}
    if twin:
        command = [sys.executable, __file__, *map(str, batches)]
        theirs = subprocess.run(command, capture_output=True, text=True)
        if theirs.returncode:
            print(f"PyTorch's side failed: {theirs.stderr.strip().splitlines()[-1]}")
        else:
            results |= json.loads(theirs.stdout.splitlines()[-1])
    peak = bfloat16_peak()
    results["peak_tflops"] = peak / 1e12
    print(f"matrix products: {peak / 1e12:.0f} TFLOP/s")
    for batch, (sample, decode) in ours(batches):
        try:
            started = time.perf_counter()
            seconds = seconds_of(sample, repeats)
            compiled = time.perf_counter() - started - (repeats + 1) * seconds
            rate = batch / seconds_of(lambda decode=decode, sample=sample: decode(sample()), repeats)
        except Exception as error:  # each backend has its own type
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"batch {batch}: out of memory")
            break
        share = rate * IMAGE_TFLOP * 1e12 / peak
        results |= {
            f"jaxdiff.guided_steps_per_second.{batch}": STEPS / seconds,
            f"jaxdiff.images_per_second.{batch}": rate,
            f"jaxdiff.share_of_peak.{batch}": share,
            f"jaxdiff.seconds_to_compile.{batch}": compiled,
        }
        print(
            f"batch {batch}: {STEPS / seconds:.1f} guided steps/s, {rate:.2f} images/s with the decoder, "
            f"{share:.0%} of the peak; compiled in {compiled:.0f} s"
        )
        for side in ("eager", "compiled"):
            if name := results.get(f"{side}.guided_steps_per_second.{batch}"):
                print(f"  PyTorch, {side}: {name:.1f} guided steps/s, jaxdiff's are {STEPS / seconds / name:.2f} times")
    return results


def ours(batches: tuple[int, ...]):
    """Yield for each batch what draws latents, and what decodes them."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.diffusion.samplers import image_keys, starting_noise
    from jaxdiff.mesh import make_mesh
    from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
    from jaxdiff.models.clip import CLIPText
    from jaxdiff.models.clip_config import CLIPTextConfig
    from jaxdiff.models.conditional_unet import ConditionalUNet, ConditionalUNetConfig
    from jaxdiff.recipes.diffusers_scheduler import translate_scheduler
    from jaxdiff.recipes.stable_diffusion import (
        StableDiffusion,
        choose_attention,
        decode_latents,
        make_latent_sampler,
        make_process,
    )
    from jaxdiff.recipes.tiny_stable_diffusion import SCHEDULER

    half = jnp.bfloat16
    unet, vae = ConditionalUNet(ConditionalUNetConfig(), half), Autoencoder(AutoencoderConfig(), half)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    scheduler = translate_scheduler("the scheduler", SCHEDULER)
    model, chosen = choose_attention(StableDiffusion(CLIPText(text, dtype=half), unet, vae, *scheduler))
    print(chosen)
    shapes = {
        "unet": jax.eval_shape(
            unet.init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, 768))
        ),
        "vae": jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
    }
    # Small normal numbers, so that nothing overflows; speed does not depend on them.
    draw = jax.jit(
        lambda: jax.tree.map(lambda leaf: 0.02 * jax.random.normal(jax.random.key(0), leaf.shape, half), shapes)
    )
    params = {part: tree["params"] for part, tree in draw().items()}
    sampler = make_latent_sampler(model, make_process(model, "ddim", STEPS), SCALE, make_mesh(1))
    decode = jax.jit(lambda params, latents: decode_latents(model, params, latents))
    nothing = jnp.zeros((1, 77, 768), half)
    for batch in batches:
        keys = image_keys(jax.random.key(0), jnp.arange(batch))
        context = jnp.ones((batch, 77, 768), half)

        def sample(batch=batch, keys=keys, context=context):
            return sampler(params["unet"], starting_noise(keys, (64, 64, 4)), keys, context, nothing).latents

        yield batch, (sample, lambda latents: decode(params, latents))


def theirs(batches: list[int]) -> dict[str, float]:
    """Time the same guided steps in PyTorch."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(torch.bfloat16)
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    results = {}
    for side in ("eager", "compiled"):
        apply: Callable[..., Any] = unet if side == "eager" else torch.compile(unet, mode="reduce-overhead")
        for batch in batches:
            seconds = _seconds_a_step(apply, batch)
            results[f"{side}.guided_steps_per_second.{batch}"] = 1 / seconds
    return results


def _seconds_a_step(apply: Callable[..., Any], batch: int, steps: int = 20) -> float:
    import torch

    latents = torch.randn(batch, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    latents = latents.contiguous(memory_format=torch.channels_last)
    context = torch.randn(2 * batch, 77, 768, device="cuda", dtype=torch.bfloat16)
    times = torch.linspace(981, 1, steps, device="cuda")

    def run(latents):
        for t in times:
            without, along = apply(torch.cat([latents, latents]), t, context, return_dict=False)[0].chunk(2)
            # DDIM's step is two multiplications and an addition more.
            latents = 0.99 * latents + 0.01 * (without + SCALE * (along - without))
        return latents

    with torch.inference_mode():
        run(latents)
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(latents)
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    print(json.dumps(theirs([int(word) for word in sys.argv[1:]])))
