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

from specjax.data.conversations import Conversation, Record, check_token_ids
from specjax.data.prompts import Turns, answer_text, chat_prompt, check_context, prompt_of_tokens
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
        self._question = _turns(self.record) if isinstance(self.record, Conversation) else None
        self._answers: list[str] = []

    @property
    def turn_seed(self) -> int:
        """Of the next turn: turns draw anew, for a template may place them where an earlier one stood."""
        return int(np.random.SeedSequence([*self.seed, len(self._answers)]).generate_state(1)[0])

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
        rules = self.rules
        finished = answer[-1] in rules.stop_token_ids
        if finished or rules.unfinished == "keep":
            self._supervise(answer)
        if not finished:
            self.outcome = "unfinished"
        elif self._question is None or len(self._answers) + 1 == len(self._question.turns):
            self.outcome = "done"
        else:
            assert rules.tokenizer is not None
            self._answers.append(answer_text(answer, rules.stop_token_ids, rules.tokenizer))

    @property
    def _place(self) -> str:
        return f"turn {len(self._answers) + 1}"

    def _rendered(self) -> list[int]:
        if not isinstance(self.record, Conversation):
            return prompt_of_tokens(self.record, "its tokens")
        if self._question is None:
            raise InputError("holds no message of a user to answer")
        if any(message["role"] == "tool" for message in self._question.turns[len(self._answers)]):
            raise InputError(f"{self._place} holds the result of a tool that the target's own answer did not call")
        messages, rules = self._question.messages(self._answers), self.rules
        return chat_prompt(messages, rules.tokenizer, self._place, rules.chat_template_kwargs, self.record.tools)

    def _checked(self, prompt: list[int]) -> list[int]:
        rules, place = self.rules, self._place
        if not prompt:
            raise InputError(f"{place}: the chat template renders nothing")
        check_token_ids(np.asarray(prompt), rules.vocab_size, place)
        check_context(prompt, rules.max_new_tokens, rules.context, place)
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


def answer_record(prompt: Sequence[int], answer: Sequence[int]) -> TrainingRecord:
    """The pre-tokenised record of a prompt and its answer, which is what is supervised."""
    return {"input_ids": [*prompt, *answer], "loss_mask": [0] * len(prompt) + [1] * len(answer)}


def _turns(conversation: Conversation) -> Turns | None:
    """From the first message of a user on, the runs of messages that are not answers; None without such a message.

    What precedes it, answers included, belongs to the first turn.
    """
    messages = conversation.messages
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    groups = groupby(messages[first:], key=lambda message: message["role"] == "assistant")
    runs = [tuple(run) for is_answer, run in groups if not is_answer]
    return Turns(((*messages[:first], *runs[0]), *runs[1:])) if runs else None
