"""What a round drafts, and the round itself: drafts from the drafter, and the target's pass over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specjax.decoding.drafter import Drafter, Rows, one_pass_drafter
from specjax.decoding.sampling import Sampling, masked
from specjax.decoding.target_pass import Verified, verify_chain, verify_tree
from specjax.decoding.tree import draft_tree
from specjax.decoding.verify import propose
from specjax.models.decoder import Decoder


@dataclass(frozen=True)
class Drafting:
    """What a round drafts, and how it is verified; static.

    draft_tokens: the length of the chain, or the depth of the tree; 0 decodes autoregressively. tree_nodes: drafts of a
    tree; 0: a chain. rule, draft_choice: see `verify`; a tree is verified by `match`. one_pass: a chain's drafts come
    from the pass that verified the round before, see `models.one_pass`; of a `OnePassDrafter`.
    """

    draft_tokens: int
    tree_nodes: int = 0
    rule: str = "match"
    draft_choice: str = "argmax"
    one_pass: bool = False


PLAIN = Drafting(0)


def draft_and_verify(
    target: Decoder,
    drafter: Drafter | None,
    drafter_state: Any,
    rows: Rows,
    sampling: Sampling | None,
    drafting: Drafting,
) -> Verified:
    """A round of `rows`; without drafts a step of autoregressive decoding. Nothing is committed."""
    tap_ids = drafter.tap_ids if drafter is not None else ()
    rule, choice = drafting.rule, drafting.draft_choice
    ahead = one_pass_drafter(drafter) if drafting.one_pass else None
    if ahead is not None:
        logits = ahead.ahead_logits(drafter_state, target, drafting.draft_tokens)
    elif drafter is not None and drafting.draft_tokens:
        logits = drafter.draft_logits(drafter_state, target, rows, drafting.draft_tokens)
    else:
        return verify_chain(target, rows, None, None, sampling, rule, tap_ids=tap_ids)
    if drafting.tree_nodes:
        tree = draft_tree(rows.token, masked(logits, sampling), drafting.tree_nodes)
        return verify_tree(target, rows, tree, sampling, tap_ids=tap_ids)
    drafts = propose(logits, rows.length, sampling, rule=rule, draft_choice=choice)
    law = logits if choice == "sample" else None
    return verify_chain(target, rows, drafts, law, sampling, rule, tap_ids=tap_ids, drafting_ahead=ahead)
