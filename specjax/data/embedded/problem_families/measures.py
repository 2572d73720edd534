"""Problems about length, area, weight, time, speed and temperature."""

from collections.abc import Callable

from specjax.data.embedded.problem_families.drawing import Draw, Values, divide, minus, plus, times

VEHICLES = ("train", "bus", "car", "truck", "boat", "tram")
PLACES = ("garden", "field", "yard", "park", "meadow", "playground")
EVENTS = ("film", "concert", "lesson", "match", "play", "meeting", "show", "race")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def _distance(draw: Draw) -> Values:
    t, u, v, w = draw.number(2, 6), draw.number(2, 5), 5 * draw.number(2, 9), 5 * draw.number(2, 9)
    return {
        "v": v,
        "t": t,
        "w": w,
        "u": u,
        "vehicle": draw.one_of(VEHICLES),
        "work": times(v, t),
        "work2": times(w, u),
        "sum": plus(v * t, w * u),
        "answer": v * t + w * u,
    }


def _speed(draw: Draw) -> Values:
    (t, u), v = draw.several(range(2, 8), 2), draw.number(8, 30)
    return {
        "d": v * t,
        "t": t,
        "u": u,
        "vehicle": draw.one_of(VEHICLES),
        "work": divide(v * t, t),
        "work2": times(v, u),
        "answer": v * u,
    }


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
    a, b = draw.number(3, 40), draw.number(3, 40)
    return draw.people() | {
        "a": a,
        "b": b,
        "place": draw.one_of(PLACES),
        "sum": plus(a, b),
        "work": times(a + b, 2),
        "answer": 2 * (a + b),
    }


def _area(draw: Draw) -> Values:
    a, b = draw.number(4, 19), draw.number(3, 9)
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


def _square(draw: Draw) -> Values:
    side = draw.number(2, 12)
    return draw.people() | {
        "p": 4 * side,
        "work": divide(4 * side, 4),
        "work2": times(side, side),
        "answer": side * side,
        "thing": draw.one_of(("mirror", "carpet", "table top", "window", "picture", "board")),
    }


def _trees(draw: Draw) -> Values:
    gap, n = draw.number(2, 9), draw.number(3, 14)
    return {
        "length": gap * n,
        "gap": gap,
        "work": divide(gap * n, gap),
        "sum": plus(n, 1),
        "answer": n + 1,
        "post": draw.one_of(("trees", "posts", "lamps", "flags", "benches")),
        "path": draw.one_of(("path", "road", "fence", "river bank", "wall")),
    }


def _end_time(draw: Draw) -> Values:
    hour, minute, lasts = draw.number(8, 19), 5 * draw.number(1, 11), 5 * draw.number(5, 23)
    to_full = 60 - minute
    if lasts <= to_full:
        lasts += 60
    end = hour * 60 + minute + lasts
    return {
        "start": _clock(hour * 60 + minute),
        "lasts": lasts,
        "to_full": to_full,
        "full": _clock((hour + 1) * 60),
        "rest": minus(lasts, to_full),
        "event": draw.one_of(EVENTS),
        "answer": _clock(end),
    }


def _duration(draw: Draw) -> Values:
    hour, minute, hours, after = draw.number(7, 18), 5 * draw.number(1, 11), draw.number(2, 4), 5 * draw.number(1, 11)
    to_full = 60 - minute
    whole = 60 * (hours - 1)
    return draw.people() | {
        "start": _clock(hour * 60 + minute),
        "end": _clock((hour + hours) * 60 + after),
        "full": _clock((hour + 1) * 60),
        "last": _clock((hour + hours) * 60),
        "to_full": to_full,
        "after": after,
        "whole": whole,
        "sum": plus(to_full, whole),
        "sum2": plus(to_full + whole, after),
        "event": draw.one_of(EVENTS),
        "answer": to_full + whole + after,
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


def _flour(draw: Draw) -> Values:
    packet = draw.one_of((100, 200, 250, 500))
    kilograms = draw.number(2, 9)
    return draw.people() | {
        "k": kilograms,
        "g": packet,
        "split": divide(1000, packet),
        "work": times(1000 // packet, kilograms),
        "answer": 1000 // packet * kilograms,
        "flour": draw.one_of(("flour", "sugar", "rice", "salt", "coffee", "seeds")),
    }


def _minutes(draw: Draw) -> Values:
    hours, extra, used = draw.number(2, 4), draw.number(5, 55), draw.number(10, 50)
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


def _weekday(draw: Draw) -> Values:
    today, days = draw.number(0, 6), draw.number(14, 60)
    weeks, rest = divmod(days, 7)
    return draw.people() | {
        "today": DAYS[today],
        "days": days,
        "weeks": weeks,
        "work": times(weeks, 7),
        "rest": minus(days, 7 * weeks),
        "answer": DAYS[(today + rest) % 7],
        "event": draw.one_of(("birthday", "exam", "holiday", "wedding", "party", "trip")),
    }


DRAWS: dict[str, Callable[[Draw], Values]] = {
    "distance": _distance,
    "speed": _speed,
    "travel_time": _travel_time,
    "perimeter": _perimeter,
    "area": _area,
    "square": _square,
    "trees": _trees,
    "end_time": _end_time,
    "duration": _duration,
    "ribbon": _ribbon,
    "flour": _flour,
    "minutes": _minutes,
    "temperature": _temperature,
    "weekday": _weekday,
}
