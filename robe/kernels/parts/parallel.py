"""How kernels of the CPU are compiled that share their work among its cores.

Numba compiles the body of a parallel loop apart from the function around it, with division as NumPy has it,
which does not look for 0, so that loops that divide become vector code. Where the function around it divides
otherwise, all that the loop calls is compiled twice, once for each. A slice that is assigned
(`out[:n] = x`) is compiled with the message of the error that it might raise. Both doubled the time that
kernels take to compile; so all are made alike here, and copy numbers one by one.
"""

from functools import partial

from numba import njit

parallel = partial(njit, parallel=True, nogil=True, cache=True, error_model="numpy")
