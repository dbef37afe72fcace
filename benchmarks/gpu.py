"""The same comparisons on a GPU: the cases, and how large a full table the device holds.

python -m benchmarks --backend cuda
"""

from benchmarks.measure import Effort
from benchmarks.step import Case
from robe.backend import Backend

BATCHES = (2048, 16384, 65536)
VARIANTS = tuple((compiled, precision) for compiled in (False, True) for precision in ("fp32", "tf32", "amp"))
CASES = tuple(Case(preset, (100, 10, 1000), BATCHES, BATCHES, VARIANTS) for preset in ("kaggle", "mlperf"))


def largest_table(backend: Backend, effort: Effort) -> Effort:
    """With a full table as large as fits beside the activations; in the simulator the device is the host."""
    if effort.quick:
        return effort
    free, _ = backend.xp.cuda.runtime.memGetInfo()
    return effort._replace(table_bytes=0.8 * free)
