"""The prompts that `specjax.benchmark decode` answers: the sets named by --data, every turn a prompt of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specjax.cli import Models
    from specjax.data.prompt_sets import Entry

# Answers that later turns quote are decoded so whatever is measured: every draft and batch size meets equal prompts.
TURN_BATCH_SIZE = 8


def named_entries(texts: Sequence[str]) -> dict[str, Entry]:
    """The entries of --data by the names of their columns: whole entries where short names clash with one another or
    with the total, "all". Raises InputError for a name that is no prompt set."""
    from specjax.data.prompt_sets import Entry

    entries = [Entry.parse(text) for text in texts]
    names = [entry.column for entry in entries]
    unique = [text if names.count(name) > 1 or name == "all" else name for text, name in zip(texts, names, strict=True)]
    return dict(zip(unique, entries, strict=True))


def read_data_sets(
    entries: Mapping[str, Entry],
    models: Models,
    *,
    chat_template_kwargs: Mapping[str, Any],
    max_new_tokens: int,
    limit: int | None = None,
) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of every entry, of its first `limit` examples.

    A turn that another one follows is answered by the target alone, greedily, with at most `max_new_tokens` tokens.
    Sets of single turns decode nothing here. Raises InputError naming the place of what cannot be a prompt.
    """
    from specjax.data.prompt_sets import prompts_of_turns
    from specjax.data.prompts import Question, answer_text, check_context, question_prompt
    from specjax.decoding.by_length import generate_by_length

    target = models.target.config

    def render(question: Question, answers: Sequence[str]) -> list[int]:
        prompt = question_prompt(question, answers, models.tokenizer, chat_template_kwargs)
        place = f"{question.origin}, turn {len(answers) + 1}"
        check_context(prompt, max_new_tokens, target.max_position_embeddings, place)
        return prompt

    def answer(prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        assert models.tokenizer is not None  # which rendered these prompts
        answers = generate_by_length(
            models.target,
            prompts,
            batch_size=TURN_BATCH_SIZE,
            max_new_tokens=max_new_tokens,
            stop_token_ids=models.stop_token_ids,
        )
        for i, tokens in answers:
            yield i, answer_text(tokens, models.stop_token_ids, models.tokenizer)

    return {
        name: prompts_of_turns(entry.read(limit=limit, vocab_size=target.vocab_size), render, answer)
        for name, entry in entries.items()
    }
