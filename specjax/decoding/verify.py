"""Verify rules: which drafts of a block are kept, and which token follows them.

    match      the target chooses a token at every position, and drafts are kept up to the first that differs
    rejection  draft i is kept with probability min(1, p/q) (arXiv 2211.17192)
    block      the longest prefix is kept that the drafts' joint probabilities allow (arXiv 2403.10444)

p is the target's law of a token, q the one that the draft was really drawn from, both after the same processors. After
the kept drafts comes a token of the law that makes the output the target's. `match` gives the very tokens of
autoregressive decoding, the other two give their distribution and keep more drafts where p and q are close.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from specjax.decoding.sampling import (
    ACCEPTANCE_DRAWS,
    DRAFT_DRAWS,
    TARGET_DRAWS,
    Sampling,
    by_row,
    choose,
    greedy,
    gumbel,
    processed,
    uniform,
)

RULES = ("match", "rejection", "block")
DRAFT_CHOICES = ("argmax", "sample")


def propose(
    logits_bnv: jax.Array, length_b: jax.Array, sampling: Sampling | None, *, rule: str, draft_choice: str
) -> jax.Array:
    """Drafts [b, n] int32 for positions length + 1, ... from the drafter's logits.

    Sampled drafts share the target's randomness under `match`, which emits the target's own draws whatever is drafted;
    the other rules need drafts that are independent of it.
    """
    if sampling is None or sampling.temperature is None or draft_choice == "argmax":
        return greedy(logits_bnv, sampling)
    positions = length_b[:, None] + 1 + jnp.arange(logits_bnv.shape[1], dtype=jnp.int32)
    if rule == "match":
        return choose(logits_bnv, positions, sampling)
    return by_row(_sample_drafts, sampling, logits_bnv, positions, length_b, out_ndim=2)


def verify(
    logits_bsv: jax.Array,
    drafts_bn: jax.Array,
    draft_logits_bnv: jax.Array | None,
    length_b: jax.Array,
    sampling: Sampling | None,
    *,
    rule: str,
) -> tuple[jax.Array, jax.Array]:
    """(tokens [b, n + 1] int32, matched [b] int32): the first matched + 1 tokens follow position length.

    logits: the target's after the known token and after each of the n drafts. draft_logits: those that the drafts were
    sampled from; None where a draft is the likeliest token, and so certain.
    """
    if rule == "match" or not drafts_bn.shape[1]:
        positions = length_b[:, None] + 1 + jnp.arange(logits_bsv.shape[1], dtype=jnp.int32)
        choices = choose(logits_bsv, positions, sampling)
        matches = jnp.cumprod((drafts_bn == choices[:, :-1]).astype(jnp.int32), axis=1)
        return choices, matches.sum(axis=1).astype(jnp.int32)
    assert sampling is not None
    if draft_logits_bnv is None:
        function = lambda sampling, p, d, n: _verify_row(sampling, p, d, None, n, rule)  # noqa: E731
        return by_row(function, sampling, logits_bsv, drafts_bn, length_b, out_ndim=(2, 1))
    return by_row(
        partial(_verify_row, rule=rule), sampling, logits_bsv, drafts_bn, draft_logits_bnv, length_b, out_ndim=(2, 1)
    )


def acceptance(rule: str, p_sv: jax.Array, q_nv: jax.Array, drafts_n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(thresholds [n], residuals [n + 1, v]) of drafts of one row, by `rejection` or `block`.

    With u_i uniform, `rejection` keeps the drafts before the first i with u_i >= threshold, and `block` those up to
    the last i with u_i < threshold. The token after m kept drafts has the law residuals[m], not normalised.
    """
    n = len(drafts_n)
    at_draft = jnp.arange(n), drafts_n
    p_drafts, q_drafts = p_sv[at_draft], q_nv[at_draft]
    ratios = jnp.where(q_drafts > 0, p_drafts / q_drafts, 1.0)
    if rule == "rejection":
        kept = jnp.ones(n)
        thresholds = jnp.minimum(ratios, 1)
    else:
        prefix = [jnp.ones(())]  # probability of keeping the first i drafts
        for ratio in ratios:
            prefix.append(jnp.minimum(prefix[-1] * ratio, 1))
        kept = jnp.stack(prefix[:-1])
        rest = jnp.maximum(kept[:, None] * p_sv[:-1] - q_nv, 0).sum(-1)[1:]  # after drafts 1, ..., n - 1
        among = rest + 1 - kept[1:]
        inner = jnp.where(among > 0, rest / among, 1.0)
        thresholds = jnp.append(inner, prefix[-1])
    residuals = jnp.maximum(kept[:, None] * p_sv[:-1] - q_nv, 0)
    # Where nothing is left (p equals q up to rounding) the draft is kept with certainty; the law is p, if ever asked.
    residuals = jnp.where(residuals.sum(-1, keepdims=True) > 0, residuals, p_sv[:-1])
    return thresholds, jnp.concatenate([residuals, p_sv[-1:]])


def _verify_row(
    sampling: Sampling,
    logits_sv: jax.Array,
    drafts_n: jax.Array,
    draft_logits_nv: jax.Array | None,
    length: jax.Array,
    rule: str,
) -> tuple[jax.Array, jax.Array]:
    n, vocab_size = len(drafts_n), logits_sv.shape[-1]
    p = jax.nn.softmax(processed(logits_sv, sampling), axis=-1)
    if draft_logits_nv is None:
        q = jax.nn.one_hot(drafts_n, vocab_size)
    else:
        q = jax.nn.softmax(processed(draft_logits_nv, sampling), axis=-1)
    thresholds, residuals = acceptance(rule, p, q, drafts_n)
    positions = length + 1 + jnp.arange(n + 1, dtype=jnp.int32)
    # A later round meets some of these positions again, whose randomness `block` has used: the round is part of it.
    draws = jax.vmap(lambda position: uniform(ACCEPTANCE_DRAWS, sampling.seeds, position, length))(positions[:-1])
    passed = draws < thresholds
    if rule == "rejection":
        matched = jnp.cumprod(passed.astype(jnp.int32)).sum()
    else:
        matched = jnp.where(passed, jnp.arange(1, n + 1), 0).max(initial=0)
    matched = matched.astype(jnp.int32)
    noise = gumbel(vocab_size, TARGET_DRAWS, sampling.seeds, positions[matched])
    correction = jnp.argmax(jnp.log(residuals[matched]) + noise).astype(jnp.int32)
    tokens = jnp.append(drafts_n, 0).at[matched].set(correction)
    return tokens, matched


def _sample_drafts(sampling: Sampling, logits_nv: jax.Array, positions_n: jax.Array, length: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda position: gumbel(logits_nv.shape[-1], DRAFT_DRAWS, sampling.seeds, position, length))
    return jnp.argmax(processed(logits_nv, sampling) + noise(positions_n), axis=-1).astype(jnp.int32)
