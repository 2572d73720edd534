from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from specjax.decoding import generate
from specjax.models.decoder import Decoder
from tests.decoding.tiny import random_prompts, random_target

Case = tuple[Decoder, list[list[int]], list[list[int]]]


@pytest.fixture(scope="session")
def case() -> Callable[[int, int], Case]:
    """(seed, batch) -> a random target, prompts, and 64 greedy tokens after each."""

    target = functools.cache(random_target)

    @functools.cache
    def make(seed: int, batch: int) -> Case:
        prompts = random_prompts(seed, batch)
        return target(seed), prompts, generate(target(seed), prompts, max_new_tokens=64).tokens

    return make
