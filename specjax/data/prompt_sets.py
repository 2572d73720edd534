"""Sets of prompts by which speculative decoding is measured, each with its fields and the wording of its prompts.

    entry              records                                      format
    gsm8k              those on the hub                             of the set
    gsm8k=SOURCE       of files or a hub set (see `data.sources`)   of the set
    spec-bench:qa=...  the same, of one category                    of the set
    SOURCE             of files or a hub set                        prompt, messages or input_ids

The wording is that of DFlash's public evaluation (https://github.com/z-lab/dflash), so that figures can be compared.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from specjax.data.arrow import HUB_SCHEME, HubSource
from specjax.data.prompts import PROMPT_COLUMNS, Question, Turns, question_of_record
from specjax.data.sources import open_source
from specjax.errors import InputError


@dataclass(frozen=True)
class PromptSet:
    """How records of a set become what a user asks.

    questions: names that copies of the set give to the field of the question; the first that a record has is read. It
    holds a text, or a list of them, one a turn. wording: of a turn, which has the text in place of its first {}.
    appended: fields that may be empty, each with what stands before its text. category: field that divides the set.
    hub: where it is on the hub; None where its authors have it elsewhere, at `home`.
    """

    questions: tuple[str, ...]
    wording: str = "{}"
    appended: Mapping[str, str] = field(default_factory=dict)
    category: str | None = None
    hub: str | None = None
    home: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All fields that are read."""
        return (*self.questions, *self.appended, *([self.category] if self.category else []))

    def ask(self, fields: object, origin: str) -> Turns:
        """What a record asks. Raises InputError, opened by `origin`, for a record without a question in words."""
        if not isinstance(fields, dict):
            raise InputError(f"{origin}: a record is a JSON object, this is {fields!r}")
        name = next((name for name in self.questions if name in fields), None)
        if name is None:
            wanted = " or ".join(self.questions)
            raise InputError(f"{origin}: has no field {wanted}, only {sorted(fields)}; give a copy of the set")
        asked = fields[name] if isinstance(fields[name], list) and fields[name] else [fields[name]]
        given = {key: before for key, before in self.appended.items() if str(fields.get(key) or "").strip()}
        rest = "".join(before + _text(fields[key], key, origin) for key, before in given.items())
        texts = [self.wording.replace("{}", _text(text, name, origin), 1) + rest for text in asked]
        return Turns(tuple(({"role": "user", "content": text},) for text in texts), origin=origin)


def _text(value: object, name: str, origin: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{origin}: field {name} holds {value!r}; give text, or drop the record")
    return value


_STEP_BY_STEP = "{}\nPlease reason step by step, and put your final answer within \\boxed{}."
_CODE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```"
PROMPT_SETS = {
    "gsm8k": PromptSet(("question",), _STEP_BY_STEP, hub="hf://openai/gsm8k?config=main&split=test"),
    "math500": PromptSet(("problem",), _STEP_BY_STEP, hub="hf://HuggingFaceH4/MATH-500?split=test"),
    "humaneval": PromptSet(("prompt",), _CODE, hub="hf://openai/openai_humaneval?split=test"),
    # `text` in the full set.
    "mbpp": PromptSet(("prompt", "text"), hub="hf://google-research-datasets/mbpp?config=sanitized&split=test"),
    # `turns` in the authors' file.
    "mt-bench": PromptSet(
        ("prompt", "turns"), category="category", hub="hf://HuggingFaceH4/mt_bench_prompts?split=train"
    ),
    "alpaca": PromptSet(("instruction",), appended={"input": "\n\nInput:\n"}, hub="hf://tatsu-lab/alpaca?split=train"),
    "spec-bench": PromptSet(
        ("turns",), category="category", home="data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench"
    ),
}
_NAMED = re.compile(r"(?P<column>(?P<name>[\w-]+)(?::(?P<category>[\w-]+))?)(?:=(?P<source>.+))?")


@dataclass(frozen=True)
class Entry:
    """A source of prompts, the name of its column, and the set that it is of, if one was named, with a category."""

    source: str
    column: str
    prompt_set: PromptSet | None = None
    category: str | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """See the module. A set's name comes before a file of that name.

        Raises InputError for a name that is neither, a set that is not on the hub, and a category of a set without.
        """
        named = _NAMED.fullmatch(text)
        if named is not None and named["name"] in PROMPT_SETS:
            return cls._of_set(text, **named.groupdict())
        if named is not None and not os.path.exists(text):
            near = difflib.get_close_matches(named["name"].lower(), PROMPT_SETS, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(f"data {text}: no such file or prompt set; {hint}the sets are {', '.join(PROMPT_SETS)}")
        if text.startswith(HUB_SCHEME):
            return cls(text, HubSource.parse(text).name.rpartition("/")[2])
        return cls(text, Path(text.removesuffix(".gz")).stem)

    @classmethod
    def _of_set(cls, text: str, column: str, name: str, category: str | None, source: str | None) -> Entry:
        prompt_set = PROMPT_SETS[name]
        if category is not None and prompt_set.category is None:
            raise InputError(f"data {text}: {name} has no categories; leave out :{category}")
        source = source or prompt_set.hub
        if source is None:
            raise InputError(f"data {text}: is not on the hub; get {prompt_set.home} and write {column}=FILE")
        return cls(source, column, prompt_set, category)

    def read(self, *, limit: int | None = None, vocab_size: int | None = None) -> list[Question]:
        """The first `limit` questions, in the order of the source.

        Raises InputError naming the place of what is no record of the format, of an empty question, and of a token id
        outside `vocab_size`; for a source that cannot be read, and for a category that no record has.
        """
        prompt_set = self.prompt_set
        parse: Callable[[object, str], Question] = partial(question_of_record, vocab_size=vocab_size)
        columns: Sequence[str] = PROMPT_COLUMNS
        if prompt_set is not None:
            parse, columns = prompt_set.ask, prompt_set.columns
        source = open_source(self.source, columns)
        records: Iterable[tuple[Any, str]] = map(source.fields, range(len(source)))
        if self.category is not None:
            records = self._in_category(records)
        return [parse(*record) for record in islice(records, limit)]

    def _in_category(self, records: Iterable[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
        assert self.prompt_set is not None
        seen = set()
        for fields, origin in records:
            found = fields.get(self.prompt_set.category) if isinstance(fields, dict) else None
            seen.add(str(found))
            if found == self.category:
                yield fields, origin
        if self.category not in seen:
            raise InputError(f"data {self.column}: no record of that category; there are {', '.join(sorted(seen))}")


def prompts_of_turns(
    questions: Sequence[Question],
    render: Callable[[Question, Sequence[str]], list[int]],
    answer: Callable[[Sequence[list[int]]], Iterable[tuple[int, str]]],
) -> list[list[int]]:
    """The prompts of all turns, question after question, each after the answers to the turns before it.

    render: token ids of the turn of a question that follows these answers. answer: (index of a prompt, its answer), in
    any order; it is asked only for turns that another one follows.
    """
    answers: list[list[str]] = [[] for _ in questions]
    prompts = [[render(question, ())] for question in questions]
    counts = [len(question.turns) if isinstance(question, Turns) else 1 for question in questions]
    while unasked := [i for i, count in enumerate(counts) if len(prompts[i]) < count]:
        for position, text in answer([prompts[i][-1] for i in unasked]):
            answers[unasked[position]].append(text)
        for i in unasked:
            prompts[i].append(render(questions[i], answers[i]))
    return [prompt for turns in prompts for prompt in turns]
