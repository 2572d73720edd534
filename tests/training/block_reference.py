"""The block loss by plain loops in float64, for the drafts of one set of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.sharding import SPECS, put
from specjax.training.objectives import BlockDiffusionLoss
from specjax.weights import load_target
from tests.blockdiff.reference import softmax
from tests.models.torch_weights import filled
from tests.torch_draft import TorchDraft, randomised
from tests.training.tiny import MASK_TOKEN

ROWS, LENGTH, BLOCK, GAMMA = 2, 70, 4, 2.0
# Row 0 packs two documents before its padding, row 1 is one document; the last anchor of each row is unused.
DOCUMENTS = np.array([[1] * 9 + [2] * 40 + [0] * 21, [1] * 70], np.int32)
STARTS = np.array([[0] * 9 + [9] * 40 + [49] * 21, [0] * 70], np.int32)
ANCHORS = np.array([[3, 6, 11, 20, 26, 33, 0], [1, 7, 18, 40, 55, 67, 0]], np.int32)
VALID = np.array([[True] * 6 + [False]] * 2)
LOSS = BlockDiffusionLoss(
    {"ce": 1.0}, "exp", GAMMA, None, cumulative_mask=True, chunk_blocks=2, query_chunk=16, remat=True
)

Sums = dict[str, np.ndarray]


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


def make_case(few_words: Path) -> Case:
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


def noise_ids(case: Any, shown: np.ndarray | None = None) -> np.ndarray:
    """What the blocks hold, [b, N, B], slot by slot. shown [b, N, B]: slots that hold their token (None: anchors)."""
    ids = np.full((ROWS, ANCHORS.shape[1], BLOCK), case.draft.config.mask_token_id)
    for row, j in np.ndindex(ANCHORS.shape):
        for k in range(BLOCK):
            x = ANCHORS[row, j] + k
            learnt = (
                x < LENGTH and VALID[row, j] and DOCUMENTS[row, x] == DOCUMENTS[row, x - k] and case.loss_mask[row, x]
            )
            if k and not learnt:
                break
            if k == 0 if shown is None else shown[row, j, k]:
                ids[row, j, k] = case.tokens[row, x]
    return ids


def sums_of(case: Any, logits: np.ndarray, label: Callable[[int, int], int], shown: np.ndarray | None = None) -> Sums:
    """The block loss's sums from a draft's logits [b, N, B, v], slot by slot.

    label(row, position): what a block is to predict there. shown: slots that are shown, and not predicted.
    expected: of the leading slots accepted when drafts are sampled, at the overlap of draft and target.
    """
    shown = np.zeros((*ANCHORS.shape, BLOCK), bool) if shown is None else shown
    sums: Sums = {name: np.zeros(BLOCK) for name in ("correct", "supervised")}
    sums |= {name: np.zeros(()) for name in ("loss_sum", "weight", "prefix", "expected", "blocks")}
    covered: set[tuple[int, int]] = set()
    for row, j in np.argwhere(VALID):
        anchor, matching, prefix, reached, expected, asked = ANCHORS[row, j], True, 1, 1.0, 1.0, 0
        for k in range(1, BLOCK):
            x = anchor + k
            if x >= LENGTH or DOCUMENTS[row, x] != DOCUMENTS[row, anchor] or not case.loss_mask[row, x]:
                break
            if shown[row, j, k]:
                if asked:
                    matching, reached = False, 0.0
                continue
            asked += 1
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
        sums["blocks"] += asked > 0
        sums["prefix"] += prefix if asked else 0
        sums["expected"] += expected if asked else 0
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


def scattered() -> np.ndarray:
    """Shown slots anywhere but the last, and some anchors not."""
    shown = np.random.default_rng(2).random((*ANCHORS.shape, BLOCK)) < 0.3
    shown[..., -1] = False
    return shown
