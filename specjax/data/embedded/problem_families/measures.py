"""Problems about length, area, time and temperature."""

from collections.abc import Callable

from specjax.data.embedded.problem_families.drawing import Draw, Values, divide, minus, plus, times

VEHICLES = ("train", "bus", "car", "truck", "boat", "tram")
PLACES = ("garden", "field", "yard", "park", "meadow", "playground")


def _travel_time(draw: Draw) -> Values:
    v, t, pause = 10 * draw.number(2, 9), draw.number(2, 9), draw.number(2, 5)
    return draw.people() | {
        "d": v * t,
        "v": v,
        "pause": pause,
        "work": divide(v * t, v),
        "sum": plus(t, pause),
        "answer": t + pause,
        "vehicle": draw.one_of(VEHICLES),
    }


def _perimeter(draw: Draw) -> Values:
    a, b = draw.number(3, 20), draw.number(3, 20)
    return draw.people() | {
        "a": a,
        "b": b,
        "place": draw.one_of(PLACES),
        "sum": plus(a, b),
        "work": times(a + b, 2),
        "answer": 2 * (a + b),
    }


def _area(draw: Draw) -> Values:
    a, b = draw.number(4, 9), draw.number(3, 9)
    pond = draw.number(2, min(40, a * b - 2))
    return {
        "a": a,
        "b": b,
        "pond": pond,
        "place": draw.one_of(PLACES),
        "work": times(a, b),
        "rest": minus(a * b, pond),
        "answer": a * b - pond,
        "thing": draw.one_of(("pond", "shed", "flower bed", "sandpit", "terrace")),
    }


def _trees(draw: Draw) -> Values:
    gap, n = draw.number(2, 9), draw.number(3, 9)
    return {
        "length": gap * n,
        "gap": gap,
        "work": divide(gap * n, gap),
        "sum": plus(n, 1),
        "answer": n + 1,
        "post": draw.one_of(("trees", "posts", "lamps", "flags", "benches")),
        "path": draw.one_of(("path", "road", "fence", "river bank", "wall")),
    }


def _ribbon(draw: Draw) -> Values:
    piece = draw.one_of((5, 10, 20, 25, 50))
    metres = draw.number(2, 9)
    return draw.people() | {
        "m": metres,
        "c": piece,
        "work": times(metres, 100),
        "work2": divide(100 * metres, piece),
        "answer": 100 * metres // piece,
        "rope": draw.one_of(("ribbon", "rope", "wire", "string", "cloth")),
    }


def _minutes(draw: Draw) -> Values:
    hours, extra, used = draw.number(2, 3), draw.number(5, 55), draw.number(10, 50)
    total = 60 * hours + extra
    return draw.people() | {
        "h": hours,
        "extra": extra,
        "used": used,
        "work": times(hours, 60),
        "sum": plus(60 * hours, extra),
        "rest": minus(total, used),
        "answer": total - used,
        "task": draw.one_of(("homework", "a puzzle", "a painting", "the cleaning", "a model ship")),
    }


def _temperature(draw: Draw) -> Values:
    start, up = draw.number(2, 20), draw.number(3, 15)
    down = draw.number(2, start + up - 2)
    return {
        "start": start,
        "up": up,
        "down": down,
        "sum": plus(start, up),
        "rest": minus(start + up, down),
        "answer": start + up - down,
    }


DRAWS: dict[str, Callable[[Draw], Values]] = {
    "travel_time": _travel_time,
    "perimeter": _perimeter,
    "area": _area,
    "trees": _trees,
    "ribbon": _ribbon,
    "minutes": _minutes,
    "temperature": _temperature,
}
