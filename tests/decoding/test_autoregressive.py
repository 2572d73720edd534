"""The autoregressive baseline against `generate` of transformers."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
import transformers

import specjax
from tests.decoding.tiny import assert_same_tokens, random_prompts
from tests.models.torch_weights import randomise

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
}


@pytest.mark.parametrize("family", MODELS)
def test_greedy_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = MODELS[family]().eval()
    randomise(model, seed=0)
    model.save_pretrained(tmp_path)
    target = specjax.load_target(tmp_path, dtype=jnp.float32)
    prompts = random_prompts(4, 3)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    assert [len(tokens) for tokens in expected] == [40] * 3
    assert min(len(set(tokens)) for tokens in expected) >= 3
    assert_same_tokens(target, prompts, specjax.generate(target, prompts, max_new_tokens=40).tokens, expected)
