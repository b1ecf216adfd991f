"""Several real processes on one machine: the same run as one process, stopped together, and out when one is lost."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import finish, run_here, start_several, xla_flags
from scale_job import Config, rows_at
from scale_job import run as run_job

from jaxdiff.command import run_command
from jaxdiff.io.metrics import METRICS, read_lines

JOB = str(Path(__file__).with_name("scale_job.py"))
STEPS = 12


def start_job(folder, number, *args):
    return start_several([JOB], number, f"--out={folder}", f"--steps={STEPS}", *args)


def job_here(folder, *args):
    """Run the job in this process, on some of its eight devices."""
    answer = run_here(
        lambda words: run_command("job", Config, run_job, words), f"--out={folder}", f"--steps={STEPS}", *args
    )
    assert answer.code == 0, answer.err
    return answer


def losses(folder):
    lines = read_lines(folder / METRICS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def rows_read(folder):
    """Return the rows that all processes read at each step, in the order of the processes, as last read."""
    found = {}
    for path in sorted(folder.glob("seen_*.jsonl")):
        own = dict(json.loads(line) for line in path.read_text().splitlines())
        for step, rows in own.items():
            found.setdefault(step, []).extend(rows)
    return [found[step] for step in sorted(found)]


def wait_for(folder, step, jobs, saved=None):
    """Wait until a run has logged a step, and committed a checkpoint."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_lines(folder / METRICS)) or not (
        saved is None or (folder / "checkpoints" / str(saved)).is_dir()
    ):
        assert time.monotonic() < deadline, [job.poll() for job in jobs]
        assert all(job.poll() is None for job in jobs), [finish(job).err for job in jobs]
        time.sleep(0.05)


@contextlib.contextmanager
def ended(jobs):
    """Leave no process behind, whatever the test finds."""
    try:
        yield
    finally:
        for job in jobs:
            job.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one device of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    job_here(folder, "--devices=1")
    return folder


def test_the_rows_are_those_of_the_data_order(alone):
    read = rows_at()
    assert rows_read(alone) == [read(step).labels.tolist() for step in range(STEPS)]


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_request_to_one_process_stops_all_after_one_step_and_any_other_number_goes_on(tmp_path, alone, number):
    folder = tmp_path / "run"
    jobs = start_job(folder, number, "--pause=0.3", "--save-every=100")
    with ended(jobs):
        wait_for(folder, 2, jobs)
        before, asked = len(read_lines(folder / METRICS)), time.monotonic()
        jobs[-1].send_signal(signal.SIGTERM)
        answers = [finish(job) for job in jobs]
    # Some seconds, unless the machine is busy.
    assert time.monotonic() - asked < 60
    assert [answer.code for answer in answers] == [130] * number, answers
    (step,) = {re.search(r"stopped and saved at step (\d+) of 12", answer.err)[1] for answer in answers}
    assert int(step) <= before + 4
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [step]
    # Each read its own part, and only the first one spoke.
    assert sorted(path.name for path in folder.glob("seen_*")) == [f"seen_{index}.jsonl" for index in range(number)]
    assert [bool(re.search("going on", answer.out)) for answer in answers] == [True] + [False] * (number - 1)
    first = [json.loads(line)[1] for line in (folder / "seen_0.jsonl").read_text().splitlines()]
    assert {len(rows) for rows in first} == {8 // number}
    assert f"going on from step {step}" in job_here(folder, "--devices=1").out
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=1e-5)


def end_of(folder, alone):
    """Run a job again, on other devices, after it broke off, and hold it to the run that never did."""
    assert re.search("going on from step [2-9]", job_here(folder, "--devices=2").out)
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=1e-5)


def test_a_process_that_is_killed_or_frozen_is_named_and_the_run_goes_on(tmp_path, alone):
    # Both at once, because most of the time is spent waiting.
    signals = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
    jobs = {name: start_job(tmp_path / name, 2, "--pause=0.2", "--save-every=2") for name in signals}
    with ended([job for pair in jobs.values() for job in pair]):
        for name, number in signals.items():
            wait_for(tmp_path / name, 3, jobs[name], saved=2)
            jobs[name][1].send_signal(number)
        since = time.monotonic()
        answers = {name: finish(pair[0]) for name, pair in jobs.items()}
        # 15 at most, unless the machine is busy.
        assert time.monotonic() - since < 30
    for name, answer in answers.items():
        assert answer.code == 3, answer.err
        said = "process 0 leaves: process 1 has been silent for 6 s: killed, frozen or cut off; run the same command"
        assert said in answer.err
        assert "Traceback" not in answer.err
        end_of(tmp_path / name, alone)


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_others_with_its_reason(tmp_path, alone):
    folder = tmp_path / "run"
    jobs = start_job(folder, 2, "--pause=0.2", "--save-every=2", "--fail-at=8")
    with ended(jobs):
        leader, failed = map(finish, jobs)
    assert (failed.code, leader.code) == (2, 3)
    assert "jaxdiff job: error: pictures/7.png: Input/output error" in failed.err
    assert "process 1 stopped: error: pictures/7.png: Input/output error\n" in leader.err
    end_of(folder, alone)


@pytest.mark.slow
def test_a_run_moves_between_devices_and_processes_with_the_same_values_and_rows(tmp_path, alone):
    folder = tmp_path / "run"
    stops = {2: "--devices=1", 4: "--mesh=data=1,fsdp=2", 6: "--mesh=data=4,fsdp=2"}
    for step, devices in stops.items():
        job_here(folder, f"--steps={step}", devices)
    for answer in map(finish, start_several([JOB], 2, f"--out={folder}", "--steps=9", "--mesh=data=1,fsdp=2")):
        assert answer.code == 0, answer.err
    job_here(folder, f"--steps={STEPS}", "--devices=1")
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=1e-5)
    assert rows_read(folder) == rows_read(alone)


def test_a_port_that_another_run_listens_at_is_refused_in_one_sentence(tmp_path):
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC does, so that it would share the port
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [sys.executable, JOB, f"--out={tmp_path / 'run'}", f"--distributed=127.0.0.1:{port},2,0"]
        answer = subprocess.run(words, capture_output=True, text=True)
    assert answer.returncode == 2
    assert f"port {port} cannot be used (Address already in use); give each run its own" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_others_never_come_says_so(tmp_path, index):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    program = (
        f"import runpy, sys; from jaxdiff import processes; processes.MEETING_SECONDS = 2.0; "
        f"sys.argv = ['job', '--out={tmp_path / 'run'}', '--distributed=127.0.0.1:{port},2,{index}']; "
        f"runpy.run_path({JOB!r}, run_name='__main__')"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2, answer.stderr
    assert "the processes have not met within 2 s; are all of them started" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_a_request_in_the_very_last_step_is_obeyed_by_all(tmp_path):
    answers = [finish(job) for job in start_job(tmp_path / "run", 2, "--stop-at-end")]
    assert [answer.code for answer in answers] == [130, 130], answers
    assert all("trained to the end and saved; run the same command again" in answer.err for answer in answers)


@pytest.mark.slow
def test_a_process_that_waits_and_is_asked_to_stop_tells_the_others(tmp_path):
    jobs = start_job(tmp_path / "run", 2, "--late=60")
    with ended(jobs):
        assert jobs[0].stdout.readline() == "late\n"
        time.sleep(2)
        jobs[1].send_signal(signal.SIGTERM)
        since = time.monotonic()
        leader, asked = map(finish, jobs)
    assert time.monotonic() - since < 12
    assert (asked.code, leader.code) == (130, 3)
    assert "process 0 leaves: process 1 stopped: jaxdiff job: interrupted" in leader.err


def test_auto_without_a_job_is_one_sentence(tmp_path):
    process = subprocess.run(
        [sys.executable, JOB, f"--out={tmp_path / 'run'}", "--distributed=auto"], capture_output=True, text=True
    )
    assert process.returncode == 2, process.stderr
    assert "--distributed auto: the processes cannot be joined" in process.stderr
    assert "start it by a job of SLURM, Open MPI, Kubernetes or Cloud TPU" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["slurm", "open mpi"])
def test_auto_finds_the_place_that_the_scheduler_gave(tmp_path, alone, scheduler):
    def variables(index):
        if scheduler == "slurm":
            names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
            return dict(zip(names, ("12345", "localhost", "2", str(index), str(index))))
        # What Open MPI's mpirun sets: the job's number and the address of its launcher, then the ranks.
        names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
        uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
        return uri | dict(zip(names, ("2", str(index), str(index))))

    environment = {**os.environ, "XLA_FLAGS": xla_flags(1)}
    jobs = [
        subprocess.Popen(
            [sys.executable, JOB, f"--out={tmp_path / 'run'}", f"--steps={STEPS}", "--distributed=auto"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **variables(index)},
        )
        for index in range(2)
    ]
    with ended(jobs):
        answers = [finish(job) for job in jobs]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert rows_read(tmp_path / "run") == rows_read(alone)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_others_leave_when_the_first_process_is_lost(tmp_path, alone, number):
    folder = tmp_path / "run"
    jobs = start_job(folder, 2, "--pause=0.2", "--save-every=2")
    with ended(jobs):
        wait_for(folder, 3, jobs, saved=2)
        jobs[0].send_signal(number)
        since = time.monotonic()
        answer = finish(jobs[1])
        assert time.monotonic() - since < 30
    if number == signal.SIGSTOP:
        assert answer.code == 3
        assert "process 1 leaves: process 0 has not answered for 6 s: killed, frozen or cut off" in answer.err
    else:
        # JAX's runtime is quicker, and speaks of the leader in its own words.
        assert answer.code != 0
        assert "leader task was preempted/died" in answer.err
    end_of(folder, alone)
