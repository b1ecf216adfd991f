"""A command as small as can be that trains on several processes: a table, a matrix and a bias, through the real loop.

    python scale_job.py --out DIR --distributed 127.0.0.1:PORT,2,0 --mesh data=1,fsdp=2

Beside what every run leaves, each process writes which rows of the data it read at which step, seen_{process}.jsonl.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxdiff import processes
from jaxdiff.command import run_command
from jaxdiff.device_settings import ProcessSettings
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.datasets import Dataset, batches
from jaxdiff.io.metrics import MetricsLog
from jaxdiff.mesh import open_mesh
from jaxdiff.recipes.loop import TrainingLoop
from jaxdiff.recipes.training import create_state, make_train_step
from jaxdiff.settings import OptimizationSettings

WIDTH = 256
"""A matrix of this width and height is large enough to be split."""
ROWS = 40
BATCH = 8


@dataclass(frozen=True)
class Config:
    """Train, slowly."""

    out: Path
    devices: Annotated[ProcessSettings, tyro.conf.arg(name="")] = field(default_factory=ProcessSettings)
    steps: int = 12
    save_every: int = 4
    pause: float = 0.0
    """Seconds that each batch takes."""
    fail_at: int = -1
    """Step at which process 1 cannot read its data."""
    stop_at_end: bool = False
    """Whether process 1 is sent SIGTERM in its last step."""
    late: float = 0.0
    """Seconds that process 0 keeps the others waiting."""


def loss_fn(params, batch, keys):
    """Each row's target is drawn from its own key, as the noise of a diffusion loss is."""
    hidden = jnp.tanh(params["table"][batch.labels] @ params["matrix"] + params["bias"][None])
    targets = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    return jnp.mean((hidden - targets) ** 2)


def start_params():
    """Return the parameters at step 0."""
    rng = np.random.default_rng(0)
    shapes = {"table": (ROWS, WIDTH), "matrix": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return {name: (rng.standard_normal(shape) / 16).astype(np.float32) for name, shape in shapes.items()}


def rows_at(process_index=0, process_count=1):
    """Return the function from step to batch; the labels are the numbers of the rows."""
    number = np.arange(ROWS, dtype=np.int32)
    names = tuple(map(str, number))
    data = Dataset(np.zeros((ROWS, 1, 1, 1), np.uint8), number, np.zeros_like(number), names, ("rows",))
    return batches(data, 0, BATCH, process_index, process_count)


def prepare(config: Config) -> None:
    """Make the folder, in good time or late."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.late:
        print("late", flush=True)
        time.sleep(config.late)


class StoppedAtEnd(MetricsLog):
    """Metrics whose last line has this process stopped."""

    def __init__(self, folder: Path, start: int, last: int):
        super().__init__(folder, start)
        self._last = last

    def write(self, step, figures):
        """Write one line."""
        super().write(step, figures)
        if step == self._last:
            os.kill(os.getpid(), signal.SIGTERM)


def run(config: Config) -> list[Path]:
    """Train from the last checkpoint, or from step 0, to the end."""
    mesh = open_mesh(config.devices)
    processes.on_leader(lambda: prepare(config))
    optimizer = optax.adam(0.01)
    read = rows_at(processes.index(), processes.count())

    def batch_at(step):
        time.sleep(config.pause)
        if (step, processes.index()) == (config.fail_at, 1):
            raise OSError("pictures/7.png: Input/output error")
        batch = read(step)
        with (config.out / f"seen_{processes.index()}.jsonl").open("a") as file:
            file.write(json.dumps([step, batch.labels.tolist()]) + "\n")
        return batch

    checkpoints = Checkpoints(config.out / "checkpoints", keep_last=10)
    start = create_state(start_params(), optimizer, jax.random.key(1), mesh)
    state, step = checkpoints.restore(start) or (start, 0)
    print(f"going on from step {step}")
    stopped = config.stop_at_end and processes.index() == 1
    log = StoppedAtEnd(config.out, step, config.steps) if stopped else MetricsLog(config.out, step)
    settings = OptimizationSettings(
        train_steps=config.steps, batch_size=BATCH, save_every=config.save_every, log_every=1
    )
    train_step = make_train_step(loss_fn, optimizer, mesh, 0.9)
    TrainingLoop(train_step, batch_at, settings, mesh, checkpoints, log, lambda _: 0.01, None, None).run(state)
    checkpoints.close()
    return [config.out]


if __name__ == "__main__":
    sys.exit(run_command("job", Config, run))
