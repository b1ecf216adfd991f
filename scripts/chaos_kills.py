"""SIGKILL: at random moments, in each phase of a save, and of the real train_cfg."""

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chaos_run
from chaos_table import Child, Effort, Outcome, Row, scratch_folder, spread

from jaxdiff.io.checkpoint import find_damage

INTERVAL = chaos_run.Config.save_every
RUN_SECONDS = 1.8
"""About the length of a run that nobody kills."""
LOST, LATE = " steps lost", "ended before the kill"


@dataclass(frozen=True)
class Kills:
    """A run that is killed some times on its way, then let go on to its end.

    Attributes:
      phases: of the kills; None for a random moment.
      expected: hash of the state and the losses of a run that nobody killed.
    """

    seed: int
    phases: tuple[str | None, ...]
    expected: tuple[str, list[float]]
    scratch: Path


def killed(effort: Effort) -> Iterator[Row]:
    """Kill small runs often and real ones sometimes."""
    row = Row(
        "SIGKILL at random moments and in each phase of a save",
        "every run goes on; at most the save under way is lost; the end is bit-equal to that of a run nobody killed",
    )
    with scratch_folder(effort.scratch) as folder:
        if (ended := Child.start(chaos_run.command(f"--out={folder / 'run'}"), folder / "said").wait()).code:
            raise RuntimeError(ended.said)
        expected = results_of(folder / "run")
    rng = random.Random(effort.seed)
    random_moments: list[str | None] = [None] * effort.times(190)
    in_phases = [phase for phase in chaos_run.PHASES for _ in range(effort.times(12))]
    kills = random_moments + in_phases
    rng.shuffle(kills)
    jobs = [
        Kills(effort.seed + first, tuple(kills[first : first + 4]), expected, effort.scratch)
        for first in range(0, len(kills), 4)
    ]
    row.add(spread(kill_often, jobs))
    lost = Counter({int(what.split()[0]): n for what, n in row.outcomes.items() if what.endswith(LOST)})
    within = sum(number for steps, number in lost.items() if steps <= INTERVAL)
    for steps in lost:
        del row.outcomes[f"{steps}{LOST}"]
    row.outcomes["killed and gone on"] = lost.total()
    late = row.outcomes.pop(LATE, 0)
    row.notes = [
        f"{within:,} lost at most one interval of {INTERVAL} steps, the worst {max(lost)} steps: a save of this tiny "
        f"run takes as long as its interval; {late:,} more kills came after the end and are not counted"
    ]
    yield row


def results_of(run: Path) -> tuple[str, list[float]]:
    """Return the hash of a finished run's state, and all its losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "results.json").read_text())["state"], [line["loss"] for line in lines]


def kill_often(job: Kills) -> list[Outcome]:
    """Start a run, kill it, start it again, ..., and see what became of it."""
    rng = random.Random(job.seed)
    outcomes = []
    with scratch_folder(job.scratch) as folder:
        run = folder / "run"
        for phase in job.phases:
            if not (run / "results.json").exists():
                outcomes.append(kill_once(run, phase, rng))
            else:  # the kill came after the end: a new run
                outcomes += finish(run, job.expected)
                run = folder / f"run{len(outcomes)}"
                outcomes.append(kill_once(run, phase, rng))
        return outcomes + finish(run, job.expected)


def kill_once(run: Path, phase: str | None, rng: random.Random) -> Outcome:
    """Start or go on with a run, kill it, and see what is left."""
    flags = [f"--out={run}", *([f"--trap={phase}", f"--trap-at={rng.randint(1, 3)}"] if phase else [])]
    child = Child.start(chaos_run.command(*flags), run.parent / "said")
    if phase is None:
        child.kill_after(rng.uniform(0.2, RUN_SECONDS))
    ended = child.wait()
    if ended.code not in (-signal.SIGKILL, 0):
        return Outcome("not resumed", f"{phase}: exit code {ended.code}: {ended.said}")
    if ended.code == 0:
        return Outcome(LATE)
    if "damaged" in ended.said:
        return Outcome("damage announced", f"{phase}: {ended.said}")
    log = run / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    done = max((int(step) for step in re.findall(r'"step": (\d+),', text)), default=0)
    good = [int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
    bad = [step for step in good if find_damage(run / "checkpoints" / str(step))]
    if bad:
        return Outcome("committed, not sealed", f"{phase}: checkpoints {bad}")
    left = max(good, default=0)
    # A save may be under way until the step at which the next one is due, and that step is logged before it.
    if done - left > 2 * INTERVAL:
        return Outcome("more than one save lost", f"{phase}: done {done}, left {left}")
    return Outcome(f"{done - left}{LOST}")


def finish(run: Path, expected: tuple[str, list[float]]) -> list[Outcome]:
    """Let a run go on to its end, and compare it with one that nobody killed."""
    good = [int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
    ended = Child.start(chaos_run.command(f"--out={run}"), run.parent / "said").wait()
    if ended.code or f"going on from step {max(good, default=0)}\n" not in ended.said:
        return [Outcome("not resumed", ended.said)]
    if results_of(run) != expected:
        return [Outcome("ended otherwise", f"{run}: {ended.said}")]
    return []
