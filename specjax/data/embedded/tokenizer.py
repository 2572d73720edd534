"""The embedded target's tokenizer: byte-level BPE with a ChatML template, saved as a Hugging Face folder."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from specjax.data.embedded.splitting import Conversation

VOCAB_SIZE = 1024
MAX_LENGTH = 4096
PAD, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END, MASK)

# A newline is always a token of its own: the prompt's last token (`assistant` newline) then never merges into an
# answer that starts with spaces or a newline. Digits stand alone, so arithmetic is digit-wise.
PIECES = (
    r"\n",
    r"'(?:s|t|re|ve|m|ll|d)\b",  # contractions
    r"[^\n\p{L}\p{N}]?\p{L}+",  # a word with one leading space, dot, underscore, bracket or quote
    r" ?\p{N}",
    r" ?[^\s\p{L}\p{N}]+",
    r"[^\S\n]+(?!\S)",  # indentation, except for the space that belongs to the next word
    r"[^\S\n]+",
)

CONFIG = {
    # The name that both transformers 4 and 5 load.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": TURN_END,
    "mask_token": MASK,
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": MAX_LENGTH,
}

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}"
    "{{- message['content'] + '<|im_end|>' }}"
    "{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def train_tokenizer(conversations: Iterable[Conversation], folder: Path) -> None:
    """Train the tokenizer on the conversations' texts and save it as a folder that `AutoTokenizer` loads.

    The folder holds `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; the same conversations give
    the same bytes. The template's generation block holds an answer together with the token that ends the turn.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _texts(conversations),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    for conversation in conversations:
        for message in conversation["messages"]:
            yield f"{message['role']}\n{message['content']}"
