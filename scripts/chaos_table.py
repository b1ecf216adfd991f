"""What all faults share: how often each is injected, two at a time, and the table of what came of it."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What came of one injection: in words that are counted, and, where the promise was broken, how."""

    what: str
    broken: str | None = None


@dataclass(frozen=True)
class Effort:
    """How much of the table is done.

    Attributes:
      share: 1 injects as often as the table promises; tests take a small part, but each kind at least once.
      seed: of all random choices.
      scratch: an empty folder; everything is written below it.
    """

    share: float
    seed: int
    scratch: Path

    def times(self, number: int) -> int:
        """Return the share of a number of injections."""
        return max(1, round(number * self.share))


@dataclass
class Row:
    """One fault, what must hold, and what came of its injections."""

    fault: str
    must_hold: str
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def injections(self) -> int:
        """How often the fault was injected."""
        return self.outcomes.total()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count what came of some injections."""
        for outcome in outcomes:
            self.outcomes[outcome.what] += 1
            if outcome.broken is not None:  # one who died in silence has nothing to show
                self.broken.append(outcome.broken)


PROCESSES = [2]
"""How many work at a time."""


def spread(function: Callable[[Any], list[Outcome]], jobs: Sequence[Any]) -> Iterator[Outcome]:
    """Yield the outcomes of all jobs, worked off by forked processes; this process must not have started JAX."""
    with multiprocessing.get_context("fork").Pool(min(PROCESSES[0], len(jobs))) as pool:
        for outcomes in pool.imap_unordered(_Guarded(function), jobs):
            yield from outcomes


@dataclass(frozen=True)
class _Guarded:
    """A job that breaks counts as a promise broken, and the others go on."""

    function: Callable[[Any], list[Outcome]]

    def __call__(self, job: Any) -> list[Outcome]:
        try:
            return self.function(job)
        except Exception:
            return [Outcome("crash", f"{job}: {traceback.format_exc()}")]


class Ended(NamedTuple):
    """How a child ended: its exit code, or minus the signal; what it said; and how many seconds it took."""

    code: int
    said: str
    seconds: float


@dataclass
class Child:
    """A forked process that runs a function and exits with what it returns."""

    pid: int
    output: Path
    started: float

    @classmethod
    def start(cls, function: Callable[[], int], output: Path) -> "Child":
        """Fork; both of the child's outputs go to a file."""
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = function()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    import sys

                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        return cls(pid, output, time.monotonic())

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> None:
        """Send a signal after a time, or at the child's own end if that is sooner."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.has_ended():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """Tell whether the child has ended, leaving it to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, timeout: float = 120.0) -> Ended:
        """Wait for its end; one that takes too long is killed, and ends with -SIGKILL."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and not self.has_ended():
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.started
        return Ended(os.waitstatus_to_exitcode(status), self.output.read_text(errors="replace"), seconds)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder and delete it afterwards."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the table, and below it what was broken."""
    lines = ["| Fault | Injections | Must hold | What came of it | Broken |", "|---|---:|---|---|---:|"]
    for row in rows:
        came = "; ".join(f"{number:,} {what}" for what, number in row.outcomes.most_common())
        came = "; ".join([came, *row.notes])
        lines.append(f"| {row.fault} | {row.injections:,} | {row.must_hold} | {came} | {len(row.broken):,} |")
    for row in rows:
        lines += [f"\n{row.fault}: {text}" for text in row.broken[:10]]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row]) -> str:
    """Return the table for programs."""
    table = [
        {
            "fault": row.fault,
            "must_hold": row.must_hold,
            "injections": row.injections,
            "outcomes": dict(row.outcomes),
            "notes": row.notes,
            "broken": row.broken,
            "seconds": round(row.seconds, 1),
        }
        for row in rows
    ]
    return json.dumps(table, indent=2) + "\n"
