"""Two processes of one run: one of them killed, frozen or asked to stop."""

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chaos_run
from chaos_kills import results_of
from chaos_stops import LARGE, WITHIN, note_seconds, wait_for
from chaos_table import Child, Effort, Ended, Outcome, Row, scratch_folder, spread

OUT_WITHIN = 15.0
"""Seconds from the loss of a process to the end of the other."""
SILENT = "process 1 has been silent for 6 s: killed, frozen or cut off"
LOSSES = (
    ("the second of two processes killed", signal.SIGKILL, 1, SILENT),
    ("the second of two processes frozen", signal.SIGSTOP, 1, SILENT),
    # JAX's runtime is quicker here, and speaks in its own words.
    ("the first of two processes killed", signal.SIGKILL, 0, "leader task was preempted/died"),
    ("the first of two processes frozen", signal.SIGSTOP, 0, "process 0 has not answered for 6 s"),
)
"""What is lost, by which signal, which process that is, and what the other one says."""


@dataclass(frozen=True)
class Blow:
    """A signal to one of two processes.

    Attributes:
      seed: of its moment.
      number: of the signal.
      process: that gets it.
      cause: what the other one must say.
      expected: hash of the state and the losses of two processes that nobody disturbed.
    """

    seed: int
    number: int
    process: int
    cause: str
    expected: tuple[str, list[float]]
    scratch: Path


def lost(effort: Effort) -> Iterator[Row]:
    """Kill, freeze and stop one of two processes."""
    with scratch_folder(effort.scratch) as folder:
        for ended in go_on(folder):
            if ended.code:
                raise RuntimeError(ended.said)
        expected = results_of(folder / "run")

    def blows(number: int, process: int, cause: str) -> list[Blow]:
        return [
            Blow(effort.seed + moment, number, process, cause, expected, effort.scratch)
            for moment in range(effort.times(4))
        ]

    for name, number, process, cause in LOSSES:
        row = Row(name, "the other is out in 15 s, naming the cause; both go on to the same end")
        yield note_seconds(row, spread(lose_one, blows(number, process, cause)))
    row = Row("SIGTERM to one of two processes", "both saved and out in 10 s; they go on to the same end")
    both = [blow for process in range(2) for blow in blows(signal.SIGTERM, process, "stopped and saved at step")]
    yield note_seconds(row, spread(stop_both, both))
    if effort.share > 0.05:
        row = Row("SIGTERM to one of two processes, 36 million parameters", "both saved and out in 10 s")
        yield note_seconds(row, spread(stop_both_large, [(effort.scratch, process) for process in range(2)]))


def start_both(folder: Path, *flags: str) -> list[Child]:
    """Start, or go on with, a run of two processes; what each says goes to a file."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    common = (f"--out={folder / 'run'}", *flags)
    return [
        Child.start(chaos_run.command(*common, f"--distributed=127.0.0.1:{port},2,{index}"), folder / f"said{index}")
        for index in range(2)
    ]


def go_on(folder: Path, *flags: str) -> list[Ended]:
    """Let both processes go on to the end."""
    return [child.wait() for child in start_both(folder, *flags)]


def strike(blow: Blow, folder: Path) -> tuple[list[Child], float]:
    """Start both processes and send one of them the signal, some time after the first checkpoint."""
    rng = random.Random(blow.seed)
    children = start_both(folder, "--pause=0.1")
    wait_for(folder / "run" / "checkpoints" / "4" / "digests.json", children[0])
    time.sleep(rng.uniform(0.0, 2.0))
    with contextlib.suppress(ProcessLookupError):
        os.kill(children[blow.process].pid, blow.number)
    return children, time.monotonic()


def check_end(blow: Blow, folder: Path) -> Outcome | None:
    """Let both go on to the end; return what is wrong with it."""
    for ended in go_on(folder):
        if ended.code:
            return Outcome("not resumed", ended.said)
    if results_of(folder / "run") != blow.expected:
        return Outcome("ended otherwise", str(folder))
    return None


def lose_one(blow: Blow) -> list[Outcome]:
    """Kill or freeze one of two processes, then let both go on."""
    with scratch_folder(blow.scratch) as folder:
        children, since = strike(blow, folder)
        other = children[1 - blow.process].wait()
        seconds = time.monotonic() - since
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[blow.process].pid, signal.SIGKILL)
        children[blow.process].wait()
        if other.code == 0 or blow.cause not in other.said or seconds > OUT_WITHIN:
            return [Outcome("not out well", f"exit code {other.code} after {seconds:.1f} s: {other.said}")]
        return [check_end(blow, folder) or Outcome(f"out and gone on, {seconds:.2f} s")]


def stop_both(blow: Blow) -> list[Outcome]:
    """Send SIGTERM to one of two processes, then let both go on."""
    with scratch_folder(blow.scratch) as folder:
        children, since = strike(blow, folder)
        ends = [child.wait() for child in children]
        seconds = time.monotonic() - since
        if any(end.code != 130 or blow.cause not in end.said for end in ends) or seconds > WITHIN:
            return [Outcome("not stopped well", f"after {seconds:.1f} s: {ends}")]
        return [check_end(blow, folder) or Outcome(f"saved and gone on, {seconds:.2f} s")]


def stop_both_large(job: tuple[Path, int]) -> list[Outcome]:
    """Send SIGTERM to one of two processes that train 36 million parameters."""
    scratch, process = job
    with scratch_folder(scratch) as folder:
        children = start_both(folder, *LARGE)
        wait_for(folder / "run" / "metrics.jsonl", children[0], '"step": 2,')
        since = time.monotonic()
        os.kill(children[process].pid, signal.SIGTERM)
        ends = [child.wait(300) for child in children]
        seconds = time.monotonic() - since
        if any(end.code != 130 or "stopped and saved at step" not in end.said for end in ends) or seconds > WITHIN:
            return [Outcome("not stopped well", f"after {seconds:.1f} s: {ends}")]
        return [Outcome(f"saved and out, {seconds:.2f} s")]
