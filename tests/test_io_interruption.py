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
