"""Prompts and conversations whose assistant turns are written anew, one turn at a time.

A turn is what stands between two answers: messages of the user (and system). The answers of the record are passed
over; a later turn sees those that were given here, as a server's client would send them back: decoded to text without
special tokens, and rendered by the chat template.

    record     user 1   (assistant 1)   user 2   (assistant 2)
    prompts    [user 1]                 [user 1, answer 1, user 2]

A training record supervises the tokens of answers after exactly the tokens that they were an answer to. So two turns
share a record only where the later prompt begins with the earlier prompt and answer, token for token; a template that
rewrites earlier turns (strips their thinking, say) or an answer that is tokenised anew in another way makes the later
turn a record of its own, with the earlier answers as context that is not supervised.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from specjax.data.conversations import Conversation, Message, Record, check_token_ids
from specjax.data.prompts import chat_prompt, prompt_of_tokens
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Unfinished = Literal["keep", "drop"]
Outcome = Literal["done", "unfinished", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("done", "unfinished", "failed")
TrainingRecord = dict[str, list[int]]


@dataclass(frozen=True)
class AnswerRules:
    """How prompts are rendered, which of them can be answered, and what becomes of an answer.

    context: tokens of prompt and answer together. vocab_size: rows of the embedding. stop_token_ids: an answer that
    ends in one of them is finished; `unfinished` says whether others become records. tokenizer: may be None for
    prompts of token ids.
    """

    tokenizer: PreTrainedTokenizerBase | None
    chat_template_kwargs: Mapping[str, Any]
    stop_token_ids: Collection[int]
    max_new_tokens: int
    context: int
    vocab_size: int
    unfinished: Unfinished = "keep"


@dataclass
class Dialogue:
    """A record on its way to training records: `next_prompt` and `take` in turn, until `outcome` is set.

    seed: of what is drawn for its answers.
    outcome: "done" where every turn has a finished answer, "unfinished" where one ran to its limit (the dialogue ends
    there: nobody goes on from half an answer), "failed" where a turn cannot be answered, for `reason`.
    records: of the turns that were answered, whatever came after them.
    """

    record: Record
    rules: AnswerRules
    seed: tuple[int, ...] = ()
    outcome: Outcome | None = None
    reason: str = ""
    records: list[TrainingRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._turn = 0
        self._history: list[Message] = []
        self._turns: list[list[Message]] = []
        if isinstance(self.record, Conversation):
            self._history, self._turns = _turns(self.record.messages)

    @property
    def turn_seed(self) -> int:
        """Of the next turn: turns draw anew, for a template may place them where an earlier one stood."""
        return int(np.random.SeedSequence([*self.seed, self._turn]).generate_state(1)[0])

    def next_prompt(self) -> list[int] | None:
        """The token ids that the target continues next; None where the dialogue has ended."""
        if self.outcome is not None:
            return None
        try:
            self._prompt = self._checked(self._rendered())
        except InputError as error:
            self.outcome, self.reason = "failed", str(error)
            return None
        return self._prompt

    def take(self, answer: Sequence[int]) -> None:
        """Goes on with the target's `answer` to the last `next_prompt`, its stop token included."""
        finished = answer[-1] in self.rules.stop_token_ids
        if finished or self.rules.unfinished == "keep":
            self._supervise(answer)
        if not finished:
            self.outcome = "unfinished"
        elif self._turn + 1 >= len(self._turns):
            self.outcome = "done"
        else:
            self._history += [*self._turns[self._turn], {"role": "assistant", "content": self._text(answer[:-1])}]
            self._turn += 1

    def _rendered(self) -> list[int]:
        if not isinstance(self.record, Conversation):
            return prompt_of_tokens(self.record, "its tokens")
        if not self._turns:
            raise InputError("holds no message of a user to answer")
        turn, place = self._turns[self._turn], f"turn {self._turn + 1}"
        for message in turn:
            if message["role"] == "tool":
                raise InputError(f"{place} holds the result of a tool that the target's own answer did not call")
            if message["role"] == "user" and not message.get("content", "").strip():
                raise InputError(f"{place}: the user's message is empty")
        rules = self.rules
        messages = [*self._history, *turn]
        return chat_prompt(messages, rules.tokenizer, place, rules.chat_template_kwargs, self.record.tools)

    def _checked(self, prompt: list[int]) -> list[int]:
        rules, place = self.rules, f"turn {self._turn + 1}"
        if not prompt:
            raise InputError(f"{place}: the chat template renders nothing")
        check_token_ids(np.asarray(prompt), rules.vocab_size, place)
        if len(prompt) + rules.max_new_tokens > rules.context:
            raise InputError(
                f"{place}: {len(prompt)} tokens and {rules.max_new_tokens} new ones exceed the target's context of "
                f"{rules.context}"
            )
        return prompt

    def _supervise(self, answer: Sequence[int]) -> None:
        record = answer_record(self._prompt, answer)
        if self.records:
            earlier = self.records[-1]
            length = len(earlier["input_ids"])
            if self._prompt[:length] == earlier["input_ids"]:
                record["loss_mask"][:length] = earlier["loss_mask"]
                self.records.pop()
        self.records.append(record)

    def _text(self, answer: Sequence[int]) -> str:
        assert self.rules.tokenizer is not None
        text: str = self.rules.tokenizer.decode(
            list(answer), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def answer_record(prompt: Sequence[int], answer: Sequence[int]) -> TrainingRecord:
    """The pre-tokenised record of a prompt and its answer, which is what is supervised."""
    return {"input_ids": [*prompt, *answer], "loss_mask": [0] * len(prompt) + [1] * len(answer)}


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What precedes the first message of a user, and from there on the runs of messages that are not answers."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    runs = groupby(messages[first:], key=lambda message: message["role"] == "assistant")
    return list(messages[:first]), [list(run) for is_answer, run in runs if not is_answer]
