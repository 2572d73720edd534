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

from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.sharding import BATCH
from specjax.training.checkpoints import Checkpoints
from specjax.training.metrics import Evaluation, Metrics, MetricsWriter, add, readable
from specjax.training.state import TrainState
from specjax.training.step import Batch

Model = TypeVar("Model", bound=nnx.Module)
HostBatch = dict[str, np.ndarray]
DEVICE_FIELDS = ("input_ids", "loss_mask", "document_ids", "anchors", "anchor_valid", "shown", "states")
SHOWN = ("loss", "perplexity", "acc@1", "acceptance_length_tf", "learning_rate", "grad_norm", "tokens_per_s", "mfu")
EVALUATION_SHOWN = ("loss", "perplexity", "acc@1", "acceptance_length_tf", "acceptance_length", "repeated_4grams")


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
    evaluate: measures a model, or None.
    """

    plan: Plan
    step: Callable[[TrainState[Model], Any, Batch], tuple[TrainState[Model], dict[str, jax.Array]]]
    frozen: Any
    checkpoints: Checkpoints
    writer: MetricsWriter
    evaluate: Callable[[Model], Evaluation] | None = None

    def run(self, state: TrainState[Model], first_step: int, batches: Iterator[HostBatch]) -> TrainState[Model]:
        """Trains from `first_step` to the plan's end or the first signal; the last state is saved in either case.

        Raises:
            InputError: loss or gradient of a step is not finite. Nothing is saved from that step on.
        """
        clock = _Clock(self.plan)
        pending: dict[str, jax.Array] | None = None
        done = first_step
        with Interrupt().installed() as interrupt:
            for host_batch in clock.waits(batches):
                batch = to_device(host_batch, self.plan.accumulation_steps)
                state, metrics = self.step(state, self.frozen, batch)
                jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
                if pending is not None:
                    self._settle(done, pending, clock)
                pending, done = metrics, done + 1
                self.writer.advance(done)
                evaluates = self._evaluates(done)
                stops = self._stop(interrupt, done)
                if evaluates or stops or done % self.plan.checkpoint_every == 0:
                    # What is measured and saved must be known to be finite, so this step's metrics come at once.
                    self._settle(done, pending, clock, force=stops)
                    pending = None
                    score = self._evaluate(state, done) if evaluates else None
                    self.checkpoints.save(state, done, score)
                    clock.restart()
                if stops:
                    break
            self.checkpoints.wait()
        if interrupt.signal_name is not None and done < self.plan.total_steps:
            self.writer.say(f"{interrupt.signal_name}: saved step {done}; continue with --resume")
        return state

    def _evaluates(self, done: int) -> bool:
        return self.evaluate is not None and (done % self.plan.evaluate_every == 0 or done == self.plan.total_steps)

    def _settle(self, step: int, metrics: dict[str, jax.Array], clock: _Clock, force: bool = False) -> None:
        """Waits for the metrics of `step`, checks them, and logs them where the plan (or `force`) says so."""
        fetched = fetch(metrics)
        clock.record(fetched)
        wrong = {name: float(fetched[name]) for name in ("loss_sum", "grad_norm") if not np.isfinite(fetched[name])}
        if wrong:
            saved = self.checkpoints.latest_step
            raise InputError(
                f"step {step}: {' and '.join(f'{name} is {value}' for name, value in wrong.items())}; the last "
                f"checkpoint is {'of step ' + str(saved) if saved else 'missing'}. Lower optimizer.learning_rate, or "
                "look for broken weights or data, and train into another output_dir"
            )
        if step % self.plan.log_every == 0 or force:
            self.writer.write("train", step, clock.summary(), SHOWN)

    def _stop(self, interrupt: Interrupt, done: int) -> bool:
        # One process sees its own signal at once; several agree at log steps, where they pay for a collective.
        asks = jax.process_count() == 1 or done % self.plan.log_every == 0
        return done >= self.plan.total_steps or (asks and interrupt.agreed())

    def _evaluate(self, state: TrainState[Model], done: int) -> float:
        assert self.evaluate is not None
        measured = self.evaluate(state.result)
        self.writer.write("eval", done, measured.metrics, EVALUATION_SHOWN)
        if measured.sample is not None:
            self.writer.write_text("eval/sample", done, measured.sample)
        return measured.score


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
        self.waited = 0.0

    def waits(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        """`batches`, and how long each took to come, while the devices worked on the step before it."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if self.since is not None:
                self.waited += time.perf_counter() - started
            yield batch

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
            metrics["data_wait"] = min(1.0, self.waited / self.seconds)
            if self.plan.peak_flops is not None:
                metrics["mfu"] = self.plan.flops_per_step / step_time / self.plan.peak_flops
        self.sums, self.steps, self.seconds, self.timed_steps, self.waited = {}, 0, 0.0, 0, 0.0
        return metrics


def data_share() -> tuple[int, int]:
    """(index, count): which of `count` shares of every batch this process reads.

    Processes that a tensor axis spans hold the same rows and so read the same share.

    Raises:
        InputError: processes hold overlapping but different rows.
    """
    mesh = jax.sharding.get_mesh()
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    placed: Mapping[Any, Any] = NamedSharding(mesh, P(BATCH)).devices_indices_map((groups,))
    for device, (rows,) in placed.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(groups)))
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, shares)) != groups:
        raise InputError(
            f"mesh {dict(mesh.shape)}: its tensor groups cut across processes; choose a tensor axis that "
            f"divides, or is a multiple of, the {jax.local_device_count()} devices of a process"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def to_device(batch: HostBatch, accumulation_steps: int) -> Batch:
    """This process's rows as global arrays [micro-batches, rows, ...], rows split over the batch axes."""
    mesh = jax.sharding.get_mesh()

    def place(x: np.ndarray) -> jax.Array:
        micro = x.reshape(accumulation_steps, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, BATCH)), micro)

    return {name: place(batch[name]) for name in DEVICE_FIELDS if name in batch}
