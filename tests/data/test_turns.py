"""Which turns are supervised and what remains of reasoning, against plain references and hand-marked text."""

import re

import numpy as np
import pytest

from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import parse_record
from specjax.data.pipeline import TokenizedExamples, tokenized
from specjax.data.sources import read_sources
from specjax.data.turns import TurnRules, without_reasoning
from specjax.errors import InputError
from tests.data.test_chat_template import BODIES, HEADER, ONE_TURN, TAGGED, THINKING, TWO_TURNS, TWO_TURNS_MARKED

LAST, HIDE = TurnRules(supervise="last"), TurnRules(reasoning="hide")
TWO_TURNS_LAST_MARKED = re.sub(r"\[\[(.*?)\]\]", r"\1", TWO_TURNS_MARKED, count=1)
THOUGHTFUL = [("user", "hi"), ("assistant", "<think>\na\n</think>\n\nyo"), ("user", "and?")]


def last_run(mask):
    """A plain loop: only the last stretch of set entries."""
    kept, i = [False] * len(mask), len(mask) - 1
    while i >= 0 and not mask[i]:
        i -= 1
    while i >= 0 and mask[i]:
        kept[i] = True
        i -= 1
    return kept


@pytest.mark.parametrize("body", [None, *BODIES], ids=str)
def test_last_supervises_the_last_turn_alone_and_changes_no_token(make_tokenizer, chatml, mark, body):
    tokenizer = make_tokenizer(chatml if body is None else TAGGED.replace("BODY", BODIES[body]))
    rng = np.random.default_rng(0)
    for count in range(1, 5):
        turns = [(role, "x" * int(rng.integers(1, 9))) for _ in range(count) for role in ("user", "assistant")]
        for end in ([], [("user", "bye")]):
            record = parse_record({"messages": [{"role": r, "content": c} for r, c in [*turns, *end]]}, "here")
            ids, mask = ChatTokenizer(tokenizer)(record)
            last_ids, last_mask = ChatTokenizer(tokenizer, rules=LAST)(record)
            np.testing.assert_array_equal(last_ids, ids)
            assert last_mask.tolist() == last_run(mask.tolist())
    assert mark(ChatTokenizer(tokenizer, rules=LAST), TWO_TURNS) == TWO_TURNS_LAST_MARKED


def test_last_takes_a_template_that_rewrites_earlier_turns(make_tokenizer, mark):
    marked = mark(
        ChatTokenizer(make_tokenizer(THINKING), rules=LAST), [*THOUGHTFUL, ("assistant", "<think>b</think>no")]
    )
    header = HEADER + "yo<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert marked == header + "[[<think>\nb\n</think>\n\nno<|im_end|>]]\n"


def test_last_supervises_nothing_without_an_answer(make_tokenizer, chatml, mark):
    chat = ChatTokenizer(make_tokenizer(chatml), rules=LAST)
    for turns in ([("user", "hi")], [("assistant", "hello"), ("user", "hi")]):
        assert "[[" not in mark(chat, turns)


def test_tags_after_a_rewritten_start_are_refused(make_tokenizer, mark):
    body = BODIES["tags end at the end token"]
    template = "{{ messages | length }}" + TAGGED.replace("BODY", body)
    assert "[[yo" in mark(ChatTokenizer(make_tokenizer(template)), TWO_TURNS)
    with pytest.raises(InputError, match="renders what precedes assistant message 4 in another way"):
        mark(ChatTokenizer(make_tokenizer(template), rules=LAST), TWO_TURNS)


HIDDEN = {
    "<think>\na\n</think>\n\nyo": "yo",
    "\n<think>a</think>  yo": "  yo",
    "a</think>\nyo": "yo",  # the prompt held the opening tag
    "<think>a</think>\n<think>b</think>\n\nyo": "yo",
    "<think>is <think> a tag?</think>yo": "yo",
    "<think></think>": "",
    "yo": "yo",
    "  yo\n": "  yo\n",
    "write <think>a</think> like this": "write <think>a</think> like this",
}


@pytest.mark.parametrize(("content", "answer"), HIDDEN.items(), ids=HIDDEN.keys())
def test_think_blocks_at_the_start_of_an_answer_are_hidden(content, answer):
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": content})
    assert without_reasoning(messages) == (messages[0], {"role": "assistant", "content": answer})


def test_reasoning_fields_are_hidden_and_others_stay():
    call = {"role": "assistant", "tool_calls": [{"name": "f"}], "reasoning_content": "a", "reasoning": "b"}
    messages = (call, {"role": "assistant", "content": "yo", "thinking": "c", "name": "d"})
    assert without_reasoning(messages) == (
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        {"role": "assistant", "content": "yo", "name": "d"},
    )


def test_reasoning_that_is_cut_off_is_refused_where_it_stands(make_tokenizer, chatml):
    record = parse_record({"messages": [{"role": "assistant", "content": "<think>\nand so"}]}, "file F, line 3")
    examples = TokenizedExamples([record], ChatTokenizer(make_tokenizer(chatml), rules=HIDE), rules=HIDE)
    with pytest.raises(InputError, match=r"file F, line 3: assistant message 0: <think> without </think>.*drop the"):
        examples[0]


def test_hidden_reasoning_is_an_answer_without_thinking(make_tokenizer, mark):
    """As if the data had none: in the mode that thinks, in the one that does not, and by tags."""
    thought = [("user", "hi"), ("assistant", "<think>\nhm\n</think>\n\nyo")]
    tokenizer = make_tokenizer(THINKING)
    for kwargs in ({}, {"enable_thinking": False}):
        chat = ChatTokenizer(tokenizer, chat_template_kwargs=kwargs, rules=HIDE)
        assert mark(chat, thought) == mark(chat, ONE_TURN) == HEADER + "<think>\n\n</think>\n\n[[yo<|im_end|>]]\n"
    both = ChatTokenizer(tokenizer, chat_template_kwargs=kwargs, rules=TurnRules("last", "hide"))
    assert mark(both, [*THOUGHTFUL, thought[1]]).endswith("<think>\n\n</think>\n\n[[yo<|im_end|>]]\n")
    tagged = ChatTokenizer(make_tokenizer(TAGGED.replace("BODY", BODIES["tags end at the end token"])), rules=HIDE)
    assert mark(tagged, thought) == HEADER + "[[yo<|im_end|>]]\n"


def test_kept_reasoning_is_rendered_as_the_template_does(make_tokenizer, mark):
    chat = ChatTokenizer(make_tokenizer(THINKING), rules=TurnRules())
    assert mark(chat, THOUGHTFUL[:2]) == HEADER + "[[<think>\na\n</think>\n\nyo<|im_end|>]]\n"


@pytest.mark.parametrize("rules", [LAST, HIDE], ids=str)
def test_token_ids_are_refused_where_a_rule_cannot_apply(tmp_path, rules):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n')
    records, _ = read_sources([(path, 1.0)])
    assert len(tokenized(records, None)[0][0]) == 3
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: data.supervise .* cannot be applied to input_ids"):
        tokenized(records, None, rules=rules)[0]
