"""Stable Diffusion beside diffusers' PyTorch: one evaluation of the full-size UNet, and a tiny pipeline end to end.

Both sides read the same files, written once with random weights, and their outputs are compared first. On a CPU both
compute in float32; where JAX has an accelerator, benchmark_sd_accelerator.py takes over.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_sd_accelerator import on_accelerator
from measuring import Settings, Task, in_both_formats, measure

TINY = {
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "sample_size": 32,
}


@dataclass(frozen=True)
class Diffusion(Settings):
    """Time Stable Diffusion 1's UNet at 64x64 latents, and a tiny pipeline with all its parts."""

    repeats: int = 3
    """Times that each candidate is measured; the median counts."""
    num_steps: int = 20
    """Steps of the tiny pipeline."""
    batch_size: int = 4
    """Pictures that the tiny pipeline draws at once."""
    full: bool = True
    """Also time the full-size UNet, which takes 10 GB of memory."""
    batches: tuple[int, ...] = (1, 4, 16, 32)
    """Pictures that are drawn at once, on an accelerator."""
    twin: bool = True
    """Also time PyTorch there, eager and compiled."""


def compare(config: Diffusion) -> dict[str, Any]:
    """Run the whole comparison and return its figures under flat names."""
    import jax

    if jax.default_backend() != "cpu":
        return on_accelerator(config.batches, config.repeats, config.twin)
    with tempfile.TemporaryDirectory() as folder:
        results = compare_pipeline(config, Path(folder))
    if config.full:
        with tempfile.TemporaryDirectory() as folder:
            results |= compare_evaluation(config, Path(folder))
    return results


def compare_pipeline(config: Diffusion, folder: Path) -> dict[str, Any]:
    """Time texts to pictures on both sides, with classifier-free guidance and the autoencoder."""
    import jax
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from jaxdiff import FlaxStableDiffusionPipeline
    from jaxdiff.io.digit_captions import caption_vocabulary
    from jaxdiff.io.tokenizer import write_tokenizer

    torch.manual_seed(0)
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", *caption_vocabulary())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1)  # fmt: skip
    twin = StableDiffusionPipeline(
        vae.eval(), CLIPTextModel(text).eval(), tokenizer, UNet2DConditionModel(**TINY).eval(), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    twin.set_progress_bar_config(disable=True)
    twin.save_pretrained(folder)
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    prompts = ["a photo of the digit three"] * config.batch_size
    ids = pipeline.prepare_inputs(prompts)
    latents = np.random.default_rng(0).standard_normal((config.batch_size, 4, 32, 32), np.float32)

    def ours():
        return pipeline(ids, params, jax.random.key(0), config.num_steps, latents=latents).images

    def theirs():
        steps = config.num_steps
        return twin(prompts, num_inference_steps=steps, latents=torch.from_numpy(latents), output_type="np").images

    print(f"tiny pipeline, {config.num_steps} guided PNDM steps, 64x64 pixels, batch {config.batch_size}, float32")
    print(f"  largest difference of the two sides' pixels in [0, 1]: {np.abs(ours() - theirs()).max():.1e}")
    tasks = [Task("jaxdiff", ours, config.batch_size), Task("eager", theirs, config.batch_size)]
    return report("pipeline", measure(tasks, config.repeats))


def compare_evaluation(config: Diffusion, folder: Path) -> dict[str, Any]:
    """Time one evaluation of the full-size UNet on both sides, then ask each for its memory in a process of its own."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers import UNet2DConditionModel

    from jaxdiff import FlaxUNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_pretrained(folder)
    twin = UNet2DConditionModel.from_pretrained(folder).eval()
    model, params = FlaxUNet2DConditionModel.from_pretrained(folder)
    x_t, t, context = make_inputs()
    apply = jax.jit(lambda params, x_t, context: model.module.apply({"params": params}, x_t, jnp.full(1, t), context))

    def ours():
        return apply(params, x_t, context).block_until_ready()

    twins = in_both_formats(twin)

    def theirs(memory_format):
        latents = torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()).to(memory_format=memory_format)
        with torch.inference_mode():
            return twins[memory_format](latents, t, torch.from_numpy(context)).sample

    print("\none evaluation of the UNet, 64x64 latents, batch 1, 859.5 M parameters, float32")
    difference = np.abs(np.asarray(ours()) - theirs(torch.contiguous_format).numpy().transpose(0, 2, 3, 1))
    print(f"  largest difference of the two sides' outputs: {difference.max():.1e}")
    tasks = [
        Task("jaxdiff", ours, 1),
        Task("eager", lambda: theirs(torch.contiguous_format), 1),
        Task("eager_channels_last", lambda: theirs(torch.channels_last), 1),
    ]
    results = report("unet", measure(tasks, config.repeats))
    del twin, twins, params
    for side in ("jaxdiff", "eager"):
        command = [sys.executable, __file__, side, str(folder), str(config.threads)]
        gigabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        results[f"unet.peak_gigabytes.{side}"] = gigabytes
        print(f"  {side:20s} {gigabytes:8.2f} GB at the most, in a process that loads the file and evaluates twice")
    return results


def make_inputs() -> tuple[Any, int, Any]:
    """Return latents, timestep and text of one evaluation."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((1, 64, 64, 4), np.float32), 500, rng.standard_normal((1, 77, 768), np.float32)


def print_peak(side: str, folder: str, threads: int) -> None:
    """Load the UNet, evaluate it twice, print the most gigabytes that this process held."""
    from jaxdiff.freed_memory import keep_freed_memory

    x_t, t, context = make_inputs()
    if side == "jaxdiff":
        keep_freed_memory()
        import jax
        import jax.numpy as jnp

        from jaxdiff import FlaxUNet2DConditionModel

        model, params = FlaxUNet2DConditionModel.from_pretrained(folder)
        apply = jax.jit(lambda params, x_t, text: model.module.apply({"params": params}, x_t, jnp.full(1, t), text))
        for _ in range(2):
            apply(params, x_t, context).block_until_ready()
    else:
        import torch
        from diffusers import UNet2DConditionModel

        torch.set_num_threads(threads)
        twin = UNet2DConditionModel.from_pretrained(folder).eval()
        with torch.inference_mode():
            for _ in range(2):
                twin(torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()), t, torch.from_numpy(context))
    # Not resource.getrusage, whose peak a new process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9)


def report(name: str, rates: dict[str, float]) -> dict[str, Any]:
    """Print rates and the ratio to the faster of the other sides, and return them under flat names."""
    eager = max(rate for side, rate in rates.items() if side != "jaxdiff")
    for side, rate in rates.items():
        print(f"  {side:20s} {rate:8.3f} a second   jaxdiff is {rates['jaxdiff'] / rate:.2f} times as fast")
    results = {f"{name}.per_second.{side}": rate for side, rate in rates.items()}
    return results | {f"{name}.ratio_to_eager": rates["jaxdiff"] / eager}


if __name__ == "__main__":
    print_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))
