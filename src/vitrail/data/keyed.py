"""Random numbers that are a pure function of what they are drawn for.

Order and augmentation follow from (seed, epoch, sample index, purpose) and from nothing else: not
from the number of workers or processes, not from the batch, not from where a run was resumed. So
there is no generator with a state; every number is the hash of its own address, as in Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the mixing function of
SplitMix64 (Steele et al., OOPSLA 2014). The values are part of what makes a run reproducible:
tests pin them, and they must never change.
"""

from hashlib import blake2b

import numpy as np
from jaxtyping import Float32, Int, Int64, UInt64

_STEP = np.uint64(0x9E3779B97F4A7C15)
"""The odd number nearest to 2^64 over the golden ratio: SplitMix64's distance between states."""


def uniform(
    seed: int, epoch: int, indices: Int[np.ndarray, " b"], purpose: str, n: int
) -> Float32[np.ndarray, "b n"]:
    """`n` numbers in [0, 1) for each of the samples `indices`, for one `purpose` of one epoch.

    They have 24 bits, all that float32 holds: none becomes 1 by rounding, on any device.

    >>> once = uniform(0, 1, np.array([7, 8]), "flip", 2)
    >>> bool((once[1] == uniform(0, 1, np.array([8]), "flip", 2)).all())
    True
    """
    start = _starts(seed, epoch, indices, purpose)
    bits = _mix(start[:, None] + _STEP * np.arange(1, n + 1, dtype=np.uint64))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def permutation(seed: int, epoch: int, n: int) -> Int64[np.ndarray, " n"]:
    """The order in which an epoch visits `n` samples: each index in 0..n-1 once."""
    return np.argsort(_starts(seed, epoch, np.arange(n), "order"), kind="stable")


def _starts(
    seed: int, epoch: int, indices: Int[np.ndarray, " b"], purpose: str
) -> UInt64[np.ndarray, " b"]:
    """One hash a sample, from which its sequence of numbers starts."""
    key = blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return _mix(np.uint64(int.from_bytes(key, "little")) + _STEP * indices.astype(np.uint64))


def _mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's bijection of 64 bits, in which each input bit flips half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
