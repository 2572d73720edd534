"""Problems about money and about things that are bought, shared, packed or counted."""

from collections.abc import Callable

from specjax.data.embedded.problem_families.drawing import Draw, Values, divide, minus, plus, times

GOODS = (
    "apples",
    "pencils",
    "books",
    "cakes",
    "candles",
    "balls",
    "hats",
    "cups",
    "stamps",
    "flowers",
    "lamps",
    "pens",
)
SWEETS = ("sweets", "marbles", "cards", "stickers", "shells", "nuts", "coins", "buttons", "beads", "cherries")
TREATS = ("bicycle", "guitar", "camera", "tent", "drum", "watch", "telescope", "scooter", "keyboard", "kite")
GROUPS = ("friends", "children", "cousins", "players", "guests", "pupils")


def _shopping(draw: Draw) -> Values:
    n, p, m, q = (draw.number(2, 9) for _ in range(4))
    first, second = draw.several(GOODS, 2)
    return draw.people() | {
        "n": n,
        "p": p,
        "m": m,
        "q": q,
        "first": first,
        "second": second,
        "work": times(p, n),
        "work2": times(q, m),
        "sum": plus(n * p, m * q),
        "answer": n * p + m * q,
    }


def _change(draw: Draw) -> Values:
    n, p = draw.number(2, 9), draw.number(2, 9)
    note = draw.one_of([note for note in (20, 50, 100) if note > n * p])
    return draw.people() | {
        "n": n,
        "p": p,
        "note": note,
        "goods": draw.one_of(GOODS),
        "work": times(p, n),
        "rest": minus(note, n * p),
        "answer": note - n * p,
    }


def _saving(draw: Draw) -> Values:
    start, p, n = draw.number(5, 40), draw.number(2, 9), draw.number(3, 9)
    return draw.people() | {
        "start": start,
        "p": p,
        "n": n,
        "treat": draw.one_of(TREATS),
        "work": times(p, n),
        "sum": plus(start, n * p),
        "answer": start + n * p,
    }


def _weeks_to_save(draw: Draw) -> Values:
    p, n, have = draw.number(3, 9), draw.number(2, 9), draw.number(5, 40)
    return draw.people() | {
        "p": p,
        "have": have,
        "price": n * p + have,
        "treat": draw.one_of(TREATS),
        "rest": minus(n * p + have, have),
        "work": divide(n * p, p),
        "answer": n,
    }


def _sharing(draw: Draw) -> Values:
    each, k, kept = draw.number(2, 9), draw.number(3, 9), draw.number(2, 20)
    return draw.people() | {
        "k": k,
        "kept": kept,
        "total": each * k + kept,
        "sweets": draw.one_of(SWEETS),
        "group": draw.one_of(GROUPS),
        "rest": minus(each * k + kept, kept),
        "work": divide(each * k, k),
        "answer": each,
    }


def _wages(draw: Draw) -> Values:
    rate, hours, bonus = draw.number(5, 9), draw.number(3, 9), draw.number(5, 30)
    return draw.people() | {
        "rate": rate,
        "hours": hours,
        "bonus": bonus,
        "work": times(rate, hours),
        "sum": plus(rate * hours, bonus),
        "answer": rate * hours + bonus,
        "job": draw.one_of(
            ("washes cars", "paints fences", "picks berries", "walks dogs", "sorts letters", "cuts grass")
        ),
    }


def _jugs(draw: Draw) -> Values:
    k, n = draw.number(2, 9), draw.number(3, 9)
    juice = draw.number(2, k * n - 2)
    return draw.people() | {
        "juice": juice,
        "water": k * n - juice,
        "k": k,
        "sum": plus(juice, k * n - juice),
        "work": divide(k * n, k),
        "answer": n,
        "drink": draw.one_of(("juice", "syrup", "tea", "milk")),
    }


def _rows(draw: Draw) -> Values:
    rows, seats, extra = draw.number(3, 9), draw.number(4, 9), draw.number(2, 25)
    return {
        "rows": rows,
        "seats": seats,
        "extra": extra,
        "work": times(seats, rows),
        "sum": plus(rows * seats, extra),
        "answer": rows * seats + extra,
        "hall": draw.one_of(("hall", "school", "theatre", "tent", "church", "cinema")),
    }


def _dozens(draw: Draw) -> Values:
    n = draw.number(2, 9)
    used = draw.number(3, 12 * n - 4)
    return draw.people() | {
        "n": n,
        "used": used,
        "work": times(12, n),
        "rest": minus(12 * n, used),
        "answer": 12 * n - used,
        "goods": draw.one_of(("eggs", "rolls", "candles", "roses", "pencils", "oranges")),
    }


DRAWS: dict[str, Callable[[Draw], Values]] = {
    "shopping": _shopping,
    "change": _change,
    "saving": _saving,
    "weeks_to_save": _weeks_to_save,
    "sharing": _sharing,
    "wages": _wages,
    "jugs": _jugs,
    "rows": _rows,
    "dozens": _dozens,
}
