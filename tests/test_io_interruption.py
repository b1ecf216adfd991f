"""A stop request: the first signal asks, the second one ends the process however busy it is."""

import signal
import subprocess
import sys

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
