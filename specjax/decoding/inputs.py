"""What a call of the decoder may be given: every check that needs no compiled program."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from specjax.decoding.auto_width import AutoWidth
from specjax.decoding.drafter import DFlashDrafter, Drafter, LoRADrafter, one_pass_drafter
from specjax.decoding.flat import Flat
from specjax.decoding.tree import MOST_TREE_NODES
from specjax.decoding.verify import DRAFT_CHOICES, RULES
from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashConfig, target_mismatches
from specjax.models.lora_draft import LoRADraftConfig, lora_target_mismatches
from specjax.models.sharding import mesh_scope

LEAST_TEMPERATURE = 1e-5  # logits divided by less may overflow

Ids = Sequence[int] | npt.NDArray[np.integer]


def integers(name: str, values: object) -> list[int]:
    """A list, tuple or array of integers as Python's."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        array = np.empty((), object)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"{name} is {reprlib.repr(values)}; give a list of integers")
    ids: list[int] = array.tolist()
    return ids


def per_prompt(
    count: int, max_new_tokens: int | np.integer | Ids, stop_token_ids: Ids | Sequence[Ids]
) -> tuple[list[int], list[list[int]]]:
    """Limits and stop tokens of every prompt."""
    shared = np.ndim(max_new_tokens) == 0
    new_tokens = integers("max_new_tokens", [max_new_tokens] * count if shared else max_new_tokens)
    if isinstance(stop_token_ids, str) or not isinstance(stop_token_ids, Sequence | np.ndarray):
        raise InputError(f"stop_token_ids is {stop_token_ids!r}; give a list of integers, or one such list a prompt")
    nested = len(stop_token_ids) > 0 and np.ndim(stop_token_ids[0]) > 0
    stops_of_each = stop_token_ids if nested else [stop_token_ids] * count
    stops = [integers("stop_token_ids", ids) for ids in stops_of_each]
    for name, values in (("max_new_tokens", new_tokens), ("stop_token_ids", stops)):
        if len(values) != count:
            raise InputError(f"{name} has {len(values)} entries for {count} prompts; give one for all or one a prompt")
    return new_tokens, stops


def check_sampling(
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    rule: str = "match",
    draft_choice: str = "argmax",
    samples: int = 1,
) -> None:
    """Raises InputError for a setting of `generate` that is out of range or would be ignored."""
    for name, value, kind in (
        ("temperature", temperature, Real),
        ("top_k", top_k, Integral),
        ("top_p", top_p, Real),
        ("samples", samples, Integral),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            wanted = "an integer" if kind is Integral else "a number"
            raise InputError(f"{name} is {value!r}; give {wanted}")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}; give 0 (greedy) or at least {LEAST_TEMPERATURE}")
    for name, choice, known in (("rule", rule, RULES), ("draft_choice", draft_choice, DRAFT_CHOICES)):
        if choice not in known:
            raise InputError(f"{name} is {choice!r}; give one of {', '.join(known)}")
    if samples < 1:
        raise InputError(f"samples is {samples}; give at least 1")
    if temperature == 0:
        ignored: list[tuple[str, object, object]] = [("top_k", top_k, None), ("top_p", top_p, None)]
        ignored += [("rule", rule, "match"), ("draft_choice", draft_choice, "argmax"), ("samples", samples, 1)]
        for name, given, unset in ignored:
            if given != unset:
                raise InputError(
                    f"{name} is {given}, but temperature 0 is greedy; give a temperature, or leave {name} out"
                )
    if top_k is not None and not 1 <= top_k < 2**31:
        raise InputError(f"top_k is {top_k}; give at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a number above 0 and at most 1")


def check_seeds(prompts: int, samples: int, seed: int | Ids) -> list[int]:
    """One a row, `samples` rows a prompt: row i of a call with one seed has that seed + i."""
    count = prompts * samples
    (first,) = integers("seed", [seed]) if np.ndim(seed) == 0 else (None,)
    seeds = integers("seed", seed) if first is None else [first + i for i in range(count)]
    if len(seeds) != count:
        one = "one a prompt" if samples == 1 else "one a sample"
        raise InputError(
            f"seed has {len(seeds)} entries for {count} {'prompts' if samples == 1 else 'samples'}; "
            f"give one for all or {one}"
        )
    for value in seeds:
        if not 0 <= value < 2**32:
            raise InputError(f"seed is {value}; give an integer from 0 to 2**32 - 1")
    return seeds


def check_limits(
    target: Decoder, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], stops: Sequence[Sequence[int]]
) -> None:
    """Raises InputError for a prompt, a limit or a stop token that the target cannot take."""
    vocab_size, limit = target.config.vocab_size, target.config.max_position_embeddings
    for i, (prompt, new, stop) in enumerate(zip(prompts, new_tokens, stops, strict=True)):
        if not prompt:
            raise InputError(f"prompt {i} is empty; give at least one token")
        if new < 1:
            raise InputError(f"prompt {i}: max_new_tokens is {new}; give at least 1")
        for name, ids in (("token", prompt), ("stop token", stop)):
            bad = [t for t in ids if not 0 <= t < vocab_size]
            if bad:
                raise InputError(f"prompt {i}: {name} id {bad[0]} is outside the target's vocabulary of {vocab_size}")
        if len(prompt) + new > limit:
            raise InputError(
                f"prompt {i}: {len(prompt)} tokens and {new} new ones exceed the target's context of {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )


def check_logit_mask(prompts: int, vocab_size: int, mask: npt.ArrayLike | None) -> npt.NDArray[np.bool_] | None:
    """[prompts, vocab_size], from one mask for all or one a prompt."""
    if mask is None:
        return None
    array = np.asarray(mask)
    if array.dtype != bool or array.shape not in ((vocab_size,), (prompts, vocab_size)):
        raise InputError(
            f"logit_mask has dtype {array.dtype} and shape {array.shape}; give booleans, true where a token may come, "
            f"of shape ({vocab_size},) or ({prompts}, {vocab_size})"
        )
    rows = np.broadcast_to(array, (prompts, vocab_size))
    for i, row in enumerate(rows):
        if not row.any():
            raise InputError(f"prompt {i}: logit_mask allows no token; allow at least one")
    return rows


def check_models(target: Decoder, drafter: Drafter | None) -> None:
    """Raises InputError for a target that cannot verify and a draft that was not trained for it."""
    if drafter is not None and not hasattr(drafter, "draft_logits"):
        raise InputError(f"the draft is {drafter!r}; load it first, with load_draft")
    if not target.config.causal:
        raise InputError(
            "the target is bidirectional (causal=False) and cannot verify tokens; give an autoregressive one"
        )
    problems = []
    if isinstance(drafter, DFlashDrafter):
        problems = target_mismatches(drafter.model.config, target.config)
    elif isinstance(drafter, LoRADrafter):
        problems = lora_target_mismatches(drafter.model, target.config)
    if problems:
        wrong = "; ".join(problems)
        raise InputError(f"the draft does not fit the target: {wrong}; use the target it was trained for")


def check_meshes(target: Flat[Decoder], drafter: Flat[Drafter | None]) -> None:
    """Raises InputError for a model whose arrays live on another mesh than the one in force."""
    with mesh_scope():
        mesh = jax.sharding.get_mesh()
    for name, model in (("target", target), ("draft", drafter)):
        for array in model.leaves:
            sharding = getattr(array, "sharding", None)
            if isinstance(sharding, NamedSharding) and sharding.mesh != mesh:
                here, there = _shown(mesh.shape, mesh.devices.flat), _shown(sharding.mesh.shape, sharding.device_set)
                raise InputError(
                    f"the {name} is on the mesh {there}, but the mesh in force is {here}; load target and draft and "
                    "generate under the same jax.set_mesh, or all without one"
                )


def _shown(axes: Mapping[str, int], devices: Iterable[jax.Device]) -> str:
    """Such as data=1, fsdp=1, tensor=2 of devices [0, 1]."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in axes.items())
    return f"{sizes} of devices {reprlib.repr(sorted(device.id for device in devices))}"


def check_draft_tokens(
    drafter: Drafter | DFlashConfig | LoRADraftConfig | None, draft_tokens: int | AutoWidth | None
) -> int | AutoWidth:
    """Drafts to verify a round. drafter: what has a block size, or None."""
    if drafter is None:
        if draft_tokens is not None:
            given = "auto" if isinstance(draft_tokens, AutoWidth) else draft_tokens
            raise InputError(f"draft_tokens is {given}, but there is no draft; give one or leave it out")
        return 0
    if isinstance(draft_tokens, AutoWidth):
        return draft_tokens
    most = drafter.block_size - 1
    width = most if draft_tokens is None else draft_tokens
    if isinstance(width, bool) or not isinstance(width, Integral):
        raise InputError(f"draft_tokens is {width!r}; give an integer or an AutoWidth")
    if not 1 <= width <= most:
        raise InputError(f"draft_tokens is {width}; this draft proposes 1 to {most}")
    return width


def check_rule(draft_tokens: int | AutoWidth, rule: str, draft_choice: str) -> None:
    """Raises InputError for a rule without drafts, and where a width that is chosen by time would change what is drawn
    or differ by process."""
    if not draft_tokens:
        for name, given, unset in (("rule", rule, "match"), ("draft_choice", draft_choice, "argmax")):
            if given != unset:
                raise InputError(f"{name} is {given}, but there is no draft; give one or leave {name} out")
    if not isinstance(draft_tokens, AutoWidth):
        return
    if rule != "match":
        raise InputError(
            f"rule is {rule}, but draft_tokens is auto: where rounds begin decides what {rule} draws, and would depend "
            "on the machine's speed; give match, or a number of draft tokens"
        )
    if draft_tokens.trees and draft_choice != "argmax":
        raise InputError(f"draft_choice is {draft_choice}, but a tree needs argmax; leave it out, or trees")
    if jax.process_count() > 1:
        raise InputError("draft_tokens is auto, which every process would choose by itself; give a number")


def check_tree(
    vocab_size: int,
    draft_tokens: int | AutoWidth,
    tree_nodes: int | None,
    rule: str = "match",
    draft_choice: str = "argmax",
) -> None:
    """Raises InputError for a tree that cannot hold a round's drafts, has no size, or is not verified by `match`."""
    if tree_nodes is None:
        return
    if not draft_tokens:
        raise InputError(f"tree_nodes is {tree_nodes}, but there is no draft; give one or leave it out")
    if isinstance(draft_tokens, AutoWidth):
        raise InputError(f"tree_nodes is {tree_nodes}, but draft_tokens is auto; give one of the two, or auto for both")
    for name, given, needed in (("rule", rule, "match"), ("draft_choice", draft_choice, "argmax")):
        if given != needed:
            raise InputError(f"{name} is {given}, but a tree needs {needed}; leave {name} or tree_nodes out")
    most = min(MOST_TREE_NODES, vocab_size)
    if not isinstance(tree_nodes, Integral) or not draft_tokens <= tree_nodes <= most:
        raise InputError(
            f"tree_nodes is {tree_nodes!r}; give {draft_tokens} (the drafts of a round, which it holds) to {most}, "
            "or lower draft_tokens"
        )


def check_one_pass(
    drafter: Drafter | DFlashConfig | LoRADraftConfig | None,
    draft_tokens: int | AutoWidth,
    tree_nodes: int | None,
    one_pass: bool,
) -> None:
    """Raises InputError where a draft cannot draft in the target's own pass, and where something else chooses that."""
    if not one_pass:
        return
    if drafter is None:
        raise InputError("one_pass is set, but there is no draft; give one or leave one_pass out")
    if isinstance(draft_tokens, AutoWidth):
        raise InputError("one_pass is set, but draft_tokens is auto, which tries it by itself; leave one of them out")
    if tree_nodes is not None:
        raise InputError(f"one_pass drafts a chain, but tree_nodes is {tree_nodes}; leave one of them out")
    if isinstance(drafter, LoRADraftConfig):
        able = drafter.masked_anchor > 0
    else:
        able = not isinstance(drafter, DFlashConfig) and one_pass_drafter(drafter) is not None
    if not able:
        raise InputError(
            "one_pass is set, but the draft was not trained with masked anchors; train a LoRA draft with "
            "lora.masked_anchor above 0, or leave one_pass out"
        )
