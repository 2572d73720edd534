"""Loss masks against hand-marked text: [[ ]] holds what the writer of an assistant turn generates, and nothing else."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import Conversation, parse_record
from specjax.errors import InputError

TWO_TURNS = [("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "and?"), ("assistant", "no 🦄")]
TWO_TURNS_MARKED = (
    "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yo<|im_end|>]]\n"
    "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[[no 🦄<|im_end|>]]\n"
)
ONE_TURN = [("user", "hi"), ("assistant", "yo")]
HEADER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

# ChatML with {% generation %} around {0} of "content<|im_end|>\n", split where a test asks.
TAGGED = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}BODY{%- else -%}{{- message.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
BODIES = {
    "tags leave the end token out": (
        "{%- generation -%}{{- message.content -}}{%- endgeneration -%}{{- '<|im_end|>\n' -}}"
    ),
    "tags end at the end token": (
        "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    ),
    "tags hold the newline after it": "{% generation %}{{- message.content + '<|im_end|>\n' -}}{% endgeneration %}",
    "two tags a turn": (
        "{%- generation -%}{{- message.content[:1] -}}{%- endgeneration -%}"
        "{%- generation -%}{{- message.content[1:] -}}{%- endgeneration -%}{{- '<|im_end|>\n' -}}"
    ),
}

# Like Qwen3's: thinking is dropped from all but the last turn, where an empty block is put if there is none.
THINKING = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- if message.role == 'assistant' and loop.last -%}"
    "{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in message.content else '' -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}{{- content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)


def test_prefix_rendering_marks_every_assistant_turn_and_its_end(make_tokenizer, chatml, mark):
    assert mark(ChatTokenizer(make_tokenizer(chatml)), TWO_TURNS) == TWO_TURNS_MARKED


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_generation_tags_are_followed_and_the_end_token_joined(make_tokenizer, mark, body):
    assert mark(ChatTokenizer(make_tokenizer(TAGGED.replace("BODY", body))), TWO_TURNS) == TWO_TURNS_MARKED


def test_a_header_inside_the_tags_is_still_prompt(make_tokenizer, mark):
    template = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{- '<|im_start|>assistant\n' + message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
        "{%- else -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )
    assert mark(ChatTokenizer(make_tokenizer(template)), TWO_TURNS) == TWO_TURNS_MARKED


def test_text_after_the_end_token_is_not_supervised(make_tokenizer, chatml, mark):
    tokenizer = make_tokenizer(chatml + "{% if messages[-1].role == 'assistant' %}<|endoftext|>{% endif %}")
    chat = ChatTokenizer(tokenizer, stop_token_ids=[tokenizer.pad_token_id])
    assert mark(chat, ONE_TURN) == HEADER + "[[yo<|im_end|>]]\n<|endoftext|>"


def test_a_turn_ends_with_an_extra_stop_token(make_tokenizer, mark):
    body = "{%- generation -%}{{- message.content -}}{%- endgeneration -%}{{- '<|stop|>\n' -}}"
    tokenizer = make_tokenizer(TAGGED.replace("BODY", body))
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert mark(ChatTokenizer(tokenizer), ONE_TURN) == HEADER + "[[yo]]<|stop|>\n"
    assert mark(ChatTokenizer(tokenizer, stop_token_ids=[stop]), ONE_TURN) == HEADER + "[[yo<|stop|>]]\n"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_white_space_inside_an_answer_leaves_no_hole(make_tokenizer, chatml, mark, trim_offsets):
    chat = ChatTokenizer(make_tokenizer(chatml, trim_offsets=trim_offsets))
    turns = [("user", "hi"), ("assistant", "  if x:\n    y\n\n  z  ")]
    assert mark(chat, turns) == HEADER + "[[  if x:\n    y\n\n  z  <|im_end|>]]\n"


def test_a_token_that_spans_prompt_and_answer_is_not_supervised(make_tokenizer, chatml, mark):
    marked = mark(ChatTokenizer(make_tokenizer(chatml)), [("user", "hi"), ("assistant", "\nyo")])
    assert marked == HEADER + "\n[[yo<|im_end|>]]\n"


def test_a_conversation_without_answer_has_no_supervision(make_tokenizer, chatml, mark):
    assert "[[" not in mark(ChatTokenizer(make_tokenizer(chatml)), [("user", "hi")])


def test_an_opening_assistant_turn_is_context(make_tokenizer, chatml, mark):
    marked = mark(ChatTokenizer(make_tokenizer(chatml)), [("assistant", "hello"), *ONE_TURN])
    assert marked == "<|im_start|>assistant\nhello<|im_end|>\n" + HEADER + "[[yo<|im_end|>]]\n"


def test_the_templates_empty_think_block_is_prompt_in_either_mode(make_tokenizer, mark):
    tokenizer = make_tokenizer(THINKING)
    for kwargs in ({"enable_thinking": False}, {"enable_thinking": True}, {}):
        chat = ChatTokenizer(tokenizer, chat_template_kwargs=kwargs)
        assert mark(chat, ONE_TURN) == HEADER + "<think>\n\n</think>\n\n[[yo<|im_end|>]]\n"
    indented = mark(chat, [("user", "hi"), ("assistant", "  yo")])
    assert indented == HEADER + "<think>\n\n</think>\n\n[[  yo<|im_end|>]]\n"


def test_thinking_that_the_message_holds_is_supervised(make_tokenizer, mark):
    chat = ChatTokenizer(make_tokenizer(THINKING))
    for thought in ("hm", ""):
        turns = [("user", "hi"), ("assistant", f"<think>\n{thought}\n</think>\n\nyo")]
        assert mark(chat, turns) == HEADER + f"[[<think>\n{thought}\n</think>\n\nyo<|im_end|>]]\n"


def test_kwargs_reach_the_template(make_tokenizer, mark):
    # The prompt of this mode ends in an empty think block, which a turn with thoughts does not contain.
    chat = ChatTokenizer(make_tokenizer(THINKING), chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(InputError, match="does not render its generation prompt before assistant message 1"):
        mark(chat, [("user", "hi"), ("assistant", "<think>\nhm\n</think>\n\nyo")])


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer, mark):
    with pytest.raises(InputError, match="rewrites assistant message 2 when later messages follow"):
        mark(ChatTokenizer(make_tokenizer(THINKING)), TWO_TURNS)


def test_a_template_that_drops_reasoning_is_refused(make_tokenizer, chatml, mark):
    template = chatml.replace("message.content", "message.content.split('</think>')[-1]")
    chat = ChatTokenizer(make_tokenizer(template))
    assert "[[yo<|im_end|>]]" in mark(chat, ONE_TURN)
    with pytest.raises(InputError, match="drops or rewrites part of assistant message 1"):
        mark(chat, [("user", "hi"), ("assistant", "<think>hm</think>yo")])
    reasoned = {"role": "assistant", "content": "yo", "reasoning_content": "hm"}
    with pytest.raises(InputError, match="drops or rewrites part of assistant message 1"):
        chat(parse_record({"messages": [{"role": "user", "content": "hi"}, reasoned]}, "here"))


def test_a_template_that_ignores_the_generation_prompt_is_refused_unless_it_needs_none(make_tokenizer, chatml, mark):
    with pytest.raises(InputError, match=r"ignores add_generation_prompt \(assistant message 1\)"):
        mark(ChatTokenizer(make_tokenizer(chatml.partition("{% if")[0])), ONE_TURN)
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% else %} {{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    marked = mark(ChatTokenizer(make_tokenizer(template)), [*ONE_TURN, *ONE_TURN])
    assert marked == "[INST] hi [/INST][[ yo<|im_end|>]][INST] hi [/INST][[ yo<|im_end|>]]"


def test_tags_with_wrong_positions_are_refused(make_tokenizer, mark):
    # What a set block or macro holds is rendered before it is placed: the spans count from where the block stands.
    template = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{%- set turn -%}"
        "{{- '<|im_start|>assistant\n' -}}{%- generation -%}{{- message.content -}}{%- endgeneration -%}{%- endset -%}"
        "{{- turn + '<|im_end|>\n' -}}{%- else -%}{{- message.content -}}{%- endif -%}{%- endfor -%}"
    )
    with pytest.raises(InputError, match="spans do not hold the text of assistant message 2"):
        mark(ChatTokenizer(make_tokenizer(template)), TWO_TURNS)


def test_what_a_template_raises_is_an_input_error(make_tokenizer, chatml, mark):
    chat = ChatTokenizer(
        make_tokenizer("{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + chatml)
    )
    with pytest.raises(InputError, match="the chat template fails on this conversation: too long"):
        mark(chat, TWO_TURNS)
    with pytest.raises(InputError, match="the chat template fails on this conversation"):
        mark(ChatTokenizer(make_tokenizer("{{ messages[0].content + 1 }}")), ONE_TURN)


def test_a_tokenizer_that_cannot_serve_is_refused(make_tokenizer, chatml):
    with pytest.raises(InputError, match="has no chat template"):
        ChatTokenizer(make_tokenizer(None))
    with pytest.raises(InputError, match="chat_template_kwargs: messages cannot be set"):
        ChatTokenizer(make_tokenizer(chatml), chat_template_kwargs={"messages": []})


def test_tools_reach_the_template(make_tokenizer, chatml):
    chat = ChatTokenizer(make_tokenizer("{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}" + chatml))
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    input_ids, loss_mask = chat(Conversation(messages, ({"name": "add"},), "here"))
    assert chat.tokenizer.decode(input_ids).startswith("<add><|im_start|>user")
    assert chat.tokenizer.decode(input_ids[loss_mask]) == "yo<|im_end|>"


def test_threads_and_copies_give_the_same_masks(make_tokenizer):
    body = BODIES["tags end at the end token"]
    chat = ChatTokenizer(make_tokenizer(TAGGED.replace("BODY", body)))
    records = [
        parse_record({"messages": [{"role": r, "content": c * (i % 7 + 1)} for r, c in TWO_TURNS]}, "here")
        for i in range(100)
    ]
    expected = [chat(record) for record in records]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(pickle.loads(pickle.dumps(chat)), records))
    finally:
        sys.setswitchinterval(interval)
    for (ids, mask), (expected_ids, expected_mask) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(mask, expected_mask)
