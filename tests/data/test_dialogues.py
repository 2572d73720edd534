"""Turns that are answered anew, and which tokens of them are supervised; the answers here are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from specjax.data.conversations import parse_record
from specjax.data.dialogues import AnswerRules, Dialogue
from specjax.data.prompts import prompt_record

Make = Callable[[str | None], PreTrainedTokenizerBase]
STOP, OTHER_STOP = "<|im_end|>", "<|stop|>"
OPENING = "<|im_start|>assistant\n"
# As released templates do: the thinking of an answer is dropped once another turn follows.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def told(text: str = "from the data") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rules(tokenizer: PreTrainedTokenizerBase | None, **changes: Any) -> AnswerRules:
    stops = [] if tokenizer is None else tokenizer.convert_tokens_to_ids([STOP, OTHER_STOP])
    values = {
        "tokenizer": tokenizer,
        "chat_template_kwargs": {},
        "stop_token_ids": stops,
        "max_new_tokens": 20,
        "context": 1000,
        "vocab_size": 1000,
    }
    return AnswerRules(**(values | changes))


def play(fields: dict[str, Any], rules: AnswerRules, *answers: str) -> tuple[Dialogue, list[str]]:
    """The dialogue after these answers, and the prompts that it asked for."""
    dialogue = Dialogue(prompt_record(fields, "here"), rules)
    tokenizer, prompts, left = rules.tokenizer, [], list(answers)
    while (prompt := dialogue.next_prompt()) is not None:
        prompts.append(tokenizer.decode(prompt))
        dialogue.take(tokenizer(left.pop(0), add_special_tokens=False)["input_ids"])
    assert not left
    return dialogue, prompts


def marked(dialogue: Dialogue) -> list[str]:
    """The records as text, with each supervised run in [[ ]]."""
    texts = []
    for record in dialogue.records:
        parse_record(record, "here")
        text, inside = "", False
        for token, supervised in zip(record["input_ids"], record["loss_mask"], strict=True):
            text += ("[[" if supervised and not inside else "]]" if inside and not supervised else "") + (
                dialogue.rules.tokenizer.decode([token])
            )
            inside = bool(supervised)
        texts.append(text + ("]]" if inside else ""))
    return texts


@pytest.fixture
def tokenizer(make_tokenizer: Make, chatml: str) -> PreTrainedTokenizerBase:
    return make_tokenizer(chatml)


def test_every_turn_follows_the_answers_given_here_and_they_share_a_record(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "be kind"}
    fields = {"messages": [system, user("a"), told(), user("b"), told(), user("c")]}
    dialogue, prompts = play(fields, rules(tokenizer), f"one{STOP}", f"two{STOP}", f"three{STOP}")
    first = f"<|im_start|>system\nbe kind{STOP}\n<|im_start|>user\na{STOP}\n{OPENING}"
    second = f"{first}one{STOP}\n<|im_start|>user\nb{STOP}\n{OPENING}"
    third = f"{second}two{STOP}\n<|im_start|>user\nc{STOP}\n{OPENING}"
    assert prompts == [first, second, third]
    assert dialogue.outcome == "done"
    (record,) = marked(dialogue)
    assert record == (
        f"{first}[[one{STOP}]]\n<|im_start|>user\nb{STOP}\n{OPENING}[[two{STOP}]]\n<|im_start|>user\nc{STOP}\n"
        f"{OPENING}[[three{STOP}]]"
    )


def test_a_template_that_rewrites_an_answer_gives_a_record_a_turn(make_tokenizer: Make) -> None:
    fields = {"messages": [user("a"), told(), user("b"), told(), user("c"), told()]}
    answers = f"hm</think>one{STOP}", f"two{STOP}", f"three{STOP}"
    dialogue, _ = play(fields, rules(make_tokenizer(FORGETFUL)), *answers)
    first = f"<|im_start|>user\na{STOP}\n{OPENING}"
    later = f"{first}one{STOP}\n<|im_start|>user\nb{STOP}\n{OPENING}"
    assert marked(dialogue) == [
        f"{first}[[hm</think>one{STOP}]]",
        f"{later}[[two{STOP}]]\n<|im_start|>user\nc{STOP}\n{OPENING}[[three{STOP}]]",
    ]


def test_an_answer_that_is_tokenised_anew_is_not_supervised_in_its_new_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    dialogue = Dialogue(prompt_record({"messages": [user("a"), told(), user("b")]}, "here"), rules(tokenizer))
    space, stop = tokenizer.convert_tokens_to_ids(["Ġ", STOP])
    first = dialogue.next_prompt()
    dialogue.take([space, space, stop])  # the tokenizer writes two spaces as one token
    second = dialogue.next_prompt()
    assert first is not None
    assert second is not None
    assert second[len(first)] == tokenizer.convert_tokens_to_ids("ĠĠ")
    dialogue.take([stop])
    assert [record["input_ids"] for record in dialogue.records] == [[*first, space, space, stop], [*second, stop]]
    assert [sum(record["loss_mask"]) for record in dialogue.records] == [3, 1]


@pytest.mark.parametrize("answer", [f"one{OTHER_STOP}", f"one<|endoftext|>{STOP}"])
def test_special_tokens_of_an_answer_do_not_return_to_the_target(
    answer: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    dialogue, prompts = play({"messages": [user("a"), told(), user("b")]}, rules(tokenizer), answer, f"two{STOP}")
    assert f"{OPENING}one{STOP}\n" in prompts[1]
    assert [text.count("[[") for text in marked(dialogue)] == [1, 1]  # what it ended with is not what is rendered
    assert marked(dialogue)[0].endswith(f"[[{answer}]]")


@pytest.mark.parametrize(("unfinished", "kept"), [("keep", ["[[one", "[[half"]), ("drop", ["[[one"])])
def test_an_answer_without_a_stop_token_ends_the_dialogue(
    unfinished: str, kept: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    fields = {"messages": [user("a"), told(), user("b"), told(), user("c")]}
    dialogue, _ = play(fields, rules(tokenizer, unfinished=unfinished), f"one{STOP}", "half")
    assert dialogue.outcome == "unfinished"
    (record,) = marked(dialogue)
    assert record.count("[[") == len(kept)
    assert all(text in record for text in kept)
    assert record.endswith("[[half]]" if unfinished == "keep" else f"[[one{STOP}]]")


def test_messages_between_two_answers_are_one_turn_and_a_greeting_is_context(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    fields = {"messages": [told("welcome"), user("a"), user("b"), told(), told(), user("c"), told()]}
    dialogue, prompts = play(fields, rules(tokenizer), f"one{STOP}", f"two{STOP}")
    start = f"<|im_start|>assistant\nwelcome{STOP}\n<|im_start|>user\na{STOP}\n<|im_start|>user\nb{STOP}\n{OPENING}"
    assert prompts == [start, f"{start}one{STOP}\n<|im_start|>user\nc{STOP}\n{OPENING}"]
    assert "from the data" not in marked(dialogue)[0]


def test_token_ids_are_one_turn_and_need_no_tokenizer() -> None:
    fields = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 0]}
    dialogue = Dialogue(parse_record(fields, "here"), rules(None, stop_token_ids=[2]))
    assert dialogue.next_prompt() == [5, 6]
    dialogue.take([9, 2])
    assert dialogue.records == [{"input_ids": [5, 6, 9, 2], "loss_mask": [0, 0, 1, 1]}]
    assert (dialogue.outcome, dialogue.next_prompt()) == ("done", None)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "no user": ({"messages": [told()]}, "holds no message of a user to answer"),
    "blank": ({"prompt": " \n"}, "turn 1: the user's message is empty"),
    "too long": ({"prompt": "x" * 62}, "turn 1: 81 tokens and 20 new ones exceed the target's context of 100"),
    "supervised from the start": ({"input_ids": [1, 2], "loss_mask": [1, 1]}, "no token precedes the first superv"),
    "a tool's result": ({"messages": [user("a"), {"role": "tool", "content": "7"}]}, "turn 1 holds the result of a"),
    "foreign ids": ({"input_ids": [1, 999], "loss_mask": [0, 0]}, "turn 1: token 1 has id 999, outside"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_answered_fails_with_a_reason(failure: str, tokenizer: PreTrainedTokenizerBase) -> None:
    fields, message = FAILURES[failure]
    dialogue = Dialogue(prompt_record(fields, "here"), rules(tokenizer, context=100, vocab_size=900))
    assert dialogue.next_prompt() is None
    assert dialogue.outcome == "failed"
    assert dialogue.records == []
    assert message in dialogue.reason
    full = Dialogue(prompt_record({"prompt": "x" * 61}, "here"), rules(tokenizer, context=100))
    assert len(full.next_prompt() or []) == 80


def test_a_later_turn_that_fails_keeps_the_earlier_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    fields = {"messages": [user("a"), told(), user("b" * 100)]}
    dialogue, _ = play(fields, rules(tokenizer, context=100), f"one{STOP}")
    assert dialogue.outcome == "failed"
    assert dialogue.reason.startswith("turn 2: ")
    assert [text.count("[[") for text in marked(dialogue)] == [1]
