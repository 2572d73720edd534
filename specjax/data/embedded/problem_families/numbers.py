"""Problems about numbers themselves: comparisons, ages, averages, sequences, percentages, riddles."""

from collections.abc import Callable

from specjax.data.embedded.problem_families.drawing import Draw, Values, divide, minus, plus, times

THINGS = ("stamps", "cards", "marbles", "books", "shells", "stickers", "badges", "photos", "coins", "toys")
GAMES = ("archery", "darts", "basketball", "bowling", "a quiz", "a card game")


def _more_than(draw: Draw) -> Values:
    a, more = draw.number(5, 70), draw.number(3, 30)
    return draw.people() | {
        "a": a,
        "more": more,
        "things": draw.one_of(THINGS),
        "sum": plus(a, more),
        "sum2": plus(a + more, a),
        "answer": 2 * a + more,
    }


def _fewer_than(draw: Draw) -> Values:
    a = draw.number(12, 80)
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
    a, k = draw.number(4, 25), draw.number(2, 6)
    return draw.people() | {
        "a": a,
        "k": k,
        "things": draw.one_of(THINGS),
        "work": times(a, k),
        "sum": plus(a * k, a),
        "answer": a * (k + 1),
    }


def _age(draw: Draw) -> Values:
    a, k = draw.number(8, 40), draw.number(2, 20)
    d = draw.number(2, a - 3)
    return draw.people() | {
        "a": a,
        "d": d,
        "k": k,
        "rest": minus(a, d),
        "sum": plus(a - d, k),
        "answer": a - d + k,
        "relative": draw.one_of(("brother", "sister", "cousin", "neighbour")),
    }


def _age_sum(draw: Draw) -> Values:
    young, d = draw.number(3, 30), draw.number(2, 20)
    return draw.people() | {
        "sum": 2 * young + d,
        "d": d,
        "rest": minus(2 * young + d, d),
        "work": divide(2 * young, 2),
        "back": plus(young, d),
        "answer": young + d,
    }


def _parent_age(draw: Draw) -> Values:
    child, k = draw.number(3, 15), draw.number(3, 6)
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


def _average(draw: Draw) -> Values:
    mean = draw.number(12, 45)
    a, b = mean + draw.number(-5, 5), mean + draw.number(-5, 5)
    c = 3 * mean - a - b
    return draw.people() | {
        "a": a,
        "b": b,
        "c": c,
        "sum": plus(a, b),
        "sum2": plus(a + b, c),
        "work": divide(3 * mean, 3),
        "answer": mean,
        "game": draw.one_of(GAMES),
    }


def _missing_score(draw: Draw) -> Values:
    mean = draw.number(12, 45)
    a, b = mean + draw.number(-5, 5), mean + draw.number(-5, 5)
    return draw.people() | {
        "mean": mean,
        "a": a,
        "b": b,
        "work": times(mean, 3),
        "sum": plus(a, b),
        "rest": minus(3 * mean, a + b),
        "answer": 3 * mean - a - b,
        "game": draw.one_of(GAMES),
    }


def _sequence(draw: Draw) -> Values:
    start, step = draw.number(1, 40), draw.number(2, 15)
    a, b, c, d = (start + i * step for i in range(4))
    return {
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "step": step,
        "diff": minus(b, a),
        "check": minus(d, c),
        "next": plus(d, step),
        "answer": d + step,
    }


def _falling(draw: Draw) -> Values:
    step, last = draw.number(2, 12), draw.number(0, 40)
    a, b, c, d = (last + i * step for i in (4, 3, 2, 1))
    return {
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "step": step,
        "diff": minus(a, b),
        "check": minus(c, d),
        "next": minus(d, step),
        "answer": last,
    }


def _doubling(draw: Draw) -> Values:
    start, factor = draw.number(1, 6), draw.one_of((2, 2, 3))
    a, b, c, d = (start * factor**i for i in range(4))
    return draw.people() | {
        "a": a,
        "b": b,
        "c": c,
        "ratio": divide(b, a),
        "check": divide(c, b),
        "d": times(c, factor),
        "answer": d,
    }


def _nth_term(draw: Draw) -> Values:
    start, step, n = draw.number(1, 30), draw.number(2, 9), draw.number(5, 12)
    return draw.people() | {
        "start": start,
        "step": step,
        "n": n,
        "steps": minus(n, 1),
        "work": times(n - 1, step),
        "sum": plus(start, (n - 1) * step),
        "answer": start + (n - 1) * step,
    }


def _percent(draw: Draw) -> Values:
    percent, total = 10 * draw.number(2, 9), 10 * draw.number(2, 20)
    return {
        "percent": percent,
        "total": total,
        "tens": percent // 10,
        "work": divide(total, 10),
        "work2": times(total // 10, percent // 10),
        "answer": total * percent // 100,
        "place": draw.one_of(("school", "village", "club", "camp", "factory", "library")),
        "action": draw.one_of(("come by bike", "speak French", "wear glasses", "sing in the choir", "own a dog")),
    }


def _riddle(draw: Draw) -> Values:
    x, k, m = draw.number(2, 20), draw.number(2, 9), draw.number(2, 30)
    return draw.people() | {
        "k": k,
        "m": m,
        "result": x * k + m,
        "rest": minus(x * k + m, m),
        "work": divide(x * k, k),
        "answer": x,
    }


def _range(draw: Draw) -> Values:
    a, b, c = draw.several(range(10, 99, draw.number(2, 3)), 3)
    return draw.people() | {
        "a": a,
        "b": b,
        "c": c,
        "high": max(a, b, c),
        "low": min(a, b, c),
        "middle": sorted((a, b, c))[1],
        "rest": minus(max(a, b, c), min(a, b, c)),
        "answer": max(a, b, c) - min(a, b, c),
        "game": draw.one_of(GAMES),
    }


def _pages(draw: Draw) -> Values:
    per_day, days, left = draw.number(5, 20), draw.number(3, 9), draw.number(5, 60)
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
    start, on = draw.number(15, 70), draw.number(3, 30)
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
    two, four = draw.number(2, 20), draw.number(2, 15)
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
    "age": _age,
    "age_sum": _age_sum,
    "parent_age": _parent_age,
    "average": _average,
    "missing_score": _missing_score,
    "sequence": _sequence,
    "falling": _falling,
    "doubling": _doubling,
    "nth_term": _nth_term,
    "percent": _percent,
    "riddle": _riddle,
    "range": _range,
    "pages": _pages,
    "passengers": _passengers,
    "legs": _legs,
}
