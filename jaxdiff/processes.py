"""Several processes that work as one: how they meet, who leads, and how all leave when one is lost.

Every process runs the same command. Process 0 leads: it alone prints, draws and reports. JAX's own runtime joins them
(jax.distributed) and would end a process, by SIGABRT, some seconds after another one fell silent; a watch that is
quicker names the silent one first. Nothing here is needed, and nothing runs, where a process works alone.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from jaxdiff.device_settings import ProcessSettings
from jaxdiff.errors import InputError

T = TypeVar("T")

EXIT_LOST = 3
"""Exit code of a process that leaves because of another one."""
SILENT_SECONDS = 6.0
"""A process that was not heard of for this long is lost."""
HEARTBEAT_SECONDS = 30
"""The same for JAX's runtime, which may speak after half of it, and shall only where the watch could not."""
BEAT_SECONDS = 1.0
MEETING_SECONDS = 300.0
"""How long a process waits at the start for the others to come."""
BARRIER_SECONDS = 7 * 24 * 3600
NEWS = "jaxdiff-news"
"""Folder of the coordinator's store that process 0 writes and the others read."""
FOUND = "jaxdiff-found"
"""Where it keeps what it alone looked up for all."""
COMMAND = "jaxdiff-command"
"""Where it keeps its command line, which must be that of all."""
BEATS = "jaxdiff-beats"
"""The folder that every process writes and process 0 reads."""
LOST = "killed, frozen or cut off; run the same command again to go on"
"""What is said of a silent process."""
MEET = "are all of them started, and is the port of process 0 free and open?"
"""What is asked where they do not meet."""


class _Group:
    """This process's place among several, and its line to the others."""

    def __init__(self, client: Any, index: int, count: int):
        self.client = client
        self.index = index
        self.count = count
        self.barriers = 0
        self.findings = 0
        self.stopping = threading.Event()
        now = time.monotonic()
        self._heard = dict.fromkeys(range(count), (-1, now))
        for work in (self._talk, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def beat(self, number: int, fault: str | None = None) -> None:
        """Tell process 0 that this one is alive, or what went wrong in it."""
        value = json.dumps({"beat": number, "fault": fault})
        self.client.key_value_set(f"{BEATS}/{self.index}", value, allow_overwrite=True)

    def tell(self, cause: str) -> None:
        """Have process 0 tell all others why they must leave; they read it in their next beat."""
        self.client.key_value_set(f"{NEWS}/cause", cause, allow_overwrite=True)
        time.sleep(2 * BEAT_SECONDS)  # their line goes with this process

    def _talk(self) -> None:
        """Beat every second; process 0 also reads all beats, and the others what it says of them."""
        number = 0
        while not self.stopping.wait(BEAT_SECONDS):
            number += 1
            try:
                self.beat(number)
                cause = self._read_beats() if self.index == 0 else self._read_news()
            except Exception:  # gRPC raises many types; a line that stays dead is noticed by `_listen`
                continue
            self._heard[0] = number, time.monotonic()
            if cause:
                leave_lost(cause)

    def _read_beats(self) -> str | None:
        """Note who has spoken, and return what is wrong with one of the others, having told all."""
        now = time.monotonic()
        cause = None
        for key, value in self.client.key_value_dir_get(BEATS):
            other, said = int(key.rsplit("/", 1)[-1]), json.loads(value)
            if said["beat"] != self._heard[other][0]:
                self._heard[other] = said["beat"], now
            if said["fault"] and other != self.index:
                cause = f"process {other} stopped: {said['fault']}"
        for other, (_, when) in self._heard.items():
            if other != self.index and now - when > SILENT_SECONDS:
                cause = f"process {other} has been silent for {SILENT_SECONDS:.0f} s: {LOST}"
        if cause:
            self.tell(cause)
        return cause

    def _read_news(self) -> str | None:
        """Return what process 0 says of a lost process."""
        return next((cause for _, cause in self.client.key_value_dir_get(NEWS)), None)

    def _listen(self) -> None:
        """Notice that process 0 no longer answers; in a thread of its own, because `_talk` waits for the answer."""
        while not self.stopping.wait(BEAT_SECONDS / 2):
            if self.index and time.monotonic() - self._heard[0][1] > SILENT_SECONDS:
                leave_lost(f"process 0 has not answered for {SILENT_SECONDS:.0f} s: {LOST}")


_group: _Group | None = None


def join(settings: ProcessSettings) -> None:
    """Join the other processes of the command; call it before JAX makes its devices.

    Raises:
      InputError: `auto` finds no job, the port of process 0 is taken, or the others cannot be reached.
    """
    global _group
    if settings.distributed is None or _group is not None:
        return
    import jax
    from jax._src import distributed  # the line to the coordinator has no public name

    # Its handler would swallow SIGTERM; `mesh.AgreedStop` has all processes stop after the same step.
    jax.config.update("jax_enable_preemption_service", False)
    place = settings.place
    known: dict[str, Any] = {} if place is None else place._asdict()
    flag = f"--distributed {settings.distributed}"
    if place is not None and place.process_id == 0:
        _require_free(int(place.coordinator_address.rsplit(":", 1)[-1]), flag)
    # JAX's runtime would abort the process, by a signal and with a stack, when the others do not come.
    alarm = threading.Timer(MEETING_SECONDS, _leave_alone, [flag])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=int(MEETING_SECONDS) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # ValueError, TypeError and gRPC's own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "give HOST:PORT,N,I, or start it by a job of SLURM, Open MPI, Kubernetes or Cloud TPU"
        raise InputError(
            f"{flag}: the processes cannot be joined ({reason}); " + (fix if place is None else MEET)
        ) from error
    finally:
        alarm.cancel()
    state = distributed.global_state
    if state.num_processes > 1:
        _group = _Group(state.client, state.process_id, state.num_processes)
        _check_same_command(state.client, state.process_id)  # refused as any other input, having told the others
        if state.process_id:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _require_free(port: int, flag: str) -> None:
    """Raise InputError where another program listens on the port: gRPC would share it, and two runs would mix."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{flag}: port {port} cannot be used ({reason}); give each run its own") from error


def _leave_alone(flag: str) -> None:
    """End this process, whose others have not come."""
    sys.stderr.write(f"jaxdiff: error: {flag}: the processes have not met within {MEETING_SECONDS:.0f} s; {MEET}\n")
    _exit(2)


def _check_same_command(client: Any, index: int) -> None:
    """Raise InputError where this process was not started by the command line of process 0, --distributed aside."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--distributed":
            next(given, None)
        elif not word.startswith("--distributed="):
            words.append(word)
    mine = json.dumps(words)
    if index == 0:
        client.key_value_set(COMMAND, mine, allow_overwrite=True)
    elif (theirs := client.blocking_key_value_get(COMMAND, BARRIER_SECONDS * 1000)) != mine:
        raise InputError(
            f"--distributed: process {index} was started with {' '.join(words)}, process 0 with "
            f"{' '.join(json.loads(theirs))}: give all the same flags"
        )


def count() -> int:
    """Return the number of processes."""
    return 1 if _group is None else _group.count


def index() -> int:
    """Return the number of this process; 0 leads."""
    return 0 if _group is None else _group.index


def is_leader() -> bool:
    """Tell whether this process prints and writes what is written once."""
    return index() == 0


def own_share(number: int) -> range:
    """Return which of `number` pieces of work are this process's."""
    return range(index(), number, count())


def barrier() -> None:
    """Wait for all other processes to come to the same line."""
    if _group is not None:
        _group.barriers += 1
        _group.client.wait_at_barrier(f"jaxdiff/{_group.barriers}", BARRIER_SECONDS * 1000)


def on_leader(work: Callable[[], T]) -> T | None:
    """Have process 0 do something while the others wait; return its result there and None elsewhere."""
    result = work() if is_leader() else None
    barrier()
    return result


def from_leader(find: Callable[[], T]) -> T:
    """Have process 0 look something up, a JSON value, and return it in all: each might find something else."""
    if _group is None:
        return find()
    _group.findings += 1
    key = f"{FOUND}/{_group.findings}"
    if _group.index:
        return json.loads(_group.client.blocking_key_value_get(key, BARRIER_SECONDS * 1000))
    found = find()
    _group.client.key_value_set(key, json.dumps(found))
    return found


def leader_first(work: Callable[[], T]) -> T:
    """Do something in process 0 and then in all others, which find what it kept; return each one's own result."""
    result = work() if is_leader() else None
    barrier()
    return work() if result is None else result


def finish() -> None:
    """Leave together, at the end of the command."""
    global _group
    if _group is None:
        return
    import jax

    barrier()
    _group.stopping.set()
    _group = None
    jax.distributed.shutdown()


def fail(code: int, sentence: str, details: str = "") -> None:
    """End this process of several, having told the others why; returns where it works alone.

    Not by raising: JAX's shutdown would wait for the others, which wait for this one.
    """
    if _group is None:
        return
    sys.stderr.write(details)
    _group.stopping.set()
    with contextlib.suppress(Exception):  # gRPC's, where the line is what failed
        if _group.index:
            _group.beat(-2, sentence)
        else:
            _group.tell(f"process 0 stopped: {sentence}")
    _exit(code)


def await_cause(error: BaseException) -> None:
    """Give the watch the time to name a lost process, where an error may only be what its loss left behind.

    JAX, Orbax and their libraries tell of a loss by errors of any type; what is refused at first hand is none.
    """
    refused = isinstance(error, InputError | OSError) and error.__cause__ is None
    if _group is not None and not refused:
        time.sleep(SILENT_SECONDS + 3 * BEAT_SECONDS)


def leave_lost(cause: str) -> NoReturn:
    """End this process because of another one."""
    sys.stderr.write(f"\njaxdiff: process {index()} leaves: {cause}\n")
    _exit(EXIT_LOST)


def _exit(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)
