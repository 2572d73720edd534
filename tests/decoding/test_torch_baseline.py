"""PyTorch's decoding loop: its cached draft against the dense reference, its rounds against transformers' answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specjax.decoding.torch_baseline import CachedDraft, speculate, transformers_generate
from specjax.decoding.torch_comparison import check_comparable
from specjax.errors import InputError
from tests.decoding.tiny import FULL, OWN_MASK, SLIDING
from tests.models.torch_weights import randomise
from tests.torch_draft import TorchDraft, randomised
from tests.weights.tiny import raw_config

NEW, WRONG = 24, 9


def test_the_cached_draft_is_the_dense_one_at_every_length() -> None:
    reference = randomised(TorchDraft(FULL), 0)
    cached = CachedDraft(FULL, capacity=20).eval()
    cached.load_state_dict(reference.state_dict())
    generator = torch.Generator().manual_seed(1)
    taps = torch.randn(1, 12, 2 * FULL.hidden_size, generator=generator)
    noise = torch.randn(1, FULL.block_size, FULL.hidden_size, generator=generator)
    with torch.inference_mode():
        length = 0
        for size in (5, 1, 4, 2):  # the block of one round is overwritten by the context of the next
            cached.observe(taps[:, length : length + size], length)
            length += size
            start, stop = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), length)
            expected = reference(taps[:, :length], torch.arange(length)[None], noise[:, None], start, stop)
            torch.testing.assert_close(cached(noise, length), expected[:, 0], rtol=1e-5, atol=1e-5)


class Oracle:
    """Proposes the answer's tokens, in round i the first right[i] of them right; its states are rows of the head."""

    shape = dataclasses.replace(FULL, block_size=5, mask_token_id=3)

    def __init__(self, head: Tensor, answer: Sequence[int], prompt: int, right: Sequence[int]):
        self.head, self.answer, self.prompt, self.right = head, answer, prompt, iter(right)
        self.observed = 0

    def observe(self, states: Tensor, first: int) -> None:
        assert first == self.observed
        self.observed += states.shape[1]

    def __call__(self, noise: Tensor, length: int) -> Tensor:
        assert length == self.observed
        known = length - self.prompt
        size = self.shape.block_size
        proposed = [*self.answer[known : known + size], *[WRONG] * size][:size]
        wrong = next(self.right) + 1
        if wrong < size:
            proposed[wrong] = WRONG if proposed[wrong] != WRONG else WRONG + 1
        return self.head[proposed][None] * 10


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw_config(num_hidden_layers=4)))
    randomise(model, 3)
    return model.float().eval()


def test_rounds_of_every_length_yield_the_greedy_answer(target: torch.nn.Module) -> None:
    prompt = [5, 6, 7]
    answer = transformers_generate(target, prompt, NEW, ())
    assert len(set(answer)) > 8
    right = [0, 4, 1, 3, 2, 0, 0, 4, 4, 4]
    oracle = Oracle(target.lm_head.weight.detach(), answer, len(prompt), right)
    tokens, rounds = speculate(target, oracle, prompt, NEW, (), draft_tokens=4)
    assert tokens == answer
    assert rounds[:7] == [1, 5, 2, 4, 3, 1, 1]


@pytest.mark.parametrize("draft_tokens", [4, 2])
def test_an_answer_ends_with_its_stop_token(target: torch.nn.Module, draft_tokens: int) -> None:
    prompt = [5, 6, 7]
    answer = transformers_generate(target, prompt, NEW, ())
    stop = next(token for i, token in enumerate(answer) if i >= 6 and token not in answer[:i])
    end = answer.index(stop) + 1
    oracle = Oracle(target.lm_head.weight.detach(), answer, len(prompt), [4] * NEW)
    tokens, rounds = speculate(target, oracle, prompt, NEW, (stop,), draft_tokens)
    assert tokens == answer[:end] == transformers_generate(target, prompt, NEW, (stop,))
    assert rounds == [draft_tokens + 1] * -(-(end - 1) // (draft_tokens + 1))


def test_drafts_that_the_loop_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match=r"the draft's sliding_window is 5; .*; --dtype is bfloat16; give float32"):
        check_comparable(SLIDING, "bfloat16")
    with pytest.raises(InputError, match="the draft's own mask embedding is True"):
        check_comparable(OWN_MASK, "float32")
    scaled = dataclasses.replace(FULL, rope=dataclasses.replace(FULL.rope, rope_type="linear", factor=2.0))
    with pytest.raises(InputError, match="the draft's rope scaling is linear"):
        check_comparable(scaled, "float32")
    check_comparable(FULL, "float32")
