from __future__ import annotations

import functools

import pytest

from specjax.decoding import generate
from tests.decoding.tiny import Case, Cases, random_prompts, random_target


@pytest.fixture(scope="session")
def case() -> Cases:
    """(seed, batch) -> a random target, prompts, and 64 greedy tokens after each."""

    target = functools.cache(random_target)

    @functools.cache
    def make(seed: int, batch: int) -> Case:
        prompts = random_prompts(seed, batch)
        return target(seed), prompts, generate(target(seed), prompts, max_new_tokens=64).tokens

    return make
