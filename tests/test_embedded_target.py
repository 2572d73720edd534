"""The shipped target: small, readable by transformers, and able to answer word problems."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import specjax
from specjax.data.embedded import word_problems
from specjax.data.prompts import chat_prompt
from specjax.models.decoder import Decoder
from specjax.weights.safetensors_files import EMBEDDED_FOLDER
from tests.weights.tiny import logits

MAX_BYTES = 20_000_000
PROBLEMS, ENOUGH = 8, 6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)


@pytest.fixture(scope="module")
def target() -> Decoder:
    return specjax.load_target("embedded", dtype=jnp.float32)


@pytest.fixture(scope="module")
def problems(tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], str]]:
    """Held-out prompts as token ids, each with its solution."""
    messages = [conversation["messages"] for conversation in word_problems(PROBLEMS, 1, "heldout")]
    return [(chat_prompt(m[:1], tokenizer, "problem"), m[1]["content"]) for m in messages]


def test_the_folder_holds_at_most_20_mb_of_bf16() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= MAX_BYTES
    with safe_open(EMBEDDED_FOLDER / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_generation_stops_where_the_template_ends_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert GenerationConfig.from_pretrained(EMBEDDED_FOLDER).eos_token_id == tokenizer.eos_token_id
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith(f"!{tokenizer.eos_token}\n")


def test_transformers_computes_the_same_logits(target: Decoder, problems: list[tuple[list[int], str]]) -> None:
    tokens = np.array([problems[0][0]], np.int32)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(target, tokens), expected, rtol=0, atol=1e-4)


def final_answer(text: str) -> str:
    return text.rsplit("\nAnswer: ", 1)[-1]


def test_held_out_word_problems_are_answered_correctly_more_often_than_by_chance(
    target: Decoder, tokenizer: PreTrainedTokenizerBase, problems: list[tuple[list[int], str]]
) -> None:
    prompts, solutions = zip(*problems, strict=True)
    answers = specjax.generate(target, prompts, max_new_tokens=128, stop_token_ids=[tokenizer.eos_token_id]).tokens
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    right = [final_answer(text) == final_answer(solution) for text, solution in zip(texts, solutions, strict=True)]
    assert sum(right) >= ENOUGH, texts
