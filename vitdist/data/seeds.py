"""Randomness without state: a 64-bit hash of (seed, epoch, sample, ...) in place of a generator that must be replayed.

The mixing function is SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014). It is written out here because numpy
promises no stable streams between versions, and the order of samples must not change with a library.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)

Words = int | np.ndarray


class Purpose(IntEnum):
    """What a draw is for, so that two uses of the same (seed, epoch, ...) never share their randomness."""

    SHARD_ORDER = 1
    BLOCK_ORDER = 2
    CLASS_ORDER = 3
    BATCH_ORDER = 4
    REPLACEMENT = 5
    AUGMENTATION = 6
    VALIDATION = 7
    MIXING = 8


def _finalise(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLY_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLY_2
    return state ^ (state >> np.uint64(31))


def hash_words(*words: Words) -> np.ndarray:
    """uint64 hash of integers, broadcast over the arrays among them."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        state = np.zeros((), dtype=np.uint64)
        for word in words:
            array = np.asarray(word if isinstance(word, np.ndarray) else int(word) & 0xFFFFFFFFFFFFFFFF)
            state = _finalise((state ^ array.astype(np.uint64)) + _GOLDEN)
        return state


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of uint64 words: their upper 53 bits, all that a float64 holds."""
    return (words >> np.uint64(11)) * 2.0**-53


def shuffled(count: int, *words: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on the words alone."""
    return np.argsort(hash_words(*words, np.arange(count, dtype=np.uint64)), kind="stable")


def sample_seeds(seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """uint64 seeds of the augmentation of each sample: a pure function of (seed, epoch, sample)."""
    return hash_words(seed, Purpose.AUGMENTATION, epoch, rows.astype(np.uint64))
