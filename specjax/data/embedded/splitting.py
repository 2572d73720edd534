"""Conversations of the embedded corpus and their division into training and held-out ones."""

import hashlib
from typing import Literal

Split = Literal["train", "heldout"]
Conversation = dict[str, list[dict[str, str]]]

HELDOUT_ONE_IN = 50


def conversation(prompt: str, answer: str) -> Conversation:
    """Return a conversation of one turn."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def in_split(prompt: str, split: Split) -> bool:
    """Return whether a prompt belongs to a split: a hash of its text decides, so no prompt is ever in both."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return (int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0) == (split == "heldout")
