"""What a benchmark of decoding measures: the grid of settings, and the ways of decoding that it compares."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from specjax.decoding.auto_width import AutoWidth
from specjax.decoding.inputs import check_one_pass, check_rule, check_sampling, check_tree
from specjax.errors import InputError
from specjax.models.dflash import DFlashConfig
from specjax.models.lora_draft import LoRADraftConfig

Width = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Way:
    """A way of decoding.

    draft_tokens: drafts verified a round, the depth of a tree; 0: without a draft; `AUTO`: an `AutoWidth` chooses.
    tree_nodes: drafts of a tree; 0: a chain; `AUTO`, as draft_tokens is then: trees are among what it chooses from.
    rule, draft_choice: see `verify`; a tree is verified by `match`. one_pass: a chain is drafted in the target's own
    pass; `AUTO` chooses that by itself.
    """

    draft_tokens: Width
    tree_nodes: Width = 0
    rule: str = "match"
    draft_choice: str = "argmax"
    one_pass: bool = False

    @property
    def label(self) -> str:
        """Such as "7 drafts", "tree of 28 drafts", "auto drafts or trees", "7 drafts (block, sample, one pass)"."""
        if self.tree_nodes == AUTO:
            return "auto drafts or trees"
        drafts = f"tree of {self.tree_nodes} drafts" if self.tree_nodes else f"{self.draft_tokens} drafts"
        how = [value for value, usual in ((self.rule, "match"), (self.draft_choice, "argmax")) if value != usual]
        how += ["one pass"] if self.one_pass else []
        return f"{drafts} ({', '.join(how)})" if how else drafts

    @property
    def same_draws(self) -> bool:
        """Whether its answers are autoregressive decoding's own, and not other draws of their law."""
        return self.rule == "match"


AR = Way(0)


@dataclass(frozen=True)
class Settings:
    """What to decode and how: every combination of temperature, batch size and way of drafting is measured.

    batch_sizes: prompts decoded together. draft_tokens: drafts verified a round; none is the block's all. rules,
    draft_choices: how these are verified and chosen (see `verify`). tree_nodes: drafts of trees, measured too, as deep
    as the widest of draft_tokens, by `match`; `AUTO`: what an `AutoWidth` with trees chooses. one_pass: chains are
    measured in one pass a round, too. top_k, top_p: at temperatures above 0. seed: of the first prompt of every data
    set. runs: timed passes.
    """

    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    draft_tokens: tuple[Width, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    runs: int = 5
    tree_nodes: tuple[Width, ...] = ()
    rules: tuple[str, ...] = ("match",)
    draft_choices: tuple[str, ...] = ("argmax",)
    one_pass: bool = False

    def depth(self, block_size: int) -> int:
        """Of the trees."""
        return max((width for width in self.draft_tokens if width != AUTO), default=block_size - 1)

    def ways(self, block_size: int, temperature: float) -> tuple[Way, ...]:
        """Ways of drafting with a draft of `block_size`: chains, then trees.

        At temperature 0 all rules are one, and all choices of drafts.
        """
        rules, choices = (self.rules, self.draft_choices) if temperature else (("match",), ("argmax",))
        widths = self.draft_tokens or (block_size - 1,)
        passes = (False, True) if self.one_pass else (False,)
        chains = [
            Way(width, 0, rule, choice, one_pass)
            for width, rule, choice, one_pass in itertools.product(widths, rules, choices, passes)
            if not (one_pass and width == AUTO)
        ]
        depth = self.depth(block_size)
        return (*chains, *(Way(AUTO if nodes == AUTO else depth, nodes) for nodes in self.tree_nodes))


def check_settings(settings: Settings, draft: DFlashConfig | LoRADraftConfig, vocab_size: int) -> None:
    """Raises InputError for a value out of range, given twice, or of no use; `vocab_size` is the target's."""
    for name, values in (
        ("batch_sizes", settings.batch_sizes),
        ("draft_tokens", settings.draft_tokens),
        ("tree_nodes", settings.tree_nodes),
        ("temperatures", settings.temperatures),
        ("rules", settings.rules),
        ("draft_choices", settings.draft_choices),
    ):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise InputError(f"{name}: {twice[0]} is there twice; give every value once")
    for name, numbers in (
        ("batch size", settings.batch_sizes),
        ("max_new_tokens", (settings.max_new_tokens,)),
        ("runs", (settings.runs,)),
    ):
        if min(numbers) < 1:
            raise InputError(f"{name} is {min(numbers)}; give at least 1")
    for width in settings.draft_tokens:
        if width != AUTO and not 1 <= width < draft.block_size:
            raise InputError(f"draft_tokens is {width}; this draft proposes 1 to {draft.block_size - 1}")
    for nodes in settings.tree_nodes:
        if nodes != AUTO:
            check_tree(vocab_size, settings.depth(draft.block_size), nodes)
    chosen = bool(settings.draft_tokens) and set(settings.draft_tokens) == {AUTO}
    check_one_pass(draft, AutoWidth() if chosen else 1, None, settings.one_pass)
    for temperature in settings.temperatures:
        check_sampling(temperature)
    for rule, choice in itertools.product(settings.rules, settings.draft_choices):
        check_sampling(max(settings.temperatures), settings.top_k, settings.top_p, rule, choice)
        if AUTO in settings.draft_tokens:
            check_rule(AutoWidth(), rule, choice)
    if AUTO in settings.tree_nodes:
        check_rule(AutoWidth(trees=True), "match", "argmax")
