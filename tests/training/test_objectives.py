"""The losses against transformers (the target), plain PyTorch (the draft) and plain Python loops in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from specjax.models.decoder import Decoder, DecoderOutput
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.sharding import SPECS, mesh_scope, put
from specjax.training import objectives
from specjax.training.evaluation import causal_lm_evaluator, draft_evaluator
from specjax.training.objectives import BlockDiffusionLoss, CausalLMLoss
from specjax.weights import load_target, save_target
from tests.blockdiff.reference import softmax
from tests.models.torch_weights import filled
from tests.torch_draft import TorchDraft, randomised
from tests.training.tiny import MASK_TOKEN, TARGET_SHAPE, VOCABULARY
from tests.weights.tiny import raw_config, tiny_decoder

ROWS, LENGTH, BLOCK, GAMMA = 2, 70, 4, 2.0
# Row 0 packs two documents before its padding, row 1 is one document; the last anchor of each row is unused.
DOCUMENTS = np.array([[1] * 9 + [2] * 40 + [0] * 21, [1] * 70], np.int32)
STARTS = np.array([[0] * 9 + [9] * 40 + [49] * 21, [0] * 70], np.int32)
ANCHORS = np.array([[3, 6, 11, 20, 26, 33, 0], [1, 7, 18, 40, 55, 67, 0]], np.int32)
VALID = np.array([[True] * 6 + [False]] * 2)
LOSS = BlockDiffusionLoss(
    {"ce": 1.0}, "exp", GAMMA, None, cumulative_mask=True, chunk_blocks=2, query_chunk=16, remat=True
)
LM_LOSS = CausalLMLoss(query_chunk=16, remat=True)

Sums = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def one_device_mesh() -> Iterator[None]:
    with mesh_scope():
        yield


class Case(NamedTuple):
    """The same models twice, and what the reference target says of the rows."""

    target: Decoder
    draft: DFlashDraft
    batch: dict[str, jax.Array]
    torch_draft: TorchDraft
    tokens: np.ndarray
    loss_mask: np.ndarray
    taps: torch.Tensor
    logits: np.ndarray
    embedding: torch.Tensor
    head: np.ndarray


@pytest.fixture(scope="module")
def few_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that mostly says one of four tokens: a random draft is then right often enough to be measured."""
    decoder = tiny_decoder(raw_config(**TARGET_SHAPE))
    decoder.lm_head.kernel[...] *= jnp.where(jnp.arange(VOCABULARY) < 4, 4.0, 1.0)
    return save_target(decoder, tmp_path_factory.mktemp("few_words"), jnp.float32)


@pytest.fixture(scope="module")
def case(few_words: Path) -> Case:
    target = load_target(few_words, dtype=jnp.float32)
    config = DFlashConfig.for_target(
        target.config, num_layers=2, block_size=BLOCK, mask_token_id=MASK_TOKEN, target_layer_ids=(2, 0)
    )
    torch_draft = randomised(TorchDraft(config), seed=0)
    draft = filled(lambda: DFlashDraft(config, rngs=nnx.Rngs(0), dtype=jnp.float32), torch_draft.state_dict())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, np.where(rng.random((ROWS, LENGTH)) < 0.7, 4, 60)).astype(np.int32)
    loss_mask = (rng.random((ROWS, LENGTH)) < 0.85) & (DOCUMENTS > 0)
    loss_mask[np.arange(ROWS)[:, None], ANCHORS + 1] = True
    arrays = (tokens, loss_mask, DOCUMENTS, ANCHORS, VALID)
    names = ("input_ids", "loss_mask", "document_ids", "anchors", "anchor_valid")
    batch = {name: put(x, SPECS.act_bt) for name, x in zip(names, arrays, strict=True)}
    reference = AutoModelForCausalLM.from_pretrained(few_words, dtype=torch.float32)
    taps = torch.zeros(ROWS, LENGTH, 2 * config.hidden_size)
    logits = np.zeros((ROWS, LENGTH, config.vocab_size))
    for row in range(ROWS):
        for start in np.unique(STARTS[row][DOCUMENTS[row] > 0]):
            span = np.flatnonzero((STARTS[row] == start) & (DOCUMENTS[row] > 0))
            with torch.no_grad():
                out = reference(torch.tensor(tokens[row, span])[None], output_hidden_states=True)
            hidden = out.hidden_states
            taps[row, span] = torch.cat([hidden[layer + 1][0] for layer in config.target_layer_ids], -1)
            logits[row, span] = out.logits[0].double().numpy()
    embedding = reference.get_input_embeddings().weight.detach()
    head = reference.lm_head.weight.detach().double().numpy().T
    return Case(target, draft, batch, torch_draft, tokens, loss_mask, taps, logits, embedding, head)


def reference_sums(case: Case, label: Callable[[int, int], int], revealed: np.ndarray | None = None) -> Sums:
    """The block loss's sums, slot by slot; `label(row, position)` is what a block is to predict there.

    revealed: how many slots of a block after its anchor are shown, [b, N].
    expected: of the leading slots accepted when drafts are sampled, at the overlap of draft and target.
    """
    revealed = np.zeros_like(ANCHORS) if revealed is None else revealed
    noise_ids = np.full((ROWS, ANCHORS.shape[1], BLOCK), case.draft.config.mask_token_id)
    noise_ids[..., 0] = np.take_along_axis(case.tokens, ANCHORS, 1)
    for row, j in np.argwhere(VALID):
        for k in range(1, revealed[row, j] + 1):
            x = ANCHORS[row, j] + k
            if x >= LENGTH or DOCUMENTS[row, x] != DOCUMENTS[row, x - k] or not case.loss_mask[row, x]:
                break
            noise_ids[row, j, k] = case.tokens[row, x]
    start = np.take_along_axis(STARTS, ANCHORS, 1)
    with torch.no_grad():
        inputs = (torch.tensor(np.arange(LENGTH) - STARTS), case.embedding[torch.tensor(noise_ids)])
        hidden = case.torch_draft(case.taps, *inputs, torch.tensor(start), torch.tensor(ANCHORS))
    logits = hidden.double().numpy() @ case.head
    sums: Sums = {name: np.zeros(BLOCK) for name in ("correct", "supervised")}
    sums |= {name: np.zeros(()) for name in ("loss_sum", "weight", "prefix", "expected", "blocks")}
    covered: set[tuple[int, int]] = set()
    for row, j in np.argwhere(VALID):
        anchor, matching, prefix, reached, expected = ANCHORS[row, j], True, 1, 1.0, 1.0
        for k in range(1, BLOCK):
            x = anchor + k
            if x >= LENGTH or DOCUMENTS[row, x] != DOCUMENTS[row, anchor] or not case.loss_mask[row, x]:
                break
            if k <= revealed[row, j]:
                continue
            scores, wanted = logits[row, j, k], label(row, x)
            weight = math.exp(-(k - 1) / GAMMA)
            sums["loss_sum"] += weight * (np.log(np.exp(scores).sum()) - scores[wanted])
            sums["weight"] += weight
            covered.add((row, x))
            sums["supervised"][k] += 1
            sums["correct"][k] += scores.argmax() == wanted
            matching = matching and scores.argmax() == wanted
            prefix += matching
            reached *= np.minimum(softmax(scores), softmax(case.logits[row, x - 1])).sum()
            expected += reached
        else:
            k = BLOCK
        supervised = k > 1 + revealed[row, j]
        sums["blocks"] += supervised
        sums["prefix"] += prefix if supervised else 0
        sums["expected"] += expected if supervised else 0
    return sums | {"covered": np.array(len(covered)), "coverable": case.loss_mask.sum()}


def assert_close(ours: dict[str, Any], expected: Sums) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(ours[name]), value, rtol=1e-5, err_msg=name)


def loss_sums(case: Case) -> dict[str, jax.Array]:
    run = jax.jit(lambda *args: LOSS(*args))  # a function of its own: compiled anew where a test breaks something
    loss, sums = run(case.draft, case.target, case.batch)
    return {"loss_sum": loss, "weight": sums.weight, **sums.statistics}


def data_label(case: Case) -> Callable[[int, int], int]:
    return lambda row, x: int(case.tokens[row, x])


def test_the_draft_loss_is_that_of_the_plain_loop(case: Case) -> None:
    expected = reference_sums(case, data_label(case)) | {"expected": np.zeros(())}  # there is no teacher
    assert expected["supervised"][BLOCK - 1] > 2
    assert_close(loss_sums(case), expected)


def test_a_revealed_prefix_is_input_and_not_label(case: Case) -> None:
    revealed = (np.arange(ANCHORS.size).reshape(ANCHORS.shape) % 3).astype(np.int32)
    expected = reference_sums(case, data_label(case), revealed) | {"expected": np.zeros(())}
    plain = reference_sums(case, data_label(case))
    assert 0 < expected["supervised"].sum() < plain["supervised"].sum()
    assert expected["blocks"] < expected["prefix"]
    batch = case.batch | {"revealed": put(revealed, SPECS.act_bt)}
    assert_close(loss_sums(case._replace(batch=batch)), expected)


def with_mask_embedding(case: Case, mask_token_id: int) -> Case:
    """The same draft with a mask embedding of its own: for the reference, a further row of the embedding."""
    config = dataclasses.replace(case.draft.config, mask_token_id=mask_token_id, own_mask_embedding=True)
    row = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(5))
    state = case.torch_draft.state_dict() | {"mask_embedding": row}
    draft = filled(lambda: DFlashDraft(config, rngs=nnx.Rngs(0), dtype=jnp.float32), state)
    table = torch.zeros(mask_token_id + 1, config.hidden_size)
    table[:VOCABULARY] = case.embedding
    table[mask_token_id] = row
    return case._replace(draft=draft, embedding=table)


def test_a_mask_embedding_of_the_drafts_own_is_what_masked_slots_hold(case: Case) -> None:
    """Also where a prefix is revealed, with an id past the target's embedding; in the loss and in evaluation."""
    own = with_mask_embedding(case, VOCABULARY + 3)
    revealed = (np.arange(ANCHORS.size).reshape(ANCHORS.shape) % 3).astype(np.int32)
    expected = reference_sums(own, data_label(own), revealed) | {"expected": np.zeros(())}
    without = reference_sums(case, data_label(case), revealed)
    assert abs(expected["loss_sum"] / without["loss_sum"] - 1) > 1e-3
    own = own._replace(batch=case.batch | {"revealed": put(revealed, SPECS.act_bt)})
    assert_close(loss_sums(own), expected)
    greedy = reference_sums(own, lambda row, x: int(case.logits[row, x - 1].argmax()))
    host = {name: np.asarray(x) for name, x in case.batch.items()}
    score = draft_evaluator(LOSS, case.target, [host])(own.draft).score
    assert score == greedy["prefix"] / greedy["blocks"]


def labels_shifted_by_one(*args: Any) -> Any:
    noise_ids, labels = original_inputs(*args)
    return noise_ids, jnp.roll(labels, -1, axis=-1)


def context_up_to_the_anchor(*args: Any) -> Any:
    start, stop = original_ranges(*args)
    return start, stop + 1


original_inputs, original_ranges = objectives.block_inputs, objectives.context_ranges


@pytest.mark.parametrize(
    ("name", "bug"), [("block_inputs", labels_shifted_by_one), ("context_ranges", context_up_to_the_anchor)]
)
def test_the_two_historical_bugs_are_seen(
    case: Case, name: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both trained to an accuracy above 70% and an acceptance length near 1."""
    monkeypatch.setattr(objectives, name, bug)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(loss_sums(case), reference_sums(case, data_label(case)))


@dataclass(frozen=True, eq=False)
class Nudged(BlockDiffusionLoss):
    """The loss with something added to the target's taps, also where they enter without a gradient."""

    nudge: Any = 0.0

    def run_target(self, draft: DFlashDraft, target: Decoder, batch: dict[str, jax.Array]) -> DecoderOutput:
        output = super().run_target(draft, target, batch)
        assert output.taps is not None
        return output._replace(taps=output.taps + self.nudge)


def test_a_block_learns_from_what_lies_strictly_before_its_anchor(case: Case) -> None:
    """The loss of one block moves with every hidden state of its document before the anchor, and with no other."""
    only = put(np.arange(ANCHORS.shape[1]) == np.array([[3]] * ROWS), SPECS.act_bN)
    batch = case.batch | {"anchor_valid": only}

    @jax.jit
    def loss(nudge: jax.Array) -> jax.Array:
        return Nudged(**vars(LOSS), nudge=nudge)(case.draft, case.target, batch)[0]

    base = float(loss(jnp.zeros((ROWS, LENGTH, 1))))
    for row, anchor in enumerate(ANCHORS[:, 3]):
        start = STARTS[row, anchor]
        for position in (start - 1, start, anchor - 1, anchor, anchor + 1):
            if position >= 0:
                nudge = np.zeros((ROWS, LENGTH, 1), np.float32)
                nudge[row, position] = 1.0
                moved = float(loss(jnp.asarray(nudge))) != base
                assert moved == (start <= position < anchor), (row, position)


def test_labels_of_the_target_are_its_greedy_choices(case: Case) -> None:
    hidden = LOSS.run_target(case.draft, case.target, case.batch).hidden
    labels = np.asarray(objectives.greedy_labels(case.target, hidden, case.batch["anchors"], BLOCK, 2))
    for row, j in np.argwhere(VALID):
        for k in range(1, BLOCK):
            x = ANCHORS[row, j] + k
            if x < LENGTH and DOCUMENTS[row, x - 1] > 0:
                assert labels[row, j, k] == case.logits[row, x - 1].argmax(), (row, j, k)


def test_evaluation_measures_acceptance_against_the_target_and_the_rest_against_the_data(case: Case) -> None:
    greedy = reference_sums(case, lambda row, x: int(case.logits[row, x - 1].argmax()))
    data = reference_sums(case, data_label(case))
    host = {name: np.asarray(x) for name, x in case.batch.items()}
    metrics, score, _ = draft_evaluator(LOSS, case.target, [host, host])(case.draft)
    assert score == metrics["acceptance_length_tf"] == greedy["prefix"] / greedy["blocks"]
    assert score != data["prefix"] / data["blocks"]
    sampled = greedy["expected"] / greedy["blocks"]
    assert metrics["acceptance_length_sampled_tf"] == pytest.approx(sampled, rel=1e-5)
    assert metrics["loss"] == pytest.approx(data["loss_sum"] / data["weight"], rel=1e-5)
    assert metrics["acc@1"] == data["correct"][1] / data["supervised"][1]


def test_the_teacher_of_a_slot_is_the_target_at_the_token_before_it(case: Case) -> None:
    """Training towards the target's choice is cross-entropy with it, label by label."""
    greedy = reference_sums(case, lambda row, x: int(case.logits[row, x - 1].argmax()))
    loss = dataclasses.replace(LOSS, objective={"ce_argmax": 1.0})
    ours, sums = jax.jit(lambda *args: loss(*args))(case.draft, case.target, case.batch)
    np.testing.assert_allclose(float(ours), greedy["loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(float(sums.statistics["expected"]), greedy["expected"], rtol=1e-5)


def test_the_decoder_loss_is_that_of_the_plain_loop(case: Case) -> None:
    loss, weight, correct = 0.0, 0, 0
    for row in range(ROWS):
        for x in range(LENGTH):
            if case.loss_mask[row, x] and x > STARTS[row, x]:
                scores, wanted = case.logits[row, x - 1], case.tokens[row, x]
                loss += np.log(np.exp(scores).sum()) - scores[wanted]
                weight += 1
                correct += scores.argmax() == wanted
    ours, sums = jax.jit(LM_LOSS)(case.target, None, case.batch)
    expected = {"loss_sum": np.array(loss), "weight": np.array(weight), "correct": np.array(correct)}
    assert_close({"loss_sum": ours, "weight": sums.weight, "correct": sums.statistics["correct"]}, expected)
    host = {name: np.asarray(x) for name, x in case.batch.items()}
    metrics, score, _ = causal_lm_evaluator(LM_LOSS, [host])(case.target)
    assert -score == metrics["loss"] == pytest.approx(loss / weight, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss / weight), rel=1e-4)
