"""Measure jaxdiff beside PyTorch on this machine.

    python scripts/benchmark.py digits      # training and guided sampling of the digits' UNet
    python scripts/benchmark.py ddim        # DDIM at 32x32, and the face network at 256x256
    python scripts/benchmark.py clip        # CLIP's encoders, and folders of pictures
    python scripts/benchmark.py sd          # Stable Diffusion's UNet, and a tiny pipeline
    python scripts/benchmark.py inversion   # a training step of textual inversion

All candidates of a comparison are timed in turn, over and over, and medians are compared, so that a machine whose speed
drifts slows all sides alike.
"""

import json
import os
import sys
from dataclasses import asdict

import benchmark_clip
import benchmark_ddim
import benchmark_digits
import benchmark_inversion
import benchmark_sd
import tyro

from jaxdiff.freed_memory import keep_freed_memory

BENCHMARKS = {
    "digits": benchmark_digits.Digits,
    "ddim": benchmark_ddim.Faces,
    "clip": benchmark_clip.Clip,
    "sd": benchmark_sd.Diffusion,
    "inversion": benchmark_inversion.Inversion,
}
COMPARE = {
    benchmark_digits.Digits: benchmark_digits.compare,
    benchmark_ddim.Faces: benchmark_ddim.compare,
    benchmark_clip.Clip: benchmark_clip.compare,
    benchmark_sd.Diffusion: benchmark_sd.compare,
    benchmark_inversion.Inversion: benchmark_inversion.compare,
}


def main() -> int:
    """Parse the command line, compare, print, and write results.json."""
    config = tyro.extras.subcommand_cli_from_dict(BENCHMARKS)
    # JAX has no thread count of its own: it, like PyTorch, is held to the same cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    # As every command does; it is PyTorch's memory too.
    keep_freed_memory()
    import diffusers
    import jax
    import torch
    import transformers

    torch.set_num_threads(config.threads)
    results = COMPARE[type(config)](config)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "results.json"
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    versions = {library.__name__: library.__version__ for library in (jax, torch, diffusers, transformers)}
    path.write_text(json.dumps({**results, "config": settings, "versions": versions}, indent=2) + "\n")
    print(f"\nWritten:\n  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
