"""A resumed log reads like one that was never cut, in both of its files."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxdiff.io import metrics


def write_steps(folder, resumed, steps):
    log = metrics.MetricsLog(folder, resumed)
    for step in steps:
        log.write(step, {"loss": 1.0 / step})
    log.close()


@pytest.mark.parametrize("saved", [0, 3, 5])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, saved):
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    write_steps(tmp_path / "whole", 0, range(1, 9))
    write_steps(tmp_path / "resumed", 0, range(1, 6))
    write_steps(tmp_path / "resumed", saved, range(saved + 1, 9))
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo\xff')
    assert [line["step"] for line in metrics.read_lines(path)] == [1, 2, 3]
    write_steps(tmp_path, 3, [4])
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_every_line_is_on_disk_before_the_log_is_closed(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 0.5})
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    log.close()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_non_finite_figure_is_refused_and_nothing_is_logged(tmp_path, bad):
    log = metrics.MetricsLog(tmp_path, 0)
    with pytest.raises(ValueError, match=r"norm is .* at step 2"):
        log.write(2, {"loss": 0.5, "norm": bad})
    log.close()
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == []
    assert read_board(tmp_path / "tensorboard") == {}


def read_board(folder):
    """Return {step: loss} as TensorBoard shows it: files by name; a session start drops its step and later ones."""
    shown = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length (8 bytes), its checksum (4), data, its checksum (4)
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = {step: value for step, value in shown.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    shown[event.step] = value.simple_value
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write_steps(tmp_path, 0, range(1, 6))
    metrics.MetricsLog(tmp_path, 3).close()
    # Steps 4 and 5 were dropped and have not been done again yet.
    assert sorted(read_board(tmp_path / "tensorboard")) == [1, 2, 3]
    write_steps(tmp_path, 3, range(4, 9))
    assert sorted(read_board(tmp_path / "tensorboard")) == list(range(1, 9))


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "2"}', "3"])
def test_what_is_no_line_of_a_log_ends_it(tmp_path, line):
    (tmp_path / metrics.METRICS).write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    assert metrics.read_lines(tmp_path / metrics.METRICS) == [{"step": 1, "loss": 2.0}]
