"""A conversation -> token ids and loss mask, through the tokenizer's own chat template.

Supervised is what the writer of an assistant turn generates: from the end of the generation prompt to the token that
ends the turn, that token included. It is found as character spans of the rendered text, in one of two ways:

* `{% generation %}` tags, where the template has them;
* otherwise prefix rendering: turn i spans from `render(messages[:i], add_generation_prompt=True)` to
  `render(messages[:i + 1])`, provided that both are prefixes of the full rendering.

A template that neither way can trust is refused. Where only the last assistant turn is learnt (`TurnRules`), only that
one must be found: it may follow turns that the template rewrites, as Qwen3's drops their reasoning. The text is
tokenised once; a token is supervised when all its characters are.
"""

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from specjax.data.conversations import Conversation, Message
from specjax.data.turns import ALL_AS_WRITTEN, TurnRules, supervised_turns, without_reasoning
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that end an assistant turn in released chat models, beside the tokenizer's eos token.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
# Arguments of the renderer itself: a chat template kwarg of this name would replace them.
RESERVED_KWARGS = frozenset(
    {"conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    | {"continue_final_message", "return_assistant_tokens_mask", "return_dict"}
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\n{0,2}")  # no more: an answer may begin with white space
# transformers keeps the spans of `{% generation %}` on the compiled template, which all threads share.
_render_lock = threading.Lock()

Span = tuple[int, int]


class ChatTokenizer:
    """Callable: a `Conversation` -> (input_ids int32 [t], loss_mask bool [t]). Picklable and thread-safe.

    `chat_template_kwargs` (such as enable_thinking) reach the template; `stop_token_ids` (a generation config's) end a
    turn like the tokenizer's eos and the names of `END_OF_TURN_TOKENS`; `rules` say which turns are learnt and whether
    their reasoning is rendered.
    Raises InputError for a tokenizer without chat template or without character offsets, and, when called, for a
    conversation on which the template fails or gives no sound mask; the message does not name the conversation.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_token_ids: Iterable[int] = (),
        rules: TurnRules = ALL_AS_WRITTEN,
    ) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise InputError(f"tokenizer {name}: it has no chat template; add one to its folder or pre-tokenise")
        if not tokenizer.is_fast:
            raise InputError(f"tokenizer {name}: it gives no character offsets; use a fast tokenizer (tokenizer.json)")
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        reserved = sorted(RESERVED_KWARGS & self.chat_template_kwargs.keys())
        if reserved:
            raise InputError(f"chat_template_kwargs: {', '.join(reserved)} cannot be set; remove it")
        self.tokenizer = tokenizer
        self.rules = rules
        vocabulary = tokenizer.get_vocab()
        named = [vocabulary[token] for token in END_OF_TURN_TOKENS if token in vocabulary]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.end_of_turn_ids = tuple(sorted({*named, *eos, *stop_token_ids}))
        # Padding or truncation stored in tokenizer.json is switched off by a first call, which changes the tokenizer:
        # here, before several threads share it.
        self._encode("")

    def __call__(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        messages, tools = conversation.messages, conversation.tools
        if self.rules.reasoning == "hide":
            messages = without_reasoning(messages)
        turns = supervised_turns(messages, self.rules)
        template = self.tokenizer.get_chat_template(tools=list(tools) or None)
        render = _Renderer(self, template, tools)
        if _GENERATION_TAG.search(template):
            text, spans = _tagged_spans(render, messages, turns)
        else:
            text, spans = _prefix_spans(render, messages, turns)
        input_ids, bounds = self._encode(text)
        loss_mask = _covered(bounds, spans, len(text))
        return input_ids, self._end_turns(input_ids, bounds, loss_mask, text)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [t] and the characters [start, stop) of each, int64 [t, 2], without gaps between tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        input_ids = np.asarray(encoded["input_ids"], np.int32)
        bounds = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        # Byte-level tokenizers with trim_offsets cut leading spaces off a token's range (a run of spaces keeps none):
        # a token begins where the one before ended, unless the two share a character of several bytes.
        previous_stop = np.maximum.accumulate(np.concatenate([[0], bounds[:, 1]]))[:-1]
        bounds[:, 0] = np.minimum(bounds[:, 0], previous_stop)
        return input_ids, bounds

    def _end_turns(self, input_ids: np.ndarray, bounds: np.ndarray, loss_mask: np.ndarray, text: str) -> np.ndarray:
        """The mask with each supervised run ending in its end-of-turn token: added where a tag left it out, and white
        space or further stop tokens that the template writes after it taken away."""
        ends = np.isin(input_ids, self.end_of_turn_ids)
        mask = loss_mask.copy()
        mask[1:] |= loss_mask[:-1] & ends[1:]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        for start, stop in edges.reshape(-1, 2):
            end = stop
            for i in range(stop - 1, start - 1, -1):
                if ends[i]:
                    end = i + 1
                elif text[bounds[i, 0] : bounds[i, 1]].strip():
                    break
            mask[end:stop] = False
        return mask


class _Renderer:
    """Renders messages with one chat template."""

    def __init__(self, chat: ChatTokenizer, template: str, tools: Sequence[dict[str, Any]]) -> None:
        self._template = template
        self._tools: list[Any] | None = list(tools) or None
        self._variables = {**chat.tokenizer.special_tokens_map, **chat.chat_template_kwargs}

    def __call__(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of the messages, with the generation prompt after them if asked for."""
        return self._render(messages, prompt=prompt)[0]

    def tagged(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of the messages and the spans of its `{% generation %}` blocks."""
        return self._render(messages, spans=True)

    def _render(
        self, messages: Sequence[Message], *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            with _render_lock:
                # Annotated as a string, it returns (texts, spans), one of each per conversation.
                rendered: Any = render_jinja_template(
                    conversations=[list(messages)],
                    tools=self._tools,
                    chat_template=self._template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=spans,
                    **self._variables,
                )
            return rendered[0][0], rendered[1][0] if spans else []
        # What a template raises by itself, and what its expressions raise on fields it did not expect.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"the chat template fails on this conversation: {error}") from error


def _tagged_spans(render: _Renderer, messages: Sequence[Message], turns: Sequence[int]) -> tuple[str, list[Span]]:
    """The rendered text and its `{% generation %}` spans from the first of `turns` on, less what the template writes in
    the writer's stead."""
    text, spans = render.tagged(messages)
    spans = _subtract(spans, [(0, _start_of(render, messages, turns, text))])
    generated = _squeeze("".join(text[start:stop] for start, stop in spans))
    for i in turns:
        answer = _squeeze(messages[i].get("content", "").rpartition("</think>")[2])
        if answer not in generated:
            raise InputError(
                f"the chat template's {{% generation %}} spans do not hold the text of assistant message {i} (tags "
                "inside a macro or a set block give wrong positions); move the tags to the template's top level"
            )
    return text, _subtract(spans, [*_prompt_spans(render, messages, text), *_empty_thinking(messages, text)])


def _start_of(render: _Renderer, messages: Sequence[Message], turns: Sequence[int], text: str) -> int:
    """The character of `text` at which the messages before the first of `turns` end; 0 if none of them is an answer."""
    before = messages[: turns[0]] if turns else ()
    if not any(message["role"] == "assistant" for message in before):
        return 0
    rendered = render(before)
    if not text.startswith(rendered):
        raise InputError(
            f"the chat template renders what precedes assistant message {turns[0]} in another way once that follows, "
            "so where it begins cannot be told; supervise all turns, or use conversations of one assistant turn"
        )
    return len(rendered)


def _prompt_spans(render: _Renderer, messages: Sequence[Message], text: str) -> list[Span]:
    """Where `text` holds the generation prompt before an assistant turn, as far as the template renders it there."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            header, prompt = render(messages[:i]), render(messages[:i], prompt=True)
            if prompt.startswith(header) and text.startswith(prompt):
                spans.append((len(header), len(prompt)))
    return spans


def _prefix_spans(render: _Renderer, messages: Sequence[Message], turns: Sequence[int]) -> tuple[str, list[Span]]:
    """The rendered text and the span of each of `turns`, by rendering the messages before it and with it.

    An assistant turn that opens the conversation has no prompt and is context only.
    """
    text = render(messages)
    spans = []
    for i in turns:
        if i == 0:
            continue
        before, prompt = render(messages[:i]), render(messages[:i], prompt=True)
        through = render(messages[: i + 1])
        _check_turn(text, before, prompt, through, messages[i], i)
        spans.append((len(prompt), len(through)))
    return text, _subtract(spans, _empty_thinking(messages, text))


def _check_turn(text: str, before: str, prompt: str, through: str, message: Message, i: int) -> None:
    """Raises InputError unless the prefixes locate assistant message `i`, whole, in the full rendering `text`."""
    remedy = (
        "so its answers cannot be told from its prompts; use a template with {% generation %} tags, other "
        "chat_template_kwargs, data.supervise last, conversations of one assistant turn, or pre-tokenised records"
    )
    if not (text.startswith(prompt) and prompt.startswith(before)):
        raise InputError(
            f"the chat template does not render its generation prompt before assistant message {i}, {remedy}"
        )
    if not (text.startswith(through) and through.startswith(prompt)):
        raise InputError(f"the chat template rewrites assistant message {i} when later messages follow, {remedy}")
    turn = _squeeze(through[len(before) :])
    content = message.get("content", "")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    for part in (content, reasoning):
        if isinstance(part, str) and _squeeze(part) not in turn:
            raise InputError(f"the chat template drops or rewrites part of assistant message {i}, {remedy}")
    # Some templates need no generation prompt ("[/INST]"): then the answer must follow at once.
    if prompt == before and not turn.startswith(_squeeze(reasoning or content)):
        raise InputError(f"the chat template ignores add_generation_prompt (assistant message {i}), {remedy}")


def _empty_thinking(messages: Sequence[Message], text: str) -> list[Span]:
    """Empty think blocks in `text` that no message holds: the template wrote them."""
    if any(_EMPTY_THINK.search(message.get("content", "")) for message in messages):
        return []
    return [match.span() for match in _EMPTY_THINK.finditer(text)]


def _squeeze(text: str) -> str:
    """Without white space, which templates trim and add at will."""
    return "".join(text.split())


def _subtract(spans: Iterable[Span], removed: Iterable[Span]) -> list[Span]:
    """The parts of `spans` that lie in no `removed` span."""
    left = list(spans)
    for low, high in removed:
        parts = [((start, min(stop, low)), (max(start, high), stop)) for start, stop in left]
        left = [(start, stop) for pair in parts for start, stop in pair if start < stop]
    return left


def _covered(bounds: np.ndarray, spans: Iterable[Span], length: int) -> np.ndarray:
    """bool [t]: tokens (character bounds [t, 2]) that are not empty and lie wholly inside the spans."""
    inside = np.zeros(length, np.int64)
    for start, stop in spans:
        inside[start:stop] = 1
    before = np.concatenate([[0], np.cumsum(inside)])
    starts, stops = bounds[:, 0], bounds[:, 1]
    return (stops > starts) & (before[stops] - before[starts] == stops - starts)
