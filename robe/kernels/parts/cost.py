"""What a call must cost at least, so that a time can be told as a share of the machine's limit."""

from typing import NamedTuple


class Cost(NamedTuple):
    """bytes_moved: to and from memory, each needed byte once; flops: floating-point operations."""

    bytes_moved: int
    flops: int


class Limits(NamedTuple):
    """What a machine reaches at best: bytes a second in a plain copy, operations a second in a product."""

    bandwidth: float
    rate: float

    def seconds(self, cost: Cost) -> float:
        """The time of that much work, one after the other and nothing else."""
        return cost.bytes_moved / self.bandwidth + cost.flops / self.rate
