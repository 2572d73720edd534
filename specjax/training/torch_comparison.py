"""A draft's compiled train step against the same step in PyTorch, on the same weights, rows and cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from specjax.config import RunConfig
from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.pytorch import thread_counts, with_threads
from specjax.training.state import TrainState
from specjax.training.step import Batch
from specjax.training.stopwatch import seconds_of, spread

Report = dict[str, Any]


def check_comparable(config: RunConfig) -> None:
    """Raises InputError, naming every setting that PyTorch's step does not have."""
    backend = jax.default_backend()
    wrong = [
        f"{name} is {value}; give {wanted}"
        for name, value, wanted in (
            ("loss.objective", " + ".join(config.loss.objective), "ce"),
            ("optimizer.name", config.optimizer.name, "adamw"),
            ("optimizer.ema_decay", config.optimizer.ema_decay, "null"),
            ("training.accumulation_steps", config.training.accumulation_steps, 1),
            ("draft.sliding_window", config.draft.sliding_window, "null"),
            ("draft.init", config.draft.init, "null"),
            ("draft.mask_embedding", config.draft.mask_embedding, "target"),
            ("JAX's backend", backend, "cpu, by JAX_PLATFORMS=cpu"),
        )
        if value is not None and str(value) != str(wanted).partition(",")[0]
    ]
    if wrong:
        raise InputError(f"--compare torch: PyTorch's step has only plain settings: {'; '.join(wrong)}")


def torch_step(
    config: RunConfig, draft: DFlashDraft, target: Decoder, variant: Any, batch: dict[str, np.ndarray]
) -> Callable[[], tuple[float, float]]:
    """PyTorch's train step with the weights of `draft` on the rows of `batch`: a call updates, giving loss and norm.

    batch: `input_ids` [b, t], `anchors`, `anchor_valid` [b, N] and the target's `states` [b, t, m + d].
    """
    import torch

    from specjax.training.torch_baseline import Rows, TrainStep
    from specjax.weights.torch_draft import draft_weights

    step = TrainStep(
        config,
        draft.config,
        variant,
        draft_weights(draft),
        embedding=_float32(target.embed_tokens.weight[...]),
        head=_float32(target.head_kernel().T),
        dtype=np.dtype(draft.dtype).name,
    )
    taps = batch["states"][..., : len(draft.config.target_layer_ids) * draft.config.hidden_size]
    rows = Rows(
        states=torch.tensor(taps.astype(np.float32)).to(step.dtype),
        tokens=torch.tensor(batch["input_ids"], dtype=torch.int64),
        anchors=torch.tensor(batch["anchors"], dtype=torch.int64),
        valid=torch.tensor(batch["anchor_valid"]),
    )
    return lambda: step(rows)


def _float32(value: jax.Array) -> np.ndarray:
    return np.asarray(fetch(value), np.float32)


def compare_with_torch(
    config: RunConfig,
    ours: Callable[[], dict[str, jax.Array]],
    state: TrainState[DFlashDraft],
    target: Decoder,
    batch: Batch,
    steps: int,
    warmup: int,
) -> Report:
    """Times `ours`, a step that starts from `state`, and both variants of PyTorch's, each at its better thread count.

    A round runs every side in turn: one step that is not timed, so that no side pays for the threads and caches of
    the one before it, and one that is. `cpu_s` is the process's CPU time over that step: it suffers less than wall
    time from other processes. Losses and gradient norms are those of the very first step.
    """
    from specjax.training.torch_baseline import VARIANTS

    host = {name: np.asarray(fetch(x))[0] for name, x in batch.items()}
    report: Report = {}
    sides: dict[str, Callable[[], object]] = {}
    for variant, meaning in VARIANTS.items():
        step = torch_step(config, state.model, target, variant, host)
        loss, norm = step()
        by_threads = {}
        for threads in thread_counts():
            limited = with_threads(threads, step)
            for _ in range(warmup):
                limited()
            by_threads[threads] = spread([seconds_of(limited) for _ in range(max(1, steps // 4))])["median"]
        threads = min(by_threads, key=lambda n: by_threads[n])
        sides[variant] = with_threads(threads, step)
        report[variant] = {
            "attention": meaning,
            "loss": loss,
            "grad_norm": norm,
            "threads": threads,
            "by_threads_s": by_threads,
        }
    first = fetch(ours())
    report["specjax"] = {
        "loss": float(first["loss_sum"] / first["weight"]),
        "grad_norm": float(first["grad_norm"]),
    }
    sides["specjax"] = ours
    for _ in range(warmup):
        ours()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, side in sides.items():
            side()
            before = time.process_time()
            wall[name].append(seconds_of(side))
            cpu[name].append(time.process_time() - before)
    for name in sides:
        report[name] |= {"step_s": spread(wall[name]), "cpu_s": spread(cpu[name])}
    for variant in VARIANTS:
        report[variant]["ratio"] = report[variant]["step_s"]["median"] / report["specjax"]["step_s"]["median"]
    return report
