"""Inject faults into jaxdiff and count what comes of them; the exit code is 1 where a promise is broken.

    python scripts/chaos.py --out runs/chaos        # the whole table
    python scripts/chaos.py --only killed --share 0.1

Prints the table of docs/chaos.md and writes it to --out as chaos.md and chaos.json. Linux only, best as root: without
the right to mount, the full disk is a limit on the size of files.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Imported once, before any fork, but not started: a forked process starts JAX for itself.
import chaos_cache
import chaos_checkpoints
import chaos_disk
import chaos_files
import chaos_kills
import chaos_processes
import chaos_stops
import jax
import orbax.checkpoint  # noqa: F401
import tyro
from chaos_table import PROCESSES, Effort, Row, as_json, as_markdown, scratch_folder

import jaxdiff
import jaxdiff.recipes.loop

FAULTS: dict[str, Callable[[Effort], Iterator[Row]]] = {
    "killed": chaos_kills.killed,
    "damaged": chaos_checkpoints.damaged,
    "disk": chaos_disk.full,
    "stopped": chaos_stops.stopped,
    "not_finite": chaos_stops.not_finite,
    "two_runs": chaos_stops.two_runs,
    "processes": chaos_processes.lost,
    "hostile": chaos_files.hostile,
    "compiled": chaos_cache.compiled,
}


@dataclass(frozen=True)
class Config:
    """Which faults are injected, and how often."""

    out: Path = Path("runs/chaos")
    """Folder for chaos.md and chaos.json."""
    only: tuple[str, ...] = ()
    """Some of the faults, by name; none means all."""
    share: float = 1.0
    """Part of the injections that the table promises."""
    processes: int = 2
    """Injections at a time."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self):
        if unknown := set(self.only) - FAULTS.keys():
            raise ValueError(f"--only must be among {', '.join(FAULTS)}, got {', '.join(sorted(unknown))}")


def main() -> int:
    """Inject, print, write; return 1 where a promise was broken."""
    config = tyro.cli(Config, description=__doc__)
    out = config.out.expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    PROCESSES[0] = config.processes
    started = time.monotonic()
    with scratch_folder(out) as scratch:
        for name in config.only or FAULTS:
            since = time.monotonic()
            for row in FAULTS[name](Effort(config.share, config.seed, scratch)):
                row.seconds, since = time.monotonic() - since, time.monotonic()
                rows.append(row)
                print(f"{row.fault}: {row.injections:,} in {row.seconds:.0f} s, {len(row.broken)} broken", flush=True)
                print(*(f"  {text}" for text in row.broken[:3]), sep="\n", end="", flush=True)
    minutes = (time.monotonic() - started) / 60
    about = (
        f"jaxdiff {jaxdiff.__version__}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"{config.processes} processes on {os.cpu_count()} CPU cores, share {config.share:g}, seed {config.seed}, "
        f"{minutes:.1f} minutes"
    )
    text = f"{about}\n\n{as_markdown(rows)}"
    print(f"\n{text}")
    (out / "chaos.md").write_text(text)
    (out / "chaos.json").write_text(as_json(rows))
    return 1 if any(row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
