"""Checkpoints: Orbax underneath, with a digest of every file, so that damage is found before it is trained on.

Orbax writes in the background and commits by renaming, so a killed run leaves either a whole checkpoint or none.
It keeps no checksum of the values, so one flipped bit would load silently: `digests.json`, written after the
commit, closes that gap. This is the only module that knows Orbax.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jaxdiff.errors import InputError
from jaxdiff.processes import barrier, is_leader

DIGESTS = "digests.json"
METRIC = "validation_loss"
DAMAGED = "damaged-"


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last`, and the one of lowest validation loss."""

    def __init__(self, directory: Path, keep_last: int = 2, report: Callable[[str], None] = print):
        self.directory = directory.resolve()
        self.report = report
        self._keep_last = keep_last
        self._undigested: int | None = None
        # Orbax announces routine work as warnings, and prints its errors before they come through as exceptions.
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        # Before Orbax opens the folder, because it reads some of the files and fails on damaged ones.
        for folder in sorted(self.directory.glob("[0-9]*")) if is_leader() else ():
            if folder.name.isdecimal() and (fault := find_damage(folder)):
                self._set_aside(int(folder.name), fault)
        barrier()  # else another process would list what is about to be set aside
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(self._keep_last),
                policies.BestN(
                    n=1,
                    reverse=True,
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            # Without best_fn Orbax would not write the metric, and a resumed run would forget its best step.
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="min",
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("state",))

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, validation_loss: float | None = None) -> None:
        """Start writing `state` in the background; returns once it is copied off the training buffers."""
        self.wait()
        if step in self._manager.all_steps():
            return
        # A copy, because the caller donates its buffers to the next step while Orbax still reads them.
        snapshot = jax.tree.map(jnp.copy, state)
        metrics = None if validation_loss is None else {METRIC: validation_loss}
        saved = self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(snapshot)), metrics=metrics, force=True
        )
        if not saved:
            raise OSError(f"{self.directory}: checkpoint {step} was not written")
        self._undigested = step

    def wait(self) -> None:
        """Wait for the write in progress, raise what went wrong in it, and seal it with digests."""
        step, self._undigested = self._undigested, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises many types for a full or broken disk
            reason = str(error).splitlines()[0]
            raise OSError(f"{self.directory}: checkpoint {step} cannot be written ({reason})") from error
        if step is not None:
            folder = self.directory / str(step)
            if not folder.is_dir():
                raise OSError(f"{folder}: the checkpoint is not there after its write ended")
            if is_leader():
                write_digests(folder)

    def close(self) -> None:
        """Finish the write in progress and release the folder."""
        self.wait()
        self._manager.close()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, int] | None:
        """Return the newest good state and its step, or None where nothing was ever saved.

        Args:
          like: a state of the same structure, shapes, dtypes and sharding.
          step: only this one.

        Raises:
          InputError: something was saved, but nothing good is left, or what is left is not like `like`.
        """
        for candidate in reversed(self.steps() if step is None else [step]):
            try:
                return self._read(candidate, like), candidate
            except (MemoryError, PermissionError):  # of the machine, not of the checkpoint
                raise
            except Exception as error:  # Orbax raises many types for files that do not fit
                first_line = (str(error).splitlines() or [""])[0]
                fault = f"{type(error).__name__}: {first_line.split('. ')[0]}"
                folder = self.directory / str(candidate)
                if (folder / DIGESTS).exists():  # and they were right when the folder was opened
                    raise InputError(
                        f"{folder}: whole, but of another model; did config or data change since? ({fault})"
                    ) from error
                self._manager.close()
                self._set_aside(candidate, fault)
                self._manager = self._open()
        if any(self.directory.glob(f"{DAMAGED}*")):
            raise InputError(
                f"{self.directory}: every checkpoint is damaged; they were kept as {DAMAGED}STEP. "
                "Train again with --resume never"
            )
        return None

    def best_step(self) -> int | None:
        """Return the step of lowest validation loss among the checkpoints that have one."""
        losses = {step: self._manager.metrics(step) for step in self.steps()}
        known = {step: metrics[METRIC] for step, metrics in losses.items() if metrics}
        return min(known, key=known.__getitem__) if known else None

    def _read(self, step: int, like: Any) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored["state"]

    def _set_aside(self, step: int, fault: str) -> None:
        """Move a damaged checkpoint out of the way, so that the one before it is used, and say so."""
        self.report(f"{self.directory}: checkpoint {step} is damaged ({fault}); it was set aside as {DAMAGED}{step}")
        if is_leader():
            target = self.directory / f"{DAMAGED}{step}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(self.directory / str(step), target)


def write_digests(folder: Path) -> None:
    """Write `digests.json`: the SHA-256 of every file below `folder`; its presence seals the checkpoint."""
    digests = {name: _digest(folder / name) for name in _files(folder)}
    partial = folder / f"{DIGESTS}.partial"
    partial.write_text(json.dumps(digests, indent=1))
    os.replace(partial, folder / DIGESTS)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None; one killed before it was sealed is left to Orbax."""
    if not (folder / DIGESTS).exists():
        return None
    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError):
        return f"{DIGESTS} is not readable"
    for name, digest in expected.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return sorted(str(path.relative_to(folder)) for path in paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
