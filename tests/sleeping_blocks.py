"""Blocks of threads in Numba's CUDA simulator that sleep while they wait for each other.

Numba's own are asked over and over, by a thread that does nothing else, which of their threads wait or have
ended. That takes most of the time of a kernel.
"""

from functools import partial
from threading import Condition

import numpy as np
from numba.cuda.simulator import kernel


class Block(kernel.BlockManager):
    def run(self, block, *arguments):
        """Run the kernel on every thread of a block; raises what the first thread that failed raised."""
        run, indices = partial(self._f, *arguments), list(np.ndindex(*self._block_dim))
        self.turn, self.running, self.waiting, self.meetings = Condition(), len(indices), 0, 0
        self.error = None
        threads = [Thread(run, self, block, index, self._debug) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            error, trace = self.error
            raise error.with_traceback(trace)

    def meet(self):
        """Wait until all threads that still run are here."""
        with self.turn:
            meeting, self.waiting = self.meetings, self.waiting + 1
            self.go_on_if_all_wait()
            self.turn.wait_for(lambda: self.error or self.meetings > meeting)
            if self.error:
                raise RuntimeError("another thread of the block failed")

    def leave(self, error):
        with self.turn:
            self.running, self.error = self.running - 1, self.error or error
            self.go_on_if_all_wait()

    def go_on_if_all_wait(self):
        if self.error or self.waiting == self.running:
            self.meetings, self.waiting = self.meetings + 1, 0
            self.turn.notify_all()


class Thread(kernel.BlockThread):
    def run(self):
        try:
            super().run()
        finally:
            self._manager.leave(self.exception)

    def syncthreads(self):
        self._manager.meet()


def install():
    kernel.BlockManager = Block
