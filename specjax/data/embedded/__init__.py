"""The embedded target's corpus and tokenizer."""

from specjax.data.embedded.stdlib_corpus import stdlib_conversations
from specjax.data.embedded.tokenizer import train_tokenizer
from specjax.data.embedded.word_problems import word_problems

__all__ = ["stdlib_conversations", "train_tokenizer", "word_problems"]
