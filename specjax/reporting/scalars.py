"""The TensorBoard scalars of a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """A scalar's value at a step. wall_time: seconds since 1970 at which it was written."""

    step: int
    value: float
    wall_time: float


def read_scalars(folder: Path) -> dict[str, list[Point]]:
    """Every point of every tag in the event files of `folder`, steps ascending; empty where there are none.

    A run that was killed and resumed has written the steps after its checkpoint twice: the later ones count.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()  # 0: all of them, not a sample
    written = [
        (tag, Point(event.step, event.value, event.wall_time))
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]
    written.sort(key=lambda entry: entry[1].wall_time)
    kept: list[tuple[str, Point]] = []
    for tag, point in written:
        while kept and kept[-1][1].step > point.step:
            kept.pop()
        kept.append((tag, point))
    curves: dict[str, dict[int, Point]] = {}
    for tag, point in kept:
        curves.setdefault(tag, {})[point.step] = point
    return {tag: list(points.values()) for tag, points in curves.items()}
