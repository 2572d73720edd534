"""A tree of drafts from one forward pass of the draft, and which path of it the target takes.

A block draft gives every slot a distribution of its own, q_1 ... q_D, and so any choice of a token per slot a
probability, the product of its tokens'. The tree (DDTree, arXiv 2604.12989) holds the choices' prefixes of the greatest
probability:

    depth   0          1         2        3
            known -+-  a  -+-    b   -    c      the chain: every slot's likeliest token
                   |       +-    d
                   +-  e   -     b

The target scores all nodes at once and follows the tree as long as the node of its own choice is there. The chain is
always part of the tree, so that no round keeps less than the chain alone would.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from specjax.models.sharding import SPECS

MOST_TREE_NODES = 1024  # every node sees the others through a mask of nodes^2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftTree:
    """Trees of n drafts under the known tokens of b rows. Parents come before their children.

    tokens: [b, n + 1] int32, tokens[:, 0] being the known ones; then the chain, then other nodes, likeliest first.
    parent: [b, n + 1] int32, the index of the node before; the root's own for the root.
    depth: [b, n + 1] int32, tokens after the known one.
    max_depth: D, the depth of the chain.
    """

    tokens: jax.Array
    parent: jax.Array
    depth: jax.Array
    max_depth: int = field(metadata={"static": True})

    def ancestors(self) -> jax.Array:
        """[b, n + 1, n + 1] bool: whether node j is node i or above it."""
        index = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)
        at = jnp.zeros_like(self.parent) + index
        found = at[:, :, None] == index
        for _ in range(self.max_depth):
            at = pick(self.parent, at)
            found |= at[:, :, None] == index
        return found

    def accepted(self, choices: jax.Array, ancestors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The path that follows the target's `choices` [b, n + 1] of a token after each node.

        Returns the path's nodes by depth, [b, D + 1] int32 from the root on, and how many of its drafts are right, [b]
        int32; later entries are 0.
        """
        wrong = (self.tokens != pick(choices, self.parent)) & (self.depth > 0)
        right = ~(ancestors & wrong[:, None]).any(-1)
        # Siblings differ in their tokens: at most one node of a depth is right.
        levels = jnp.arange(self.max_depth + 1, dtype=jnp.int32)
        here = right[:, None] & (self.depth[:, None] == levels[:, None])
        return jnp.argmax(here, axis=-1).astype(jnp.int32), right.sum(-1).astype(jnp.int32) - 1


def pick(values: jax.Array, index_bt: jax.Array) -> jax.Array:
    """Of [b, n, ...] the entries `index_bt` of every row: [b, t, ...]."""
    return jax.vmap(lambda row, at: row[at])(values, index_bt)


def draft_tree(known_b: jax.Array, logits_bDv: jax.Array, nodes: int) -> DraftTree:
    """The tree of `nodes` drafts after the known tokens from the logits of D slots, whose vocabulary may be split.

    It holds the chain and the nodes - D other prefixes of the greatest probability; of equal ones the shallower first,
    then that of the better prefix before its last token, then that of the lower last token.

    Raises:
        ValueError: `nodes` is below D, or above the size of the vocabulary.
    """
    depth, vocab_size = logits_bDv.shape[1:]
    if not depth <= nodes <= vocab_size:
        raise ValueError(f"a tree of {nodes} nodes; {depth} slots of {vocab_size} tokens take {depth} to {vocab_size}")
    width = nodes - depth + 1
    tokens, logits = _candidates(logits_bDv, width)
    total = jax.nn.logsumexp(logits_bDv, axis=-1, keepdims=True)
    # Local to a row's device: XLA would gather all rows for a top_k.
    in_specs = SPECS.act_b, SPECS.act_btd, SPECS.act_btd, SPECS.act_btd
    build = jax.shard_map(jax.vmap(partial(_row_tree, width)), in_specs=in_specs, out_specs=SPECS.act_bt)
    nodes_bt, parents, depths = build(jax.reshard(known_b, SPECS.act_b), tokens, logits, total)
    return DraftTree(nodes_bt, parents, depths, depth)


def _candidates(logits_bDv: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and logits [b, D, c] that hold each slot's `width` likeliest: the likeliest of every vocabulary shard."""
    split = SPECS.act_btv

    def local(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = logits.shape[-1]
        values, index = jax.lax.top_k(logits, min(width, size))
        return index + size * jax.lax.axis_index("tensor"), values

    best = jax.shard_map(local, in_specs=split, out_specs=(split, split))(jax.reshard(logits_bDv, split))
    return jax.reshard(best, (SPECS.act_btd, SPECS.act_btd))


def _row_tree(
    width: int, known: jax.Array, tokens: jax.Array, logits: jax.Array, total: jax.Array
) -> tuple[jax.Array, ...]:
    """Tokens, parents and depths [n + 1] from candidates [D, c] and their normaliser [D, 1]; `width` w is n - D + 1.

    Of a depth only the w best nodes matter: the first is the chain's, and no more than w - 1 others are chosen.
    They are children of the w best of the depth before, by one of the w likeliest tokens. Child j of parent i comes
    after child j' of i' for all j' <= j and i' <= i, so only pairs with (i + 1) * (j + 1) <= w are looked at.
    """
    depth = tokens.shape[0]
    logits, best = jax.lax.top_k(logits, width)  # of equal ones the lowest id, which comes first
    log_probs = logits - total
    tokens = jnp.take_along_axis(tokens, best, axis=1)
    pairs = jnp.asarray([(i, j) for i in range(width) for j in range(width // (i + 1))], jnp.int32)
    parents, ranks, scores = [jnp.zeros(width, jnp.int32)], [jnp.arange(width, dtype=jnp.int32)], [log_probs[0]]
    for slot in log_probs[1:]:
        score, best = jax.lax.top_k(scores[-1][pairs[:, 0]] + slot[pairs[:, 1]], width)
        parents.append(pairs[best, 0])
        ranks.append(pairs[best, 1])
        scores.append(score)
    # The chain is chosen first. A child is never more probable than its parent, and top_k takes the first of equals:
    # no child is chosen before its parent.
    keys = jnp.stack(scores).at[:, 0].set(jnp.inf)
    _, chosen = jax.lax.top_k(keys.reshape(-1), depth + width - 1)
    level, place = chosen // width, chosen % width
    above = jnp.stack(parents)[level, place]
    is_parent = (level == level[:, None] - 1) & (place == above[:, None])
    parent = jnp.where(level == 0, 0, 1 + jnp.argmax(is_parent, axis=1))
    token = tokens[level, jnp.stack(ranks)[level, place]]
    nodes = jnp.pad(token, (1, 0)).at[0].set(known), jnp.pad(parent, (1, 0)), jnp.pad(level + 1, (1, 0))
    return tuple(x.astype(jnp.int32) for x in nodes)
