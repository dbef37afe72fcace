"""What a call must cost at least, so that a time can be told as a share of the machine's limit."""

from typing import NamedTuple


class Cost(NamedTuple):
    """bytes_moved: to and from memory, each needed byte once; flops: floating-point operations."""

    bytes_moved: int
    flops: int
