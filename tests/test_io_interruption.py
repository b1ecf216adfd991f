"""A stop request: the first signal asks, the second one ends the process however busy it is."""

import signal
import subprocess
import sys
import time

import pytest

BUSY = """
from jaxdiff.io.interruption import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        pass
    print("asked", flush=True)
    sum(range(10**15))  # days in C, where Python itself heeds no signal
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
)
def test_the_second_signal_ends_even_a_process_that_is_deep_in_a_computation(first, second):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(second)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -second
    assert "once more to leave at once" in err
    assert "Traceback" not in err


DEAF = """
import hashlib
from jaxdiff.io import interruption
interruption.GRACE = 1.0
with interruption.obey_signals("left alone"):
    print("ready", flush=True)
    {protect}
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # long in C, beside other threads, as compiled programs are
"""
WORK = "stop = interruption.StopRequest(); stop.__enter__(); stop.protect()"


@pytest.fixture
def deaf():
    """Start processes that are deep in a computation, and end them with the test."""
    processes = []

    def begin(protect=""):
        command = [sys.executable, "-c", DEAF.format(protect=protect)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_too_busy_to_notice_is_ended_after_a_while_where_nothing_is_to_be_saved(deaf, number):
    process = deaf()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "\nleft alone\n")


def test_work_to_be_saved_is_waited_for_until_the_second_signal(deaf):
    process = deaf(WORK)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # at once, as `timeout` does: still the first
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")


def ended(program):
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return answer.returncode, answer.stdout, answer.stderr


def test_a_request_in_the_middle_of_garbage_collection_is_not_lost():
    program = """
import gc, signal, time
from jaxdiff.io.interruption import obey_signals

begin = time.monotonic()

def collecting(phase, info):
    if phase == "start":
        gc.callbacks.remove(collecting)
        signal.raise_signal(signal.SIGTERM)

with obey_signals("left alone"):
    try:
        gc.callbacks.append(collecting)
        gc.collect()
        begin = time.monotonic()
        time.sleep(4)  # ends at once
        print("lost")
    except KeyboardInterrupt:
        print("raised", "late" if time.monotonic() - begin > 3 else "at once")
"""
    assert ended(program) == (0, "raised at once\n", "")


def test_a_request_in_the_middle_of_a_class_being_made_has_the_exit_code_of_any_other(tmp_path):
    # dataclasses execute strings, after which CPython would end the process by SIGINT.
    program = """
import dataclasses, signal, sys
from jaxdiff.command import run_command

@dataclasses.dataclass(frozen=True)
class Config:
    "None."

def run(config):
    exec("signal.raise_signal(signal.SIGTERM)")

sys.exit(run_command("job", Config, run, []))
"""
    (tmp_path / "job.py").write_text(program)
    answer = subprocess.run([sys.executable, "-m", "job"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert answer.returncode == 130
    assert answer.stderr == "\njaxdiff job: interrupted; run the same command again to go on\n"
