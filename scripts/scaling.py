"""What a training step costs when it is shared: time, bytes between devices, memory, checkpoints, and a projection.

    python scripts/scaling.py --out runs/scaling

Prints the tables of docs/scale.md and writes results.json. Needs no accelerator: eight host devices are forced, which
share the cores, so that times show overhead alone; bytes and memory are those of the compiled programs.
"""

import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import tyro

from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.datasets import Batch
from jaxdiff.mesh import make_mesh, put_batch
from jaxdiff.recipes.conditional import build_conditional_model
from jaxdiff.recipes.objective import make_diffusion_loss
from jaxdiff.recipes.training import create_state, make_optimizer, make_train_step
from jaxdiff.settings import DiffusionSettings, TrainingSettings

SIDE = 16
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (1, 8)]
"""Devices along data and fsdp."""
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "u8": 1, "pred": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")

# Assumptions of the projection.
PEAK, UTILISATION = 790e12, 0.3
"""FLOP/s that large bfloat16 products reach on an H200, and the share of them that a train step is taken to reach."""
INSIDE, OUTSIDE = 450e9, 50e9
"""Bytes a second and direction of one GPU to others of its machine (NVLink 4) and of other machines (400 Gbit/s)."""
DISK, HASH = 2e9, 1.9e9
"""Bytes a second that each machine of 8 GPUs writes to shared storage, and that process 0 seals (SHA-256, one core)."""
MODELS = {
    "DDPM, 32x32 pictures": (35.7e6, 12.44e9, 128),
    "DDPM, 256x256 pictures": (113.7e6, 497.0e9, 8),
    "Stable Diffusion 1, 64x64 latents": (859.5e6, 803.3e9, 8),
}
"""Parameters, FLOP of one forward evaluation of one image, and images of a GPU's share of a batch."""


@dataclass(frozen=True)
class Config:
    """Measure what a shared training step costs, and project it."""

    out: Path = Path("runs/scaling")
    """Folder to write results.json to."""
    per_device: int = 4
    """Images of each device's share of a batch."""
    repeats: int = 15
    """Times that each step is timed, and a third as often each checkpoint; the least counts, because other work on the
    machine only adds."""


def build(shape: tuple[int, int], per_device: int, preset: str = "tiny"):
    """Return mesh, state and the step, not compiled yet, of train_cfg's model on the digits' size."""
    diffusion, training = DiffusionSettings(), TrainingSettings()
    model = build_conditional_model(preset, "float32", diffusion, (SIDE, SIDE, 3), tuple("0123456789"), ("a", "b"))
    mesh = make_mesh(*shape)
    optimizer, _ = make_optimizer(1e-3, 1, 10, 0.01, 1.0)
    state = create_state(model.compile_init()(jax.random.key(0)), optimizer, jax.random.key(0), mesh)
    step = make_train_step(make_diffusion_loss(model, diffusion, training), optimizer, mesh, 0.99)
    size = per_device * mesh.size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)
    batch = put_batch(Batch(images, np.zeros(size, np.int32), np.zeros(size, np.int32)), mesh)
    return state, jax.jit(step, donate_argnums=0).lower(state, batch), batch


def collectives(text: str) -> dict[str, int]:
    """Return the bytes that one device is left with by each kind of exchange in a compiled program."""
    found: dict[str, int] = {}
    for shapes, kind in COLLECTIVE.findall(text):
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes):
            size = int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
            found[kind] = found.get(kind, 0) + size * BYTES[dtype]
    return found


def measure_step(shape: tuple[int, int], config: Config) -> dict[str, float]:
    """Compile and time a step; return seconds, memory of a device, and bytes exchanged."""
    state, lowered, batch = build(shape, config.per_device)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    seconds = []
    for _ in range(config.repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": parameters,
        "seconds": min(seconds[1:]),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        **{f"bytes.{kind}": size for kind, size in collectives(compiled.as_text()).items()},
    }


def measure_checkpoint(preset: str, repeats: int) -> dict[str, float]:
    """Save and restore the state of a preset; return parameters, bytes, and seconds."""
    state, _, _ = build((1, 1), 1, preset)
    rng = np.random.default_rng(0)
    # Numbers as training leaves them: zeros and equal trees would be compressed away.
    noisy = [
        rng.standard_normal(leaf.shape, np.float32) if leaf.dtype == np.float32 else leaf
        for leaf in jax.tree.leaves(state)
    ]
    state = jax.tree.unflatten(jax.tree.structure(state), noisy)
    state = jax.device_put(state, jax.devices()[0])
    saved, restored, blocked = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder))
            start = time.perf_counter()
            checkpoints.save(1, state)
            blocked.append(time.perf_counter() - start)
            checkpoints.close()
            saved.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            start = time.perf_counter()
            checkpoints = Checkpoints(Path(folder))
            checkpoints.restore(state)
            checkpoints.close()
            restored.append(time.perf_counter() - start)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes": size,
        "blocked": min(blocked),
        "saved": min(saved),
        "restored": min(restored),
    }


def project(parameters: float, flop: float, images: int, gpus: int) -> dict[str, float]:
    """Return what a data-parallel step is expected to take on `gpus` H200s, nothing of the exchange hidden."""
    compute = 3 * flop * images / (PEAK * UTILISATION)
    # A ring inside each machine, then one between machines, in which each GPU carries an eighth (reduce-scatter first).
    local = min(gpus, 8)
    exchange = 2 * (local - 1) / local * 4 * parameters / INSIDE
    machines = gpus // 8
    if machines > 1:
        exchange += 2 * (machines - 1) / machines * 4 * parameters / 8 / OUTSIDE
    return {
        "compute": compute,
        "exchange": exchange,
        "efficiency": compute / (compute + exchange),
        "images_per_second": gpus * images / (compute + exchange),
        # Parameters, average and two moments are written once, by all machines together, and sealed by one process.
        "checkpoint": 4 * 4 * parameters * (1 / (DISK * max(1, machines)) + 1 / HASH),
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def main(config: Config) -> None:
    """Measure, print, and write."""
    steps = {f"data={data},fsdp={fsdp}": measure_step((data, fsdp), config) for data, fsdp in MESHES}
    one = steps["data=1,fsdp=1"]
    rows = []
    for (data, fsdp), (name, found) in zip(MESHES, steps.items()):
        ideal = one["seconds"] * data * fsdp
        moved = {kind: found.get(f"bytes.{kind}", 0) / 1e6 for kind in ("all-reduce", "all-gather")}
        others = sum(size for key, size in found.items() if key.startswith("bytes.")) / 1e6 - sum(moved.values())
        rows.append(
            [f"`{name}`", f"{1e3 * found['seconds']:.0f}", f"{found['seconds'] / ideal:.2f}"]
            + [f"{found['arguments'] / 1e6:.1f}"]
            + [f"{size:.2f}" for size in (*moved.values(), others)]
        )
    head = [
        "mesh",
        "ms a step",
        "of N times one",
        "state, MB",
        "all-reduced, MB",
        "gathered, MB",
        "others, MB",
    ]
    print(f"\n{one['parameters'] / 1e6:.2f} M parameters, {config.per_device} images a device\n\n{table(head, rows)}")
    saves = {preset: measure_checkpoint(preset, max(1, config.repeats // 3)) for preset in ("tiny", "base")}
    rows = []
    for preset, found in saves.items():
        millions = found["parameters"] / 1e6
        rows.append(
            [preset, f"{millions:.1f}", f"{found['bytes'] / 1e6 / millions:.2f}"]
            + [f"{1e3 * found[name] / millions:.1f}" for name in ("blocked", "saved", "restored")]
        )
    head = ["preset", "M parameters", "MB a million", "ms a million: blocked", "saved", "restored"]
    print(table(head, rows))
    projections = {f"{name}.{gpus}": project(*model, gpus) for name, model in MODELS.items() for gpus in (8, 64, 512)}
    rows = []
    for key, found in projections.items():
        name, gpus = key.rsplit(".", 1)
        images = MODELS[name][2]
        rows.append(
            [name, gpus, f"{images * int(gpus):,}", f"{1e3 * found['compute']:.1f}", f"{1e3 * found['exchange']:.1f}"]
            + [f"{100 * found['efficiency']:.0f} %", f"{found['images_per_second']:,.0f}", f"{found['checkpoint']:.1f}"]
        )
    head = ["model", "H200s", "batch", "compute, ms", "exchange, ms", "efficiency", "images/s", "checkpoint, s"]
    print(table(head, rows))
    config.out.mkdir(parents=True, exist_ok=True)
    record = {"steps": steps, "checkpoints": saves, "projections": projections}
    (config.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written:\n  {config.out / 'results.json'}", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
