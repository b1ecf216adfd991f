"""The smallest run that is trained, saved, resumed and stopped by the same code as train_cfg's, and traps to kill it.

Everything around the network is the product's: the command, the run folder and its lock, the loop, the checkpoints. The
network is one matrix, so that a run starts in half a second and can be killed some hundred times.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxdiff.command import run_command
from jaxdiff.device_settings import ProcessSettings

PHASES = (
    "the save is asked for",
    "the temporary folder is made",
    "the first array is being written",
    "all arrays are written",
    "the digests are asked for",
    "half of the digests are written",
    "it is sealed, not committed",
    "it is committed",
    "an old one is moved away",
    "an old one is half deleted",
)
"""When a trap kills its own process."""


@dataclass(frozen=True)
class Config:
    """Train one matrix."""

    out: Path = Path("run")
    """Run folder."""
    train_steps: int = 40
    """Training steps."""
    save_every: int = 4
    """Steps between checkpoints."""
    width: int = 16
    """Rows and columns of the matrix."""
    poison: int = 0
    """Step whose batch holds NaN; 0 for none."""
    trap: str = ""
    """One of PHASES."""
    trap_at: int = 1
    """Which time that the phase is reached."""
    pause: float = 0.005
    """Seconds that each batch takes."""
    devices: Annotated[ProcessSettings, tyro.conf.arg(name="")] = field(default_factory=ProcessSettings)


def run(config: Config) -> list[Path]:
    """Train, or go on; write the hash of the final state."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxdiff.io.checkpoint import Checkpoints
    from jaxdiff.io.metrics import MetricsLog
    from jaxdiff.io.provenance import tree_hash
    from jaxdiff.io.runs import as_json, open_run, write_json
    from jaxdiff.mesh import open_mesh
    from jaxdiff.processes import count, index, is_leader, on_leader
    from jaxdiff.recipes.loop import TrainingLoop
    from jaxdiff.recipes.training import create_state, make_optimizer, make_train_step
    from jaxdiff.settings import OptimizationSettings

    width = config.width
    mesh = open_mesh(config.devices)
    settings = OptimizationSettings(
        train_steps=config.train_steps, batch_size=4, warmup_steps=2, log_every=1, save_every=config.save_every
    )

    def loss_fn(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys)
        return jnp.mean((batch @ params["kernel"] - noise) ** 2)

    def batch_at(step: int):
        time.sleep(config.pause)
        batch = np.random.default_rng(step).standard_normal((4, width)).astype(np.float32)
        return np.split(batch, count())[index()] * np.float32("nan" if step + 1 == config.poison else 1)

    if config.trap:
        set_trap(config.trap, config.trap_at)
    out, free = config.out.absolute(), {"out", "trap", "trap_at", "poison", "pause", "devices", "mesh", "distributed"}
    on_leader(lambda: open_run(out, as_json(config), free))
    optimizer, learning_rate = make_optimizer(1e-2, 2, config.train_steps, 0.1, 1.0)
    kernel = np.random.default_rng(0).standard_normal((width, width), np.float32)
    state = create_state({"kernel": kernel}, optimizer, jax.random.key(0), mesh)
    checkpoints = Checkpoints(out / "checkpoints")
    state, start = checkpoints.restore(state) or (state, 0)
    print(f"going on from step {start}", flush=True)
    log = MetricsLog(out, start)
    train_step = make_train_step(loss_fn, optimizer, mesh, 0.9)
    try:
        loop = TrainingLoop(train_step, batch_at, settings, mesh, checkpoints, log, learning_rate, None, None)
        state = loop.run(state)
    finally:
        checkpoints.close()
        log.close()
    values = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state.replace(key=None)))}
    if is_leader():
        write_json(out / "results.json", {"state": tree_hash(values)})
    return [out / "results.json"]


def command(*args: str) -> Callable[[], int]:
    """Return the command with its flags, to be called in a process of its own."""
    return lambda: run_command("chaos_run", Config, run, args)


def set_trap(phase: str, at: int) -> None:
    """Have this process kill itself when it reaches a phase of a save for the `at`-th time."""
    import shutil

    from orbax.checkpoint._src.path import deleter

    from jaxdiff.io import checkpoint

    reached = [0]

    def spring() -> None:
        reached[0] += 1
        if reached[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function, when=lambda *args: True):
        return lambda *args, **kwargs: (spring() if when(*args) else None, function(*args, **kwargs))[1]

    def after(function, when=lambda *args: True):
        return lambda *args, **kwargs: (function(*args, **kwargs), spring() if when(*args) else None)[0]

    def commits(source, target, *_):
        return str(source).endswith("-whole") and Path(target).name.isdecimal()

    sealed = checkpoint._SealedBeforeCommit
    if phase == "the save is asked for":
        checkpoint.Checkpoints.save = before(checkpoint.Checkpoints.save)
    elif phase == "the temporary folder is made":
        create = sealed.create

        async def create_and_spring(self):
            made = await create(self)
            if self.get_final().name.isdecimal():
                spring()
            return made

        sealed.create = create_and_spring
    elif phase == "the first array is being written":
        threading.Thread(target=_watch_for_arrays, args=(spring,), daemon=True).start()
    elif phase == "all arrays are written":
        finalize = sealed.finalize

        async def spring_and_finalize(self):
            if self.get_final().name == "state":
                spring()
            await finalize(self)

        sealed.finalize = spring_and_finalize
    elif phase == "the digests are asked for":
        checkpoint.write_digests = before(checkpoint.write_digests)
    elif phase == "half of the digests are written":

        def write_half(folder):
            write_digests(folder)
            text = (folder / checkpoint.DIGESTS).read_text()
            (folder / checkpoint.DIGESTS).write_text(text[: len(text) // 2])
            spring()
            (folder / checkpoint.DIGESTS).write_text(text)

        write_digests = checkpoint.write_digests
        checkpoint.write_digests = write_half
    elif phase == "it is sealed, not committed":
        os.rename = before(os.rename, commits)
    elif phase == "it is committed":
        os.rename = after(os.rename, commits)
    elif phase == "an old one is moved away":
        deleter.StandardCheckpointDeleter.delete = after(deleter.StandardCheckpointDeleter.delete)
    elif phase == "an old one is half deleted":
        rmtree = shutil.rmtree

        def delete_half(folder, *args, **kwargs):
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            for path in files[::2]:
                path.unlink()
            if files:
                spring()
            rmtree(folder, *args, **kwargs)

        shutil.rmtree = delete_half
    else:
        raise ValueError(phase)


def _watch_for_arrays(spring: Callable[[], None]) -> None:
    """Spring when the first file with values of a save appears."""
    from jaxdiff.io.checkpoint import UNCOMMITTED

    # The folder is the command's last word but for the trap; found by what the process writes.
    seen: set[str] = set()
    while True:
        for folder in list(_run_folder().glob(f"checkpoints/*{UNCOMMITTED}/state*/**/d/*")):
            name = next(part for part in folder.parts if UNCOMMITTED in part)
            if name not in seen:
                seen.add(name)
                spring()
        time.sleep(0.0002)


def _run_folder() -> Path:
    from jaxdiff.io import run_lock

    for descriptor in run_lock._held.values():
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
    return Path("/nonexistent")
