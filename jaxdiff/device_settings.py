"""The flags that say which devices, and which processes, share the work; importing them costs no jax."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from jaxdiff.settings import require, require_at_least


class Place(NamedTuple):
    """Where a process of several stands, in the words of `jax.distributed.initialize`.

    Attributes:
      coordinator_address: HOST:PORT at which process 0 answers.
      num_processes: all of them.
      process_id: 0 to num_processes - 1.
    """

    coordinator_address: str
    num_processes: int
    process_id: int


@dataclass(frozen=True)
class DeviceSettings:
    """Devices of one process."""

    devices: int | None = None
    """Devices that share a batch; None means all. Short for --mesh data=N."""
    mesh: str | None = None
    """`data=4,fsdp=2`: 8 devices share a batch, and every 2 of them share large parameters, their average and their
    optimizer state, so that each holds half; fsdp alone takes all devices."""

    def __post_init__(self):
        require_at_least("devices", 1 if self.devices is None else self.devices, 1)
        require(self.devices is None or self.mesh is None, "--devices has no effect beside --mesh: drop one of the two")
        _ = self.axes

    @property
    def axes(self) -> tuple[int | None, int]:
        """Sizes of the axes data and fsdp; None means as many as there are devices for."""
        if self.mesh is None:
            return self.devices, 1
        found = re.fullmatch(r"(?:data=([1-9]\d*))?,?(?:fsdp=([1-9]\d*))?", self.mesh)
        require(
            found is not None and self.mesh.strip(",") == self.mesh != "",
            f"--mesh must be like data=8 or data=4,fsdp=2, got {self.mesh!r}",
        )
        assert found is not None
        data, fsdp = found.groups()
        return None if data is None else int(data), int(fsdp or 1)


@dataclass(frozen=True)
class ProcessSettings(DeviceSettings):
    """Devices of one process or of several, on one machine or on many."""

    distributed: str | None = None
    """`auto` joins the other processes of a SLURM, Open MPI, Kubernetes or Cloud TPU job; HOST:PORT,N,I is process I of
    N, of which process 0 listens at HOST:PORT. None works alone."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.place

    @property
    def place(self) -> Place | None:
        """Where this process stands among others; None where it is alone or is yet to find out."""
        if self.distributed in (None, "auto"):
            return None
        found = re.fullmatch(r"([^,\s]+:\d{1,5}),([1-9]\d*),(\d+)", self.distributed)
        require(
            found is not None and int(found[3]) < int(found[2]),
            f"--distributed must be auto or HOST:PORT,N,I with I in 0..N-1, got {self.distributed!r}",
        )
        assert found is not None
        return Place(found[1], int(found[2]), int(found[3]))
