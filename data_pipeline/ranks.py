"""Processes that share the work, started by `mpiexec -n K` and connected by mpi4py; or this one alone."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from data_pipeline.schema import DataError

# Variables by which launchers tell how many processes there are: Open MPI; MPICH, Intel MPI and Slurm.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
BY_SRUN = "SLURM_STEP_NUM_TASKS"  # of which those of `srun --mpi=pmix` have a PMIX_RANK, and no other size


class Ranks:
    """`size` processes, of which this is number `rank`."""

    def __init__(self):
        self.rank, self.size, self.comm = 0, 1, None
        sizes = (*SIZES, BY_SRUN) if "PMIX_RANK" in os.environ else SIZES
        if any(int(os.environ.get(name, 1)) > 1 for name in sizes):
            try:
                from mpi4py import MPI
            except ImportError as error:
                raise DataError(
                    f"several processes were started, but mpi4py cannot be loaded ({error}); "
                    "pip install 'mpi4py>=4,<5', or start one"
                ) from None
            self.comm = MPI.COMM_WORLD
            self.rank, self.size = self.comm.rank, self.comm.size
            if self.size == 1:
                library = " ".join(MPI.Get_library_version().split()[:3]).strip("\0")
                raise DataError(
                    "several processes were started, but each is alone in the MPI that mpi4py loaded "
                    f"({library}); start them by its own mpiexec, or start one"
                )

    def share(self, items: Sequence) -> Sequence:
        """The consecutive items that are this rank's share."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[slice(*bounds)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A `with` block that no rank leaves before all have reached its end.

        If one fails in it, the others exit with status 2, and the one raises its error.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            others_failed = self.comm is not None and any(self.comm.allgather(failed))
            if others_failed and not failed:
                sys.exit(2)
