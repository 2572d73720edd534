from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.weights.tiny import raw_config

# Tied and untied heads, biases, q/k norm, a sliding layer: what the three families differ in.
FAMILY_CHANGES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
}


def hf_model(model_type: str, **changes: object) -> torch.nn.Module:
    """A randomly initialised transformers model whose biases and norms differ from their trivial values."""
    raw = raw_config(model_type, **FAMILY_CHANGES[model_type] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="session", params=list(FAMILY_CHANGES))
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model folder written by transformers, one for each family."""
    folder = tmp_path_factory.mktemp(request.param)
    hf_model(request.param).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied fp32 Qwen3 folder in several shards."""
    folder = tmp_path_factory.mktemp("qwen3_untied")
    hf_model("qwen3", tie_word_embeddings=False).save_pretrained(folder, max_shard_size="30KB")
    return folder
