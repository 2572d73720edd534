"""Problems about comparisons, ages, riddles and counts."""

from collections.abc import Callable

from specjax.data.embedded.problem_families.drawing import Draw, Values, divide, minus, plus, times

THINGS = ("stamps", "cards", "marbles", "books", "shells", "stickers", "badges", "photos", "coins", "toys")


def _more_than(draw: Draw) -> Values:
    a, more = draw.number(5, 40), draw.number(3, 30)
    return draw.people() | {
        "a": a,
        "more": more,
        "things": draw.one_of(THINGS),
        "sum": plus(a, more),
        "sum2": plus(a + more, a),
        "answer": 2 * a + more,
    }


def _fewer_than(draw: Draw) -> Values:
    a = draw.number(12, 50)
    less = draw.number(3, a - 5)
    return draw.people() | {
        "a": a,
        "less": less,
        "things": draw.one_of(THINGS),
        "rest": minus(a, less),
        "sum": plus(a, a - less),
        "answer": 2 * a - less,
    }


def _times_as_many(draw: Draw) -> Values:
    a, k = draw.number(3, 9), draw.number(2, 9)
    return draw.people() | {
        "a": a,
        "k": k,
        "things": draw.one_of(THINGS),
        "work": times(a, k),
        "sum": plus(a * k, a),
        "answer": a * (k + 1),
    }


def _parent_age(draw: Draw) -> Values:
    child, k = draw.number(3, 9), draw.number(3, 6)
    later = draw.number(2, 12)
    return draw.people() | {
        "child": child,
        "k": k,
        "later": later,
        "work": times(child, k),
        "sum": plus(child * k, later),
        "answer": child * k + later,
        "parent": draw.one_of(("mother", "father", "uncle", "teacher")),
    }


def _riddle(draw: Draw) -> Values:
    x, k, m = draw.number(2, 9), draw.number(2, 9), draw.number(2, 30)
    return draw.people() | {
        "k": k,
        "m": m,
        "result": x * k + m,
        "rest": minus(x * k + m, m),
        "work": divide(x * k, k),
        "answer": x,
    }


def _pages(draw: Draw) -> Values:
    per_day, days, left = draw.number(3, 9), draw.number(3, 9), draw.number(5, 40)
    return draw.people() | {
        "total": per_day * days + left,
        "p": per_day,
        "d": days,
        "work": times(per_day, days),
        "rest": minus(per_day * days + left, per_day * days),
        "answer": left,
        "book": draw.one_of(("novel", "diary", "comic", "cookbook", "travel guide", "story book")),
    }


def _passengers(draw: Draw) -> Values:
    start, on = draw.number(15, 60), draw.number(3, 30)
    off = draw.number(3, start - 5)
    return {
        "start": start,
        "off": off,
        "on": on,
        "rest": minus(start, off),
        "sum": plus(start - off, on),
        "answer": start - off + on,
        "vehicle": draw.one_of(("bus", "train", "ferry", "tram", "cable car")),
    }


def _legs(draw: Draw) -> Values:
    two, four = draw.number(2, 9), draw.number(2, 9)
    return {
        "two": two,
        "four": four,
        "work": times(two, 2),
        "work2": times(four, 4),
        "sum": plus(2 * two, 4 * four),
        "answer": 2 * two + 4 * four,
        "birds": draw.one_of(("hens", "ducks", "geese", "swans", "turkeys")),
        "cattle": draw.one_of(("cows", "sheep", "goats", "horses", "pigs")),
    }


DRAWS: dict[str, Callable[[Draw], Values]] = {
    "more_than": _more_than,
    "fewer_than": _fewer_than,
    "times_as_many": _times_as_many,
    "parent_age": _parent_age,
    "riddle": _riddle,
    "pages": _pages,
    "passengers": _passengers,
    "legs": _legs,
}
