"""Pixel-space DDIM beside diffusers' PyTorch: 50 steps at 32x32, and one evaluation of the face network at 256x256.

Both sides hold the same random weights, converted by `weights_convert`, and their outputs are compared first. On a
CPU both compute in float32; where JAX has an accelerator, jaxdiff alone is measured, in bfloat16, against the matrix
product peak of the same run.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Settings, Task, bfloat16_peak, in_both_formats, measure, seconds_of


@dataclass(frozen=True)
class Faces(Settings):
    """Time DDIM with the 35.7 M network of 32x32 pixels, and one evaluation of the 113.7 M network of 256x256."""

    num_steps: int = 50
    """DDIM steps at 32x32."""
    batch_size: int = 4
    """Images sampled at once at 32x32."""
    seed: int = 0
    """Seed of the random weights and noises."""


def make_twin(layout: str, image_size: int, seed: int):
    """Return diffusers' model of a pretrained layout, with random weights and nothing zero."""
    import torch
    from diffusers import UNet2DModel

    from jaxdiff.models.unet import PRETRAINED, UNetConfig

    unet = UNetConfig(**PRETRAINED[layout])
    down = tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in unet.attention)
    torch.manual_seed(seed)
    twin = UNet2DModel(
        sample_size=image_size,
        block_out_channels=unet.block_out_channels,
        layers_per_block=unet.layers_per_block,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=unet.attention_head_dim,
        norm_num_groups=unet.norm_num_groups,
        norm_eps=unet.norm_eps,
        flip_sin_to_cos=unet.flip_sin_to_cos,
        freq_shift=unet.freq_shift,
        downsample_padding=unet.downsample_padding,
    )
    return twin.eval()


def convert(twin) -> tuple[Any, Any]:
    """Return our network and parameters of a twin, through the files that users convert."""
    from jaxdiff.recipes.pretrained_unet import load_pretrained_unet
    from weights_convert import ddpm

    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(Path(folder) / "theirs")
        ddpm.run(str(Path(folder) / "theirs"), Path(folder) / "ours", None)
        network, params, _ = load_pretrained_unet(Path(folder) / "ours")
    return network, params


def compare(config: Faces) -> dict[str, Any]:
    """Run the whole comparison and return its figures under flat names."""
    import jax

    if jax.default_backend() != "cpu":
        return on_accelerator(config)
    results = compare_sampling(config)
    return results | compare_evaluation(config)


def compare_sampling(config: Faces) -> dict[str, Any]:
    """Time DDIM at 32x32 on both sides."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers import DDIMScheduler

    from jaxdiff.diffusion.prediction import to_prediction
    from jaxdiff.diffusion.samplers import DDIM, image_keys, sample
    from jaxdiff.diffusion.schedule import make_schedule
    from jaxdiff.diffusion.timesteps import timestep_spacing, with_final

    twin = make_twin("ddpm-cifar10-32", 32, config.seed)
    network, params = convert(twin)
    schedule = make_schedule("linear")
    timesteps = with_final(timestep_spacing("leading", config.num_steps, schedule))
    keys = image_keys(jax.random.key(config.seed), jnp.arange(config.batch_size))
    x_T = np.random.default_rng(config.seed).standard_normal((config.batch_size, 32, 32, 3)).astype(np.float32)

    @jax.jit
    def ours(params, x_T):
        def denoise(x_t, t):
            output = network.apply({"params": params}, x_t, jnp.broadcast_to(t, x_t.shape[:1]))
            return to_prediction(output, x_t, *schedule.alpha_sigma(t), "eps")

        return sample(denoise, x_T, keys, schedule, timesteps, DDIM())

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(config.num_steps)

    twins = in_both_formats(twin)

    def theirs(memory_format):
        x_t = torch.from_numpy(x_T.transpose(0, 3, 1, 2).copy()).to(memory_format=memory_format)
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x_t = scheduler.step(twins[memory_format](x_t, t).sample, t, x_t).prev_sample
        return x_t

    print(f"DDIM, {config.num_steps} steps, 32x32, batch {config.batch_size}, 35.7 M parameters, float32")
    difference = np.abs(np.asarray(ours(params, x_T)) - theirs(torch.contiguous_format).numpy().transpose(0, 2, 3, 1))
    print(f"  largest difference of the two sides' pixels in [-1, 1]: {difference.max():.1e}")
    tasks = [
        Task("jaxdiff", lambda: ours(params, x_T).block_until_ready(), config.batch_size),
        Task("eager", lambda: theirs(torch.contiguous_format), config.batch_size),
        Task("eager_channels_last", lambda: theirs(torch.channels_last), config.batch_size),
    ]
    return report("ddim_32", measure(tasks, config.repeats))


def compare_evaluation(config: Faces) -> dict[str, Any]:
    """Time one evaluation of the face network at 256x256 on both sides."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    twin = make_twin("ddpm-celebahq-256", 256, config.seed)
    network, params = convert(twin)
    x_t = np.random.default_rng(config.seed).standard_normal((1, 256, 256, 3)).astype(np.float32)
    apply = jax.jit(lambda params, x_t: network.apply({"params": params}, x_t, jnp.full((1,), 500)))

    twins = in_both_formats(twin)

    def theirs(memory_format):
        image = torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()).to(memory_format=memory_format)
        with torch.inference_mode():
            return twins[memory_format](image, 500).sample

    print("\none evaluation, 256x256, batch 1, 113.7 M parameters, float32")
    difference = np.abs(np.asarray(apply(params, x_t)) - theirs(torch.contiguous_format).numpy().transpose(0, 2, 3, 1))
    print(f"  largest difference of the two sides' outputs: {difference.max():.1e}")
    tasks = [
        Task("jaxdiff", lambda: apply(params, x_t).block_until_ready(), 1),
        Task("eager", lambda: theirs(torch.contiguous_format), 1),
        Task("eager_channels_last", lambda: theirs(torch.channels_last), 1),
    ]
    return report("evaluation_256", measure(tasks, config.repeats))


def report(name: str, rates: dict[str, float]) -> dict[str, Any]:
    """Print rates and the ratio to the faster memory format, and return them under flat names."""
    eager = max(rates["eager"], rates["eager_channels_last"])
    for side, rate in rates.items():
        print(f"  {side:20s} {rate:8.3f} images/s   jaxdiff is {rates['jaxdiff'] / rate:.2f} times as fast")
    print(f"  jaxdiff / best eager {rates['jaxdiff'] / eager:.2f}")
    results = {f"{name}.images_per_second.{side}": rate for side, rate in rates.items()}
    return results | {f"{name}.ratio_to_eager": rates["jaxdiff"] / eager}


def on_accelerator(config: Faces) -> dict[str, Any]:
    """Time 50 DDIM steps at 256x256 in bfloat16, at batch 1 and at growing batches, as a share of the matmul peak."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.diffusion.prediction import to_prediction
    from jaxdiff.diffusion.samplers import DDIM, image_keys, sample, starting_noise
    from jaxdiff.diffusion.schedule import make_schedule
    from jaxdiff.diffusion.timesteps import timestep_spacing, with_final
    from jaxdiff.models.unet import PRETRAINED, UNet, UNetConfig

    network = UNet(UNetConfig(**PRETRAINED["ddpm-celebahq-256"]), dtype=jnp.bfloat16)
    params = jax.jit(network.init)(jax.random.key(config.seed), jnp.zeros((1, 256, 256, 3)), jnp.zeros(1, jnp.int32))
    schedule = make_schedule("linear")
    timesteps = with_final(timestep_spacing("leading", 50, schedule))
    peak = bfloat16_peak()
    # An evaluation's operations, from the compiler.
    one = jax.jit(network.apply).lower(params, jnp.zeros((1, 256, 256, 3)), jnp.zeros(1, jnp.int32)).compile()
    flops = 50 * one.cost_analysis()["flops"]
    results: dict[str, Any] = {"peak_tflops": peak / 1e12, "tflop_per_image": flops / 1e12}
    for batch in (1, 2, 4, 8, 16, 32):
        keys = image_keys(jax.random.key(config.seed), jnp.arange(batch))

        @jax.jit
        def draw(params, x_T, keys=keys):
            def denoise(x_t, t):
                output = network.apply(params, x_t, jnp.broadcast_to(t, x_t.shape[:1]))
                return to_prediction(output, x_t, *schedule.alpha_sigma(t), "eps")

            return sample(denoise, x_T, keys, schedule, timesteps, DDIM())

        x_T = starting_noise(keys, (256, 256, 3))
        rate = batch / seconds_of(lambda draw=draw, x_T=x_T: draw(params, x_T), config.repeats)
        results[f"ddim_256.images_per_second.{batch}"] = rate
        results[f"ddim_256.share_of_peak.{batch}"] = rate * flops / peak
        print(
            f"DDIM-50 at 256x256, bfloat16, batch {batch}: {rate:.2f} images/s, {rate * flops / peak:.0%} of the peak"
        )
    return results
