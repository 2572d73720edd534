"""The tree of drafts against a best-first search, and the path that a target takes through it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from specjax.decoding.tree import DraftTree, draft_tree
from specjax.models.sharding import SPECS, make_mesh, mesh_scope, put
from tests.decoding.trees import Path, best_first, follow

VOCAB = 24
# slots, nodes
SHAPES = [(1, 1), (1, 24), (3, 3), (3, 4), (7, 7), (7, 9), (7, 24), (4, 19), (2, 20)]

build = jax.jit(draft_tree, static_argnames="nodes")


def random_logits(seed: int, rows: int, slots: int) -> np.ndarray:
    """Rows from nearly flat to nearly certain, so that trees are wide, deep and between."""
    rng = np.random.default_rng([seed, rows, slots])
    sharpness = np.geomspace(0.1, 8, rows)[:, None, None]
    return (sharpness * rng.standard_normal((rows, slots, VOCAB))).astype(np.float32)


def tree_of(logits: np.ndarray, nodes: int) -> DraftTree:
    known = np.arange(100, 100 + len(logits), dtype=np.int32)
    return build(put(known, SPECS.act_b), put(logits, SPECS.act_btv), nodes)


def paths(tree: DraftTree, row: int) -> list[Path]:
    """The paths to all nodes but the root, in the tree's order; checks that it is a tree."""
    tokens, parents, depths = (np.asarray(x)[row].tolist() for x in (tree.tokens, tree.parent, tree.depth))
    assert (tokens[0], parents[0], depths[0]) == (100 + row, 0, 0)
    found: list[Path] = [()]
    for node, (token, parent, depth) in enumerate(zip(tokens[1:], parents[1:], depths[1:], strict=True), 1):
        assert parent < node
        found.append((*found[parent], token))
        assert len(found[node]) == depth
    assert len(set(found)) == len(found)
    return found[1:]


@pytest.mark.parametrize(("slots", "nodes"), SHAPES)
def test_the_tree_is_that_of_a_best_first_search(slots: int, nodes: int) -> None:
    shapes = set()
    with mesh_scope():
        for seed in range(4):
            logits = random_logits(seed, 8, slots)
            tree = tree_of(logits, nodes)
            for row in range(8):
                found = paths(tree, row)
                assert found == best_first(logits[row], nodes)
                chain = logits[row].argmax(-1).tolist()
                assert found[:slots] == [tuple(chain[: d + 1]) for d in range(slots)]
                shapes.add(tuple(map(len, found)))
    assert len(shapes) > 10 or nodes < slots + 5 or slots == 1  # trees of many forms


def test_equal_probabilities_are_taken_in_order() -> None:
    """Shallower first, then the better prefix, then the lower token."""
    with mesh_scope():
        found = paths(tree_of(np.zeros((1, 3, VOCAB), np.float32), 24), 0)
        assert found == [(0,), (0, 0), (0, 0, 0), *((i,) for i in range(1, 22))]
        even = np.where(np.arange(VOCAB) % 12, -9.0, 0.0).astype(np.float32)  # tokens 0 and 12
        found = paths(tree_of(np.tile(even, (1, 3, 1)), 14), 0)
    halves = [(12,), (0, 12), (12, 0), (12, 12), (0, 0, 12), (0, 12, 0), (0, 12, 12), (12, 0, 0), (12, 0, 12)]
    assert found == [(0,), (0, 0), (0, 0, 0), *halves, (12, 12, 0), (12, 12, 12)]


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)])
def test_a_split_vocabulary_gives_the_same_tree(shape: tuple[int, int, int]) -> None:
    """Shards hold 3 tokens, fewer than a slot's likeliest ones that matter; logits of the second half are all ties."""
    logits = random_logits(6, 8, 5)
    logits[4:] = np.round(logits[4:])
    with mesh_scope():
        expected = [paths(tree_of(logits, 24), row) for row in range(8)]
    with jax.set_mesh(make_mesh(*shape)):
        tree = tree_of(logits, 24)
        assert [paths(tree, row) for row in range(8)] == expected


@pytest.mark.parametrize("nodes", [4, VOCAB + 1])
def test_a_tree_that_cannot_be_is_refused(nodes: int) -> None:
    with mesh_scope(), pytest.raises(ValueError, match=f"a tree of {nodes} nodes; 5 slots of 24 tokens take 5 to 24"):
        draft_tree(put(np.zeros(1, np.int32), SPECS.act_b), put(random_logits(0, 1, 5), SPECS.act_btv), nodes)


@jax.jit
def accept(tree: DraftTree, choices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    ancestors = tree.ancestors()
    return ancestors, *tree.accepted(choices, ancestors)


def test_the_accepted_path_is_the_longest_that_the_target_takes() -> None:
    """Choices follow a random path of each tree for a while, then leave it; those off the path are right by chance."""
    slots, nodes, rows = 5, 20, 8
    depths, ranks = set(), set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        logits = random_logits(seed, rows, slots)
        with mesh_scope():
            tree = tree_of(logits, nodes)
            nodes_paths = [[(), *paths(tree, row)] for row in range(rows)]
            # A choice of every node: that of one of its children, or another token.
            choices = rng.integers(0, VOCAB, (rows, nodes + 1))
            for row, found in enumerate(nodes_paths):
                for node, path in enumerate(found):
                    children = [other[-1] for other in found if other[:-1] == path and other]
                    if children and rng.random() < 0.8:
                        choices[row, node] = rng.choice(children)
            ancestors, path, matched = accept(tree, put(choices.astype(np.int32), SPECS.act_bt))
        for row, found in enumerate(nodes_paths):
            for node, other in np.ndindex(nodes + 1, nodes + 1):
                above = found[node][: len(found[other])] == found[other]
                assert ancestors[row, node, other] == above
            answer: list[int] = []
            taken = [0]
            while (*answer, int(choices[row, taken[-1]])) in found:
                answer.append(int(choices[row, taken[-1]]))
                taken.append(found.index(tuple(answer)))
            assert matched[row] == len(answer) == follow(found, [*answer, -1])
            assert path[row].tolist() == taken + [0] * (slots - len(answer))
            depths.add(len(answer))
            order = np.argsort(-logits[row], axis=-1, kind="stable")
            ranks.update(order[i].tolist().index(token) for i, token in enumerate(answer))
    assert depths == set(range(slots + 1))
    assert ranks >= set(range(6))
