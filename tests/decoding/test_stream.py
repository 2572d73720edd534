"""Tokens as they come, and what the host decides between slices of the loop: stop strings."""

from __future__ import annotations

import itertools
import time

import jax
import numpy as np
import pytest

from specjax.decoding import DFlashDrafter, Stream, generate
from specjax.decoding import batch as batches
from specjax.decoding.batch import Batch
from specjax.decoding.drafting import PLAIN
from specjax.decoding.loop import TAPS_BUFFER, decode, decode_round
from specjax.errors import InputError
from specjax.models.sharding import SPECS, make_mesh, mesh_scope, put
from specjax.weights.module_params import flat_params, with_params
from tests.decoding.oracle import Mixture, oracle, proposals
from tests.decoding.tiny import FULL, SLIDING, TARGET, Cases, random_draft, random_prompts, random_target

HOT = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}


class Letters:
    """A tokenizer: every token is one to three letters, token 0 is special and has none."""

    all_special_tokens = ("<special>",)

    def decode(
        self, tokens: list[int], skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> str:
        assert (skip_special_tokens, clean_up_tokenization_spaces) == (True, False)
        return "".join("" if t == 0 else chr(97 + t % 26) * (1 + t % 3) for t in tokens)


def drafter_for(case: Cases, batch: int, rate: float = 0.2) -> Mixture:
    """A real draft whose proposals are often replaced by right ones, for the target and prompts of case(0, batch)."""
    _, prompts, answers = case(0, batch)
    table = proposals(prompts, answers, rate, 0, TARGET.vocab_size)
    known = np.random.default_rng(0).random(table.shape) < 0.7
    return Mixture(DFlashDrafter(random_draft(0, SLIDING)), oracle(table, 8), put(known, SPECS.act_bt))


def test_a_stream_gives_the_rounds_of_a_call(case: Cases) -> None:
    target, prompts, _ = case(0, 3)
    limits = [56, 9, 1]
    with mesh_scope():
        drafter = drafter_for(case, 3)
        expected = generate(target, prompts, drafter, limits)
        pieces = list(Stream(target, prompts, drafter, limits))
    assert [list(itertools.chain(*rows)) for rows in zip(*pieces, strict=True)] == expected.tokens
    assert [len(row) for row in pieces[0]] == [1, 1, 1]  # the prefill's
    uncut = [[len(piece[0]) for piece in pieces[1:]], expected.rounds[0]]
    assert uncut[0][:-1] == uncut[1][:-1]
    assert not any(piece[2] for piece in pieces[1:])


def test_a_stream_leaves_the_mesh_alone_and_can_be_finished(case: Cases) -> None:
    target, prompts, answers = case(0, 3)
    stream = Stream(target, prompts, None, 20, rounds_a_step=4)
    seen = []
    for pieces in stream:
        assert jax.sharding.get_abstract_mesh().empty
        seen.append(pieces)
        if len(seen) == 3:
            break
    assert [len(piece[0]) for piece in seen] == [1, 4, 4]
    assert [len(pieces[0]) for pieces in stream] == [0, 4, 4, 3]  # goes on where it was left
    assert stream.result().tokens == [answer[:20] for answer in answers]
    assert list(Stream(target, [], None)) == [[]]


@pytest.mark.parametrize("drafted", [False, True])
def test_stop_strings_end_answers_at_the_token_that_completes_them(
    case: Cases, drafted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings inside a token, across two, none, and in the first token; the reference searches prefix by prefix."""
    target, prompts, answers = case(0, 3)
    tokenizer = Letters()
    text = tokenizer.decode(answers[0][:56])
    strings = [text[20:24], tokenizer.decode(answers[1][:1]), "?"]

    def end(answer: list[int]) -> int:
        found = (n for n in range(57) if any(s in tokenizer.decode(answer[:n]) for s in strings))
        return next(found, 56)

    ends = [end(answer) for answer in answers]
    assert len(set(ends)) == 3
    assert min(ends) == 1
    with mesh_scope():
        drafter = drafter_for(case, 3) if drafted else None
        whole = generate(target, prompts, drafter, 56)
        found = generate(target, prompts, drafter, 56, stop_strings=strings, tokenizer=tokenizer)
        pieces = list(Stream(target, prompts, drafter, 56, stop_strings=strings, tokenizer=tokenizer))
    assert found.tokens == [answer[:n] for answer, n in zip(answers, ends, strict=True)]
    assert [list(itertools.chain(*rows)) for rows in zip(*pieces, strict=True)] == found.tokens
    for rounds, all_rounds, tokens in zip(found.rounds, whole.rounds, found.tokens, strict=True):
        assert rounds == all_rounds[: len(rounds)]
        if drafted:
            assert 1 + sum(rounds[:-1]) < len(tokens) <= 1 + sum(rounds) or not rounds


def test_several_samples_share_a_prefill_and_are_those_of_single_calls() -> None:
    target, prompts = random_target(3), random_prompts(3, 2)
    seeds = [3, 5, 8, 13, 21, 34]
    twice = [prompt for prompt in prompts for _ in range(3)]
    expected = generate(target, twice, random_draft(0, FULL), 20, seed=seeds, **HOT)
    found = generate(target, prompts, random_draft(0, FULL), [20, 20], seed=seeds, samples=3, **HOT)
    assert (found.tokens, found.rounds) == (expected.tokens, expected.rounds)
    assert len({tuple(tokens) for tokens in found.tokens}) == 6
    with jax.set_mesh(make_mesh(2, 1, 2)):
        sharded = generate(random_target(3), prompts, random_draft(0, FULL), 20, seed=seeds, samples=3, **HOT)
    assert sharded.tokens == expected.tokens


@pytest.mark.parametrize("kind", [FULL, SLIDING], ids=["full", "sliding"])
def test_a_prefill_in_chunks_is_the_prefill(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that end inside, at and after a chunk's edge; drafts, too, see the whole prompt."""
    target, rng = random_target(1), np.random.default_rng(1)
    prompts = [rng.integers(0, TARGET.vocab_size, n).tolist() for n in (1, 16, 17, 32, 61)]
    draft = random_draft(1, kind)
    expected = generate(target, prompts, draft, 12)
    states = []
    for chunk in (64, 16):
        monkeypatch.setattr(batches, "PREFILL_CHUNK", chunk)
        with mesh_scope():
            batch = Batch.build(target, prompts, [12] * 5, [[]] * 5, 4)
            states.append(batch.prefill(target, DFlashDrafter(draft)))
    for whole, chunked in zip(*(jax.tree.leaves((s.cache, s.drafter)) for s in states), strict=True):
        for row, prompt in enumerate(prompts):
            got, wanted = (np.asarray(x)[row, :, : len(prompt)] for x in (chunked, whole))
            np.testing.assert_allclose(got, wanted, atol=2e-5)
    found = generate(target, prompts, draft, 12)
    assert (found.tokens, found.rounds) == (expected.tokens, expected.rounds)


def test_plain_rounds_keep_the_drafts_context(case: Cases) -> None:
    """Taken in many at a time, and one by one: the same keys and values, of committed tokens only."""
    target, prompts, _ = case(0, 3)
    drafter = DFlashDrafter(random_draft(0, FULL))
    count = TAPS_BUFFER + 5
    with mesh_scope():
        batch = Batch.build(target, prompts, [56, 9, 1], [[]] * 3, 4)
        state = batch.prefill(target, drafter)
        step = jax.jit(lambda state: decode_round(target, drafter, state, batch.limits, drafting=PLAIN))
        for _ in range(count):
            state = step(state)
        together = batch.prefill(target, drafter)
        together = decode(target, drafter, together, batch.limits, until=put(np.int32(count), jax.P()), drafting=PLAIN)
    np.testing.assert_array_equal(together.tokens, state.tokens)
    np.testing.assert_array_equal(together.rounds, state.rounds)
    for left, right in zip(jax.tree.leaves(together.drafter), jax.tree.leaves(state.drafter), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_what_the_host_does_between_rounds_is_time_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    target, prompt, pause, looks = random_target(0), random_prompts(0, 1), 0.2, 0
    look = Stream._look
    list(Stream(target, prompt, None, 4))  # compiles

    def slow_look(stream: Stream) -> None:
        nonlocal looks
        looks += 1
        time.sleep(pause)
        look(stream)

    monkeypatch.setattr(Stream, "_look", slow_look)
    stream = Stream(target, prompt, None, 4)
    list(stream)
    assert looks == 4  # after the prefill, and after each of the three rounds
    assert stream.result().decode_seconds > 3 * pause


def test_masked_tokens_never_come() -> None:
    """Greedy and drawn, one mask for all and one a prompt, with and without a draft."""
    target, prompts = random_target(3), random_prompts(3, 3)
    free = generate(target, prompts, max_new_tokens=20)
    mask = np.ones((3, TARGET.vocab_size), bool)
    for row, tokens in zip(mask, free.tokens, strict=True):
        row[tokens[:10]] = False
    for options in ({}, HOT):
        plain = generate(target, prompts, max_new_tokens=20, logit_mask=mask, **options)
        for row, tokens in zip(mask, plain.tokens, strict=True):
            assert row[tokens].all()
        for choice in ("argmax", "sample") if options else ("argmax",):
            drafted = generate(
                target, prompts, random_draft(0, FULL), 20, logit_mask=mask, draft_choice=choice, **options
            )
            assert drafted.tokens == plain.tokens
    one = generate(target, prompts[:1], max_new_tokens=20, logit_mask=mask[0])
    assert one.tokens == generate(target, prompts, max_new_tokens=20, logit_mask=mask).tokens[:1]
    everything = np.ones(TARGET.vocab_size, bool)
    assert generate(target, prompts, max_new_tokens=20, logit_mask=everything).tokens == free.tokens


def test_forbidden_drafts_make_room_for_allowed_ones() -> None:
    """In a chain and in a tree of one node: what the draft likes best may not come, and what it likes next is right."""
    target, prompts = random_target(3), random_prompts(3, 1)
    mask = np.arange(TARGET.vocab_size) % 2 == 0
    answers = generate(target, prompts, max_new_tokens=20, logit_mask=mask).tokens
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    each = np.eye(TARGET.vocab_size, dtype=np.float32)
    with mesh_scope():
        drafter = oracle(each[table] + 2 * each[table + 1], 2)
        for nodes in (None, 1):
            found = generate(target, prompts, drafter, 20, logit_mask=mask, tree_nodes=nodes)
            assert (found.tokens, found.rounds) == (answers, [[2] * 10])


def test_weights_that_are_not_finite_are_named_by_their_prompt() -> None:
    target = random_target(0)
    arrays = dict(flat_params(target))
    embedding = np.array(arrays["embed_tokens.weight"])
    embedding[7] = np.nan
    with mesh_scope():
        target = with_params(target, arrays | {"embed_tokens.weight": put(embedding, SPECS.embed_vd)})
    with pytest.raises(InputError, match="prompt 1: the target's hidden states are not finite"):
        generate(target, [[1, 2], [1, 7]], max_new_tokens=3)
