"""Checkpoints: Orbax underneath, with a digest of every file, so that damage is found before it is trained on.

Orbax writes into a temporary folder in the background and commits by renaming it, so a killed run leaves either a
whole checkpoint or none. It keeps no checksum of the values, so one flipped bit would load silently. Therefore
`digests.json` is written last, before that rename: what is committed is sealed, and what is not sealed is damaged.
This is the only module that knows Orbax.
"""

import asyncio
import functools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jaxdiff.errors import InputError
from jaxdiff.io.weight_files import file_sha256, note_weights
from jaxdiff.processes import barrier, from_leader, is_leader

DIGESTS = "digests.json"
METRIC = "validation_loss"
DAMAGED = "damaged-"
EXPIRED = "expired"
"""Where a checkpoint is moved before it is deleted, so that one half deleted is never taken for a damaged one."""
UNCOMMITTED = ".orbax-checkpoint-tmp"
"""By which Orbax marks the folders that it has not finished."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last`, and the one of lowest validation loss.

    Whoever writes them must be alone with the folder (`jaxdiff.io.runs.open_run` sees to it): what killed runs left
    half done is cleared away, and damaged checkpoints are set aside. With `read_only`, nothing there is touched.
    """

    def __init__(
        self, directory: Path, keep_last: int = 2, report: Callable[[str], None] = print, read_only: bool = False
    ):
        self.directory = directory.resolve()
        self.report = report
        self.read_only = read_only
        self._keep_last = keep_last
        self._saving: int | None = None
        self._failed: int | None = None
        self._damaged: set[int] = set()
        _quieten_orbax()
        if not read_only:
            _require_writable(self.directory)
            self._clear_unfinished()
        # Before Orbax opens the folder, because it reads some of the files and fails on damaged ones.
        for folder in sorted(self.directory.glob("[0-9]*")) if is_leader() or read_only else ():
            if folder.name == _as_step(folder.name) and (fault := find_damage(folder)):
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
            temporary_path_class=_SealedBeforeCommit,
            todelete_subdir=EXPIRED,
            read_only=self.read_only,
            create=not self.read_only,
            # To be read only, no checkpoint is looked into before it is asked for: some may be damaged.
            lightweight_initialize=self.read_only,
        )
        return ocp.CheckpointManager(
            self.directory, options=options, item_handlers={"state": ocp.StandardCheckpointHandler()}
        )

    def steps(self) -> list[int]:
        """Return the steps of all good checkpoints, oldest first."""
        return sorted(set(self._manager.all_steps()) - self._damaged)

    def save(self, step: int, state: Any, validation_loss: float | None = None) -> None:
        """Start writing `state` in the background; returns once it is copied off the training buffers.

        Raises:
          OSError: this checkpoint, or the one whose write was still going on, cannot be written; the message says
            which.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        # A copy, because the caller donates its buffers to the next step while Orbax still reads them.
        snapshot = jax.tree.map(jnp.copy, state)
        metrics = None if validation_loss is None else {METRIC: validation_loss}
        with self._blaming(step):
            saved = self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(snapshot)), metrics=metrics, force=True
            )
        if not saved:
            raise OSError(f"{self.directory}: checkpoint {step} was not written")
        self._saving = step

    def wait(self) -> None:
        """Wait for the write in progress, if any.

        Raises:
          OSError: it went wrong; the message names the step.
        """
        step, self._saving = self._saving, None
        with self._blaming(step):
            self._manager.wait_until_finished()
        if step is not None and not (self.directory / str(step) / DIGESTS).is_file():
            raise OSError(f"{self.directory / str(step)}: the checkpoint is not there after its write ended")
        if not self.read_only:
            self._clear_unfinished()

    @contextmanager
    def _blaming(self, step: int | None) -> Iterator[None]:
        """Name the step that could not be written, and leave nothing half written on what may be a full disk."""
        try:
            yield
        except Exception as error:  # Orbax raises many types for a full or broken disk
            self._failed = step
            self._clear_unfinished()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            # TensorStore ends a paragraph on its internals with the system's own words.
            if told := re.search(r"([^:]+) \[os_error_code=", reason):
                reason = told[1].strip()
            raise OSError(f"{self.directory}: checkpoint {step} cannot be written ({reason})") from error

    def close(self) -> None:
        """Finish the write in progress and release the folder.

        Raises:
          OSError: as `wait`; Orbax tells here once more of a write whose error it has told.
        """
        self.wait()
        with self._blaming(self._failed):
            self._manager.close()

    def restore(self, like: Any, step: int | None = None, cast: bool = False) -> tuple[Any, int] | None:
        """Return the newest good state and its step, or None where nothing was ever saved.

        Args:
          like: a state of the same structure, shapes, dtypes and sharding.
          step: only this one.
          cast: convert numbers to the dtypes of `like` instead of refusing others.

        Raises:
          InputError: something was saved, but nothing good is left, or what is left is not like `like`.
        """
        # A run that goes on may add and delete checkpoints while several processes look.
        for candidate in reversed(from_leader(self.steps) if step is None else [step]):
            folder = self.directory / str(candidate)
            try:
                if not cast:
                    self._require_dtypes(candidate, like)
                return self._read(candidate, like), candidate
            except (MemoryError, PermissionError, InputError):  # nothing that another checkpoint would be better at
                raise
            except Exception as error:  # Orbax raises many types for files that do not fit
                if self.read_only and not folder.is_dir():  # the run that writes them has just let it go
                    continue
                # Its digests were right when the folder was opened.
                first_line = (str(error).splitlines() or [""])[0]
                raise InputError(
                    f"{folder}: whole, but of another model; did config or data change since? "
                    f"({type(error).__name__}: {first_line.split('. ')[0]})"
                ) from error
        if self._damaged or any(self.directory.glob(f"{DAMAGED}*")):
            kept = "" if self.read_only else f"; they were kept as {DAMAGED}STEP"
            raise InputError(f"{self.directory}: every checkpoint is damaged{kept}. Train again with --resume never")
        return None

    def best_step(self) -> int | None:
        """Return the step of lowest validation loss among the checkpoints that have one."""
        return from_leader(self._find_best)

    def _find_best(self) -> int | None:
        losses = {step: self._manager.metrics(step) for step in self.steps()}
        known = {step: metrics[METRIC] for step, metrics in losses.items() if metrics}
        return min(known, key=known.__getitem__) if known else None

    def _read(self, step: int, like: Any) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        if self.read_only:
            note_weights(self.directory / str(step) / DIGESTS)  # it holds the digests of all others
        return restored["state"]

    def _require_dtypes(self, step: int, like: Any) -> None:
        """Raise InputError, naming the leaf, unless the numbers have the dtypes that Orbax would turn them into."""
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.dtype
            for path, leaf in jax.tree.leaves_with_path(like)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # stored as the integers below it
        }
        for leaf in jax.tree.leaves(self._manager.item_metadata(step)["state"]):
            if leaf.name in wanted and leaf.dtype != wanted[leaf.name]:
                raise InputError(
                    f"{self.directory / str(step)}: {leaf.name} is {leaf.dtype}, but the run asks for "
                    f"{wanted[leaf.name]}; did the config change since?"
                )

    def _set_aside(self, step: int, fault: str) -> None:
        """Move a damaged checkpoint out of the way, or pass it over, so that the one before is used; and say so."""
        what = f"{self.directory}: checkpoint {step} is damaged ({fault}); it was "
        if self.read_only:
            self._damaged.add(step)
            self.report(f"{what}passed over")
            return
        self.report(f"{what}set aside as {DAMAGED}{step}")
        if is_leader():
            target = self.directory / f"{DAMAGED}{step}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(self.directory / str(step), target)

    def _clear_unfinished(self) -> None:
        """Delete what killed or failed saves and unfinished deletions left."""
        if is_leader():
            for leftover in (self.directory / EXPIRED, *self.directory.glob(f"*{UNCOMMITTED}*")):
                shutil.rmtree(leftover, ignore_errors=True)


class _SealedBeforeCommit(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, sealed with digests after everything else was written and before it is committed."""

    async def finalize(self) -> None:
        """Commit the folder."""
        final = self.get_final()
        if not final.name.isdecimal():  # one item inside a checkpoint
            await super().finalize()
            return
        # Orbax writes its last file and renames in one go, so it is given another name to rename to.
        whole = final.parent / f"{final.name}{UNCOMMITTED}-whole"
        self._final_path = whole
        try:
            await super().finalize()
        finally:
            self._final_path = final
        await asyncio.to_thread(write_digests, Path(whole))
        await asyncio.to_thread(os.rename, whole, final)


@functools.cache
def _quieten_orbax() -> None:
    """Have Orbax and TensorStore print nothing: what goes wrong comes through as an exception."""
    # Orbax announces routine work as warnings, and prints its errors before it raises them.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # When one write has failed, the others still report to an event loop that Orbax has closed.
    print_others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            print_others(unraisable)

    sys.unraisablehook = hook


def write_digests(folder: Path) -> None:
    """Write `digests.json`: the SHA-256 of every file below `folder`; its presence seals the checkpoint."""
    digests = {name: file_sha256(folder / name) for name in sorted(_files(folder))}
    with (folder / DIGESTS).open("w") as file:
        file.write(json.dumps(digests, indent=1))
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None.

    Raises:
      InputError: a file may not be read, which is no damage.
    """
    try:
        expected = json.loads((folder / DIGESTS).read_text())
        if expected == {}:
            return f"{DIGESTS} names no file"
        for name, digest in expected.items():
            if file_sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give yourself the right to read it") from error
    except OSError as error:
        return f"{os.path.relpath(error.filename or folder, folder)}: {error.strerror}"
    except (ValueError, AttributeError, RecursionError):
        return f"{DIGESTS} is not readable"
    if unknown := _files(folder) - expected.keys():
        return f"{min(unknown)} was not there when it was written"
    return None


def _as_step(name: str) -> str | None:
    """Return how Orbax names the checkpoint of a step, or None for a name that is no number."""
    return str(int(name)) if name.isdecimal() else None


def _files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths} - {DIGESTS}


def _require_writable(directory: Path) -> None:
    """Raise InputError unless checkpoints can be written, which else would show at the first save."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); checkpoints go there") from error
