"""Sketches of vectors under many hashes at once, by the project's own hash.

x (n,) is the flattened virtual table and phi(x) (M,) the array that its elements are added into, each with
its sign: phi(x)[s] = sum of sign_i * x_i over the elements i in slot s. Reading element i back gives
sign_i * phi(x)[slot_i]. Trials differ in the seed of the hash.
"""

from collections.abc import Iterator

import numpy as np

from robe.kernels.parts.hashing import K1, SlotMap, mix64, slot_map, slots_reference

CHUNK = 2**18  # elements hashed at a time: what fits into the caches


def many(family: str, width: int, block: int, memory: int, seeds, signed: bool = True) -> SlotMap:
    """The maps of several seeds as one: what depends on the seed is an array (seeds, 1, 1).

    So the functions of hashing.py, which NumPy runs as they stand, give results (seeds, rows, width).
    """
    one = slot_map(family, width, block, memory, signed=signed)
    seeds = np.asarray(seeds).astype(np.uint64)[:, None, None]
    if family == "mix":  # its seed enters here alone; a map for each would take longer than hashing
        return one._replace(key=mix64(seeds + K1))
    maps = [slot_map(family, width, block, memory, int(seed), signed) for seed in seeds.ravel()]
    seeded = {name: [getattr(each, name) for each in maps] for name in ("key", "a", "b", "c")}
    return one._replace(**{name: np.array(values)[:, None, None] for name, values in seeded.items()})


def chunks(seeds: np.ndarray, elements: int) -> Iterator[np.ndarray]:
    """The seeds, so many at a time that their elements make a chunk."""
    size = max(1, CHUNK // elements)
    return (seeds[i : i + size] for i in range(0, len(seeds), size))


def trials(seed: int, count: int, *case: int) -> np.ndarray:
    """(count,) seeds of hashes, other ones for every `case`."""
    return np.random.default_rng([seed, *case]).integers(0, 2**32, count)


def draw(seeds, elements: int, block: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots and signs (seeds, elements) of a vector under the default hash."""
    maps = many("mix", elements, block, memory, seeds)
    slots, signs = slots_reference(maps, np.zeros(1, np.uint64))
    return slots[:, 0], signs[:, 0]


def project(values: np.ndarray, slots: np.ndarray, memory: int) -> np.ndarray:
    """phi (trials, M) of signed values (trials, n)."""
    at = slots + memory * np.arange(len(slots))[:, None]
    return np.bincount(at.ravel(), values.ravel(), len(slots) * memory).reshape(-1, memory)


def recover(phi: np.ndarray, slots: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Every element read back (trials, n)."""
    return signs * np.take_along_axis(phi, slots, axis=1)


def as_blocks(x: np.ndarray, block: int) -> np.ndarray:
    """The vector cut into blocks (blocks, Z), the last one filled with zeros."""
    blocks = np.zeros((-(-x.size // block), block))
    blocks.ravel()[: x.size] = x
    return blocks
