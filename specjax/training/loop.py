"""The training loop: feeds batches, fetches metrics a step late, evaluates, checkpoints, stops cleanly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from specjax.fetch import fetch
from specjax.models.sharding import BATCH
from specjax.training.checkpoints import Checkpoints
from specjax.training.metrics import Metrics, MetricsWriter, add, readable
from specjax.training.state import TrainState
from specjax.training.step import Batch

Model = TypeVar("Model", bound=nnx.Module)
HostBatch = dict[str, np.ndarray]
DEVICE_FIELDS = ("input_ids", "loss_mask", "document_ids", "anchors", "anchor_valid")
SHOWN = ("loss", "perplexity", "acc@1", "acceptance_length_tf", "learning_rate", "grad_norm", "tokens_per_s", "mfu")
EVALUATION_SHOWN = ("loss", "perplexity", "acc@1", "acceptance_length_tf", "acceptance_length")


@dataclass(frozen=True)
class Plan:
    """When the loop does what; all in steps."""

    total_steps: int
    accumulation_steps: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    tokens_per_step: int
    flops_per_step: float
    peak_flops: float | None


@dataclass
class Interrupt:
    """Set by SIGINT or SIGTERM; a second signal acts as usual."""

    signal_name: str | None = None
    _previous: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def installed(self) -> Iterator[Interrupt]:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was interrupted; with several processes a collective, so all must call it together."""
        if jax.process_count() == 1:
            return self.signal_name is not None
        flags = multihost_utils.process_allgather(np.array(self.signal_name is not None))
        return bool(flags.any())


@dataclass
class Loop(Generic[Model]):
    """Runs a jitted step over batches.

    step: `(state, frozen, batch) -> (state, metrics)` of `training.step.make_train_step`.
    evaluate: `model -> (metrics, score)`, score being higher for a better model, or None.
    """

    plan: Plan
    step: Callable[[TrainState[Model], Any, Batch], tuple[TrainState[Model], dict[str, jax.Array]]]
    frozen: Any
    checkpoints: Checkpoints
    writer: MetricsWriter
    evaluate: Callable[[Model], tuple[Metrics, float]] | None = None

    def run(self, state: TrainState[Model], first_step: int, batches: Iterator[HostBatch]) -> TrainState[Model]:
        """Trains from `first_step` to the plan's end or the first signal; the last state is saved in either case."""
        clock = _Clock(self.plan)
        pending: dict[str, jax.Array] | None = None
        done, saved_score = first_step, None
        with Interrupt().installed() as interrupt:
            for host_batch in batches:
                batch = to_device(host_batch, self.plan.accumulation_steps)
                state, metrics = self.step(state, self.frozen, batch)
                jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
                if pending is not None:
                    clock.record(fetch(pending))
                    self._log(done, clock)
                pending, done, saved_score = metrics, done + 1, None
                self.writer.advance(done)
                if self.evaluate is not None and (
                    done % self.plan.evaluate_every == 0 or done == self.plan.total_steps
                ):
                    saved_score = self._evaluate(state, done)
                    clock.restart()
                if done % self.plan.checkpoint_every == 0 or saved_score is not None:
                    self.checkpoints.save(state, done, saved_score)
                if self._stop(interrupt, done):
                    break
        if pending is not None:
            clock.record(fetch(pending))
            self._log(done, clock, force=True)
        if done > first_step:
            self.checkpoints.save(state, done, saved_score)
        self.checkpoints.wait()
        if interrupt.signal_name is not None and done < self.plan.total_steps:
            self.writer.say(f"{interrupt.signal_name}: saved step {done}; continue with --resume")
        return state

    def _stop(self, interrupt: Interrupt, done: int) -> bool:
        # One process sees its own signal at once; several agree at log steps, where they pay for a collective.
        asks = jax.process_count() == 1 or done % self.plan.log_every == 0
        return done >= self.plan.total_steps or (asks and interrupt.agreed())

    def _evaluate(self, state: TrainState[Model], done: int) -> float:
        assert self.evaluate is not None
        metrics, score = self.evaluate(state.model)
        self.writer.write("eval", done, metrics, EVALUATION_SHOWN)
        return score

    def _log(self, done: int, clock: _Clock, force: bool = False) -> None:
        if done % self.plan.log_every == 0 or force:
            self.writer.write("train", done, clock.summary(), SHOWN)


class _Clock:
    """Sums of the steps since the last log line, and their rate."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.sums: dict[str, np.ndarray] = {}
        self.last: Mapping[str, np.ndarray] = {}
        self.steps = 0
        self.seconds = 0.0
        self.timed_steps = 0
        self.since: float | None = None  # the first step compiles and is not timed

    def record(self, metrics: Mapping[str, np.ndarray]) -> None:
        """A step's metrics have arrived, so the step is over."""
        now = time.perf_counter()
        if self.since is not None:
            self.seconds += now - self.since
            self.timed_steps += 1
        self.since = now
        self.sums = add(self.sums, metrics)
        self.last = metrics
        self.steps += 1

    def restart(self) -> None:
        """Something else than a step takes time now; the next interval is not a step's."""
        self.since = None

    def summary(self) -> Metrics:
        metrics = readable(self.sums)
        metrics |= {name: float(self.last[name]) for name in ("learning_rate", "grad_norm")}
        if self.timed_steps:
            step_time = self.seconds / self.timed_steps
            metrics |= {"step_time_s": step_time, "tokens_per_s": self.plan.tokens_per_step / step_time}
            if self.plan.peak_flops is not None:
                metrics["mfu"] = self.plan.flops_per_step / step_time / self.plan.peak_flops
        self.sums, self.steps, self.seconds, self.timed_steps = {}, 0, 0.0, 0
        return metrics


def to_device(batch: HostBatch, accumulation_steps: int) -> Batch:
    """This process's rows as global arrays [micro-batches, rows, ...], rows split over the batch axes."""
    mesh = jax.sharding.get_mesh()

    def place(x: np.ndarray) -> jax.Array:
        micro = x.reshape(accumulation_steps, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, BATCH)), micro)

    return {name: place(batch[name]) for name in DEVICE_FIELDS if name in batch}
