"""A disk that is full: a small tmpfs, or, without the right to mount one, a limit on the size of files."""

import contextlib
import random
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chaos_run
from chaos_kills import results_of
from chaos_table import Child, Effort, Outcome, Row, scratch_folder, spread

from jaxdiff.io.checkpoint import find_damage

FLAGS = ("--width=192", "--pause=0")
CHECKPOINT_BYTES = 4 * 4 * 192**2
"""The matrix, its average, and the optimiser's two moments, in float32."""


@dataclass(frozen=True)
class Disk:
    """A run on a disk of so many kilobytes, or, where `mounted` is false, in files of no more."""

    kilobytes: int
    mounted: bool
    expected: tuple[str, list[float]]
    scratch: Path


def full(effort: Effort) -> Iterator[Row]:
    """Run on disks of many sizes, all too small."""
    row = Row(
        "disk full while a run writes",
        "the step that could not be saved is named, exit code 2, the last good one intact; goes on when there is room",
    )
    with scratch_folder(effort.scratch) as folder:
        run = folder / "run"
        if (ended := Child.start(chaos_run.command(f"--out={run}", *FLAGS), folder / "said").wait()).code:
            raise RuntimeError(ended.said)
        expected, mounted = results_of(run), can_mount(folder)
    rng = random.Random(effort.seed)
    # From no room for one checkpoint to no room for the three that are there for a moment: in a file, from a part of
    # the matrices to most of them.
    low, high = (0.3, 2.4) if mounted else (0.05, 0.8)
    sizes = [int(CHECKPOINT_BYTES * rng.uniform(low, high) / 1024) for _ in range(effort.times(16))]
    row.add(spread(fill, [Disk(size, mounted, expected, effort.scratch) for size in sizes]))
    row.notes.append("small tmpfs" if mounted else "no right to mount: RLIMIT_FSIZE instead of a small tmpfs")
    yield row


def can_mount(folder: Path) -> bool:
    """Tell whether a tmpfs can be mounted."""
    try:
        with tmpfs(folder, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def tmpfs(folder: Path, kilobytes: int) -> Iterator[None]:
    """Mount a disk of this size."""
    options = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def fill(job: Disk) -> list[Outcome]:
    """Run until the disk is full, see what is left, make room, and go on."""
    with scratch_folder(job.scratch) as folder:
        disk = folder / "disk"
        disk.mkdir()
        with tmpfs(disk, job.kilobytes) if job.mounted else contextlib.nullcontext():
            return [_fill(job, disk)]


def _fill(job: Disk, disk: Path) -> Outcome:
    said, run = disk.parent / "said", disk / "run"

    def limited() -> int:
        if not job.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * job.kilobytes, resource.RLIM_INFINITY))
        return chaos_run.command(f"--out={run}", *FLAGS)()

    ended = Child.start(limited, said).wait()
    about = f"{job.kilobytes} kB: exit code {ended.code}: {ended.said}"
    if ended.code == 0 and results_of(run) == job.expected:
        return Outcome("large enough")
    if ended.code != 2 or "Traceback" in ended.said:
        return Outcome("no sentence", about)
    checkpoints = run / "checkpoints"
    good = [path for path in checkpoints.glob("[0-9]*") if path.name.isdecimal()]
    if bad := [path for path in good if find_damage(path)]:
        return Outcome("a bad checkpoint", f"{about} {bad}")
    if list(checkpoints.glob("*tmp*")):
        return Outcome("rubbish left", f"{about} {list(checkpoints.glob('*tmp*'))}")
    if job.mounted:
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True, capture_output=True)
    again = Child.start(chaos_run.command(f"--out={run}", *FLAGS), said).wait()
    start = max((int(path.name) for path in good), default=0)
    if again.code or f"going on from step {start}\n" not in again.said or results_of(run) != job.expected:
        return Outcome("not resumed", f"{about}, then {again.code}: {again.said}")
    told = "checkpoint" in ended.said and "cannot be written" in ended.said
    return Outcome("a checkpoint could not be written" if told else "another file could not be written")
