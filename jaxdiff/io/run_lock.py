"""One writer a run folder, by a lock of the operating system, which ends with its process however that ends."""

import os
import socket
import sys
from pathlib import Path

from jaxdiff.errors import InputError

LOCK = ".lock"
"""Stays in the folder; what counts is who holds it, not whether it is there."""

_held: dict[tuple[int, int], int] = {}
"""The open files of the locks that this process holds, by device and inode; closing one would end its lock."""


def hold_folder(folder: Path) -> None:
    """Hold a folder for writing until this process ends; a second time, by the same process, changes nothing.

    Raises:
      InputError: another process holds it.
    """
    if sys.platform == "win32":  # has no such lock
        return
    import fcntl

    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino) in _held:
        os.close(descriptor)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "one that has just started"
        os.close(descriptor)
        raise InputError(
            f"--out {folder}: another run is writing there ({holder}); wait for its end, or choose another --out"
        ) from error
    except OSError as error:
        print(f"{folder}: its file system has no locks ({error.strerror}); start no second run there")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[status.st_dev, status.st_ino] = descriptor
