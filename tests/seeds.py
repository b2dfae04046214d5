"""Seed everything that the tests draw at random: GPTFAST_TEST_SEED, 0 by default.

`make matrix` runs the suite with several of them.
"""

import os
import random

import numpy as np
import torch

SEED = int(os.environ.get("GPTFAST_TEST_SEED", "0"))


def shifted(seed: int) -> int:
    """Return a test's own seed, shifted by the seed of the whole run."""
    return seed + 1_000_003 * SEED


def torch_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


def numpy_generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(shifted(seed))


def python_generator(seed: int = 0) -> random.Random:
    return random.Random(shifted(seed))
