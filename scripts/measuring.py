"""What all benchmarks share: settings, fair timing of several candidates, and the peak that the machine allows."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Flags of every benchmark."""

    threads: int = 2
    """CPU cores that both sides may use."""
    repeats: int = 7
    """Times that each candidate is measured; the median counts."""
    out: Path = Path("runs/benchmark")
    """Folder to write results.json to."""


@dataclass(frozen=True)
class Task:
    """One thing to be measured: a blocking call and the images that it works through."""

    name: str
    call: Callable[[], Any]
    images: int


def measure(tasks: list[Task], repeats: int) -> dict[str, float]:
    """Return each task's median images a second, measured in turn `repeats` times after one warm-up call."""
    rates: dict[str, list[float]] = {task.name: [] for task in tasks}
    for task in tasks:
        task.call()
    for _ in range(repeats):
        for task in tasks:
            start = time.perf_counter()
            task.call()
            rates[task.name].append(task.images / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def in_both_formats(network: Any) -> dict[Any, Any]:
    """Return PyTorch's network by memory format, one for each: to change it would take a part of what is timed."""
    import copy

    import torch

    last = torch.channels_last
    return {torch.contiguous_format: network, last: copy.deepcopy(network).to(memory_format=last)}


def matmul_peak(repeats: int) -> dict[str, float]:
    """Return the float32 GFLOP/s of square matrix products, the best of three sizes, in PyTorch and in JAX."""
    import jax
    import jax.numpy as jnp
    import torch

    best = {"torch": 0.0, "jax": 0.0}
    dot = jax.jit(jnp.dot)
    for size in (1024, 2048, 3072):
        ours, theirs = jnp.ones((size, size)), torch.ones(size, size)
        tasks = [
            Task("jax", lambda ours=ours: dot(ours, ours).block_until_ready(), 2 * size**3),
            Task("torch", lambda theirs=theirs: theirs @ theirs, 2 * size**3),
        ]
        for name, rate in measure(tasks, repeats).items():
            best[name] = max(best[name], rate / 1e9)
    return best


def seconds_of(call, repeats: int) -> float:
    """Return the median seconds of a call that returns arrays, after one to warm up."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bfloat16_peak(count: int = 20) -> float:
    """Return the operations a second of large square bfloat16 matrix products on JAX's device, `count` in a row."""
    import jax
    import jax.numpy as jnp

    # Random, because multiplying ones and zeros takes less power, and so runs faster.
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: (x @ y) / 8192**0.5, x))
    return count * 2 * 8192**3 / seconds_of(lambda: product(square), 5)
