"""A byte-level tokenizer built on the spot, and a readable view of what it supervises."""

import itertools

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import parse_record

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|stop|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def cache_of_its_own(tmp_path, monkeypatch):
    """Where `datasets` puts the tables that it reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def make_tokenizer():
    """(chat template, trim_offsets) -> a tokenizer with one token a byte, but for pairs of newlines or spaces."""

    def make(template, *, trim_offsets=False):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = [("Ċ", "Ċ"), ("Ġ", "Ġ")]
        vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
        backend = Tokenizer(models.BPE(vocabulary, pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def mark():
    """(chat tokenizer, [(role, content), ...]) -> the rendered text with each supervised run in [[ ]]."""

    def mark_supervised(chat: ChatTokenizer, turns):
        messages = [{"role": role, "content": content} for role, content in turns]
        input_ids, loss_mask = chat(parse_record({"messages": messages}, "here"))
        parts = []
        for supervised, tokens in itertools.groupby(zip(input_ids, loss_mask, strict=True), key=lambda pair: pair[1]):
            text = chat.tokenizer.decode([token for token, _ in tokens])
            parts.append(f"[[{text}]]" if supervised else text)
        return "".join(parts)

    return mark_supervised


@pytest.fixture(scope="session")
def chatml():
    return CHATML
