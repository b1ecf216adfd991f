"""What stops a run, from outside or from inside: SIGTERM, numbers that are not finite, a second run in its folder."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import chaos_run
from chaos_kills import results_of
from chaos_table import Child, Effort, Ended, Outcome, Row, scratch_folder, spread

from jaxdiff.io.interruption import SAME

WITHIN = 10.0
"""Seconds from the first signal to the end."""
OUT_AT_ONCE = "out at once, then gone on"
AT_ONCE = 2.0
"""Seconds from the second signal to the end: the system's own time to take a process's memory back."""
LARGE = ("--width=6000", "--train-steps=40", "--save-every=1000")
"""36 million parameters: 576 MB with their average and the optimiser's moments."""
TRAIN_CFG = [
    "--data=digits",
    "--devices=1",
    "--preset=tiny",
    "--train-steps=8",
    "--batch-size=8",
    "--warmup-steps=2",
    "--log-every=1",
    "--save-every=4",
    "--sample-every=100",
    "--judge-steps=5",
    "--samples-per-class=2",
    "--num-steps=3",
    "--sample-batch-size=20",
]


def stopped(effort: Effort) -> Iterator[Row]:
    """Send SIGTERM once and twice, to small runs, large ones and train_cfg."""
    small = Row("SIGTERM at random moments of a small run", "saved and out in 10 s; goes on to the same end")
    with scratch_folder(effort.scratch) as folder:
        if (ended := Child.start(chaos_run.command(f"--out={folder / 'run'}"), folder / "said").wait()).code:
            raise RuntimeError(ended.said)
        expected = results_of(folder / "run")
    stops = [Stop(seed, expected, effort.scratch) for seed in range(effort.times(16))]
    yield note_seconds(small, spread(stop_and_go_on, stops))
    if effort.share <= 0.05:  # what follows takes long
        return
    twice = Row("a second SIGTERM, in the middle of the first one's save", "out at once; the last save is intact")
    twice.add(spread(stop_twice, [Stop(seed, expected, effort.scratch) for seed in range(effort.times(8))]))
    if OUT_AT_ONCE not in twice.outcomes:
        twice.add([Outcome("never in the middle of a save", "every save was over too soon")])
    yield twice
    large = Row("SIGTERM, 36 million parameters", "saved and out in 10 s")
    stops = [Stop(seed, expected, effort.scratch) for seed in range(effort.times(3))]
    yield note_seconds(large, spread(stop_large, stops))
    commands = Row(
        "SIGTERM and SIGKILL to train_cfg itself, as it loads, compiles, trains, judges",
        "out in 10 s; goes on to the same end",
    )
    with scratch_folder(effort.scratch) as folder:
        compiled = folder / "compiled"
        for name in ("compiling", "whole"):
            since = time.monotonic()
            train_cfg(folder / name, compiled).communicate()
            length = time.monotonic() - since
        undisturbed = Undisturbed(compiled, length, hashes(folder / "whole"))
        jobs = [
            (folder, undisturbed, effort.seed + number, effort.times(4), number)
            for number in (signal.SIGTERM, signal.SIGKILL)
        ]
        yield note_seconds(commands, spread(stop_train_cfg, jobs))


def note_seconds(row: Row, outcomes: Iterable[Outcome]) -> Row:
    """Move the seconds that outcomes name into a note."""
    row.add(outcomes)
    seconds = []
    for what in list(row.outcomes):
        if match := re.fullmatch(r"(.*), ([\d.]+) s", what):
            number = row.outcomes.pop(what)
            row.outcomes[match[1]] += number
            seconds += [float(match[2])] * number
    if seconds:
        row.notes.append(f"at most {max(seconds):.1f} s from signal to end")
    return row


@dataclass(frozen=True)
class Stop:
    """A run to be stopped."""

    seed: int
    expected: tuple[str, list[float]]
    scratch: Path


def stop_and_go_on(job: Stop) -> list[Outcome]:
    """Stop a run once, then let it go on to its end."""
    rng = random.Random(job.seed)
    with scratch_folder(job.scratch) as folder:
        run, said = folder / "run", folder / "said"
        child = Child.start(chaos_run.command(f"--out={run}", "--pause=0.02"), said)
        wait_for(run / "config.json", child)
        child.kill_after(rng.uniform(0.0, 1.5), signal.SIGTERM)
        since = time.monotonic()
        ended = child.wait()
        seconds = time.monotonic() - since
        if ended.code == 0:
            return [Outcome("ended before the signal")]
        saved = re.search(r"saved at step (\d+)|(interrupted; run)|trained to the end", ended.said)
        if ended.code != 130 or not saved or "Traceback" in ended.said or seconds > WITHIN:
            return [Outcome("not stopped well", f"exit code {ended.code} after {seconds:.1f} s: {ended.said}")]
        again = Child.start(chaos_run.command(f"--out={run}"), said).wait()
        start = f"going on from step {saved[1]}\n" if saved[1] else ""
        if again.code or start not in again.said or results_of(run) != job.expected:
            return [Outcome("not resumed", f"{ended.said}, then {again.code}: {again.said}")]
        return [Outcome(f"{'saved' if saved[1] else 'nothing to save yet'} and out, {seconds:.2f} s")]


def wait_for(path: Path, child: Child, text: str = "") -> None:
    """Wait until a file is there and holds a text, or the child has ended."""
    while not (path.exists() and text in path.read_text(errors="replace")) and not child.has_ended():
        time.sleep(0.002)


def stop_twice(job: Stop) -> list[Outcome]:
    """Stop a run, and again while it saves."""
    rng = random.Random(job.seed)
    with scratch_folder(job.scratch) as folder:
        run, said = folder / "run", folder / "said"
        flags = (f"--out={run}", "--pause=0.02", "--width=5000", "--save-every=5", "--train-steps=15")  # 400 MB to save
        child = Child.start(chaos_run.command(*flags), said)
        wait_for(run / "checkpoints" / "5" / "digests.json", child)
        os.kill(child.pid, signal.SIGTERM)
        wait_for(said, child, "once more to leave at once")
        time.sleep(SAME + rng.uniform(0.05, 0.3))  # sooner, it would count as the first one again
        since = time.monotonic()
        child.kill_after(0.0, signal.SIGTERM)
        ended = child.wait()
        seconds = time.monotonic() - since
        if ended.code == 130:
            return [Outcome("saved before the second signal")]
        again = Child.start(chaos_run.command(*flags), said).wait()
        start = re.search(r"going on from step (\d+)", again.said)
        if ended.code not in (-signal.SIGTERM, 128 + signal.SIGTERM) or seconds > AT_ONCE:
            return [Outcome("not at once", f"exit code {ended.code} after {seconds:.2f} s: {ended.said}")]
        if again.code or not start or int(start[1]) < 5 or "damaged" in again.said:
            return [Outcome("not resumed", again.said)]
        return [Outcome(OUT_AT_ONCE)]


def stop_large(job: Stop) -> list[Outcome]:
    """Stop a run of 36 million parameters."""
    with scratch_folder(job.scratch) as folder:
        run = folder / "run"
        child = Child.start(chaos_run.command(f"--out={run}", *LARGE), folder / "said")
        wait_for(run / "metrics.jsonl", child, '"step": 2,')
        since = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        ended = child.wait(300)
        seconds = time.monotonic() - since
        saved = re.search(r"saved at step (\d+)", ended.said)
        if ended.code != 130 or not saved or not (run / "checkpoints" / saved[1] / "digests.json").exists():
            return [Outcome("not saved", f"exit code {ended.code}: {ended.said}")]
        return [Outcome(f"saved and out, {seconds:.2f} s", f"{seconds:.1f} s" if seconds > WITHIN else None)]


def train_cfg(run: Path, compiled: Path) -> subprocess.Popen[str]:
    """Start the real command, which keeps its compiled programs in a folder, so that each run starts in seconds."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "jaxdiff.train_cfg", *TRAIN_CFG, f"--out={run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def hashes(run: Path) -> dict[str, str]:
    """Return what a finished run says of its parameters and its judge."""
    return json.loads((run / "results.json").read_text())["hashes"]


@dataclass(frozen=True)
class Undisturbed:
    """A run of train_cfg that nobody stops.

    Attributes:
      compiled: its programs.
      seconds: that it takes.
      hashes: of its end.
    """

    compiled: Path
    seconds: float
    hashes: dict[str, str]


def stop_train_cfg(job: tuple[Path, Undisturbed, int, int, int]) -> list[Outcome]:
    """Send train_cfg a signal at moments over its whole length, each time letting the next one go on."""
    scratch, undisturbed, seed, times, number = job
    compiled, length, expected = undisturbed.compiled, undisturbed.seconds, undisturbed.hashes
    rng, outcomes = random.Random(seed), []
    with scratch_folder(scratch) as folder:
        run = folder / "run0"
        for moment in rng.sample(range(100), times):
            process = train_cfg(run, compiled)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0 + (length - 1.0) * moment / 100)
            since = time.monotonic()
            process.send_signal(number)
            said, _ = process.communicate(timeout=300)
            seconds = time.monotonic() - since
            if process.returncode == 0:
                run = run.with_name(f"run{len(outcomes) + 1}")
                outcomes.append(Outcome("ended before the signal"))
            elif number == signal.SIGKILL and process.returncode == -number:
                outcomes.append(Outcome("killed"))
            elif process.returncode not in (130, -number) or "Traceback" in said or seconds > WITHIN:
                outcomes.append(Outcome("not stopped well", f"{process.returncode}, {seconds:.1f} s: {said}"))
            else:
                saved = " and saved" if "saved at step" in said else ""
                outcomes.append(Outcome(f"stopped{saved}, {seconds:.2f} s"))
        again = train_cfg(run, compiled)
        said, _ = again.communicate(timeout=300)
        if again.returncode or hashes(run) != expected:
            outcomes.append(Outcome("not resumed", said))
    return outcomes


def not_finite(effort: Effort) -> Iterator[Row]:
    """Poison one step of a run."""
    row = Row(
        "NaN in a batch, so in loss and gradient",
        "stops, naming the step; nothing bad saved; goes on from the last good one",
    )
    row.add(spread(poison, [(effort.scratch, step) for step in range(1, 1 + max(2, effort.times(12)))]))
    yield row


def poison(job: tuple[Path, int]) -> list[Outcome]:
    """Run into NaN at a step, then go on with good batches."""
    scratch, step = job
    with scratch_folder(scratch) as folder:
        run, said = folder / "run", folder / "said"
        ended = Child.start(chaos_run.command(f"--out={run}", f"--poison={step}"), said).wait()
        good = (step - 1) // 4 * 4
        left = f"The last good checkpoint is step {good}" if good else "Nothing was saved"
        if ended.code != 2 or f"diverged at step {step}: loss nan" not in ended.said or left not in ended.said:
            return [Outcome("not stopped", ended.said)]
        again = Child.start(chaos_run.command(f"--out={run}"), said).wait()
        if again.code or f"going on from step {good}\n" not in again.said:
            return [Outcome("not resumed", again.said)]
        return [Outcome("stopped and gone on")]


def two_runs(effort: Effort) -> Iterator[Row]:
    """Start a second run in a folder where one is running, kill the first, start the second again."""
    row = Row("a second run started in a run's folder", "refused in one sentence; free again when the first is killed")
    row.add(spread(start_twice, [(effort.scratch, seed) for seed in range(effort.times(12))]))
    yield row


def start_twice(job: tuple[Path, int]) -> list[Outcome]:
    """Start two runs in one folder, a moment apart."""
    scratch, seed = job
    rng = random.Random(seed)
    with scratch_folder(scratch) as folder:
        command = chaos_run.command(f"--out={folder / 'run'}", "--pause=0.05")
        children = [Child.start(command, folder / "said0")]
        time.sleep(rng.choice([0.0, rng.uniform(0, 2)]))
        children.append(Child.start(command, folder / "said1"))
        while not any(child.has_ended() for child in children):
            time.sleep(0.005)
        refused = next(child for child in children if child.has_ended())
        other = next(child for child in children if child is not refused)
        answer: Ended = refused.wait()
        other.kill_after(0.2)
        other.wait()
        if answer.code != 2 or "another run is writing there (" not in answer.said or "Traceback" in answer.said:
            return [Outcome("not refused", answer.said)]
        again = Child.start(chaos_run.command(f"--out={folder / 'run'}"), folder / "said0").wait()
        if again.code:
            return [Outcome("not free again", again.said)]
        return [Outcome("refused, then free")]
