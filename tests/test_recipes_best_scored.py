"""What had been learned at the best score is at hand wherever a run was killed, and nothing more is kept for it."""

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.metrics import MetricsLog
from jaxdiff.recipes.best_scored import BestScored

SCORES = (50.0, 60.0, 55.0, 61.0, 61.0, 62.0, 40.0)
"""Of steps 1, 2, ...; every third step has a checkpoint."""


class KilledError(Exception):
    """Here the run was killed."""


class Run:
    """A run of the same order as the training loop's; every file that it writes is a moment to be killed after."""

    def __init__(self, out, moments: int = 1000):
        self.out, self.left = out, moments

    def moment(self) -> None:
        self.left -= 1
        if not self.left:
            raise KilledError

    def go(self, scores=SCORES) -> BestScored:
        run = self

        class Log(MetricsLog):
            def write(self, step, figures):
                run.moment()  # what was learned is in its file, its score not yet in the log
                super().write(step, figures)
                run.moment()

        checkpoints = Checkpoints(self.out / "checkpoints")
        state = {"x": np.zeros(2, np.float32)}
        _, start = checkpoints.restore(state) or (state, 0)
        log = Log(self.out, start)
        try:
            best = BestScored(self.out, log, checkpoints, keeping=True)
            for step in range(max(start, 1), len(scores) + 1):
                if step % 3 == 0:
                    checkpoints.save(step, state)
                    checkpoints.wait()
                    self.moment()
                best.note(step, scores[step - 1], learned(step))
            return best
        finally:
            checkpoints.close()
            log.close()


def learned(step: int) -> dict[str, np.ndarray]:
    return {"<new1>": np.full((1, 4), step, np.float32), "matrix": np.full((2, 3), -step, np.float32)}


def kept_steps(out) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (out / "best_scored").iterdir())


def assert_best(best: BestScored, step: int) -> None:
    assert best.step == step
    found = best.read()
    assert found.keys() == learned(step).keys()
    for name, array in learned(step).items():
        np.testing.assert_array_equal(found[name], array)


def killed(folder, moment: int):
    """Return where a run was killed after so many moments, which is in its `moment`th file."""
    folder.mkdir()
    with pytest.raises(KilledError):
        Run(folder, moment).go()
    return folder


def test_wherever_a_run_is_killed_it_ends_with_the_best(tmp_path):
    whole = Run(tmp_path)
    assert_best(whole.go(), 6)
    moments = 1000 - whole.left
    assert moments == 2 * len(SCORES) + 2
    # Among them, of steps that were the best and others: before the log has the score, after that, and at checkpoints.
    for moment in (1, 4, 5, 6, 8, 9, 12, 13, 15):
        assert_best(Run(killed(tmp_path / str(moment), moment)).go(), 6)


def test_scores_may_be_others_when_a_killed_run_goes_on(tmp_path):
    """As on a machine that rounds otherwise: step 4 was the best when the run was killed, but goes on from step 3."""
    out = killed(tmp_path / "killed", 11)
    assert kept_steps(out) == [2, 4]
    assert_best(Run(out).go((*SCORES[:3], *[0.0] * 4)), 2)


def test_what_no_checkpoint_goes_back_to_is_deleted(tmp_path):
    best = Run(tmp_path).go()
    # Checkpoints 3 and 6 are left, until which steps 2 and 6 were the best.
    assert kept_steps(tmp_path) == [2, 6]
    assert list(best.scores.values()) == list(SCORES)


def test_what_is_not_of_the_run_stays_and_what_was_half_written_goes(tmp_path):
    folder = tmp_path / "best_scored"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes(b"mine")
    (folder / "step_0000009.safetensors").write_bytes(b"of a run without --patience")
    (folder / "step_0000009.safetensors.partial").write_bytes(b"half")
    log, checkpoints = MetricsLog(tmp_path, 0), Checkpoints(tmp_path / "checkpoints")
    try:
        for keeping, left in ((False, 3), (True, 1)):
            BestScored(tmp_path, log, checkpoints, keeping)
            assert len(list(folder.iterdir())) == left
    finally:
        checkpoints.close()
        log.close()
    assert (folder / "mine.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda path: path.unlink(), "missing, though the step scored best"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"), "has changed since it was written"),
    ],
)
def test_what_is_lost_or_damaged_is_told_before_anything_is_learned(tmp_path, harm, sentence):
    Run(tmp_path).go()
    harm(tmp_path / "best_scored" / "step_0000006.safetensors")
    with pytest.raises(InputError, match=sentence):
        Run(tmp_path).go()
