"""What every family of word problems is made from: random values, names, and worked arithmetic."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Values = dict[str, object]

GIRLS = ("Anna", "Clara", "Emma", "Grace", "Hannah", "Julia", "Lena", "Maria", "Nora", "Rosa", "Sara", "Tina")
BOYS = ("Adam", "Ben", "Carl", "David", "Felix", "Henry", "Jacob", "Leo", "Marco", "Oscar", "Paul", "Tom")


class Draw:
    """Random choices of one problem."""

    def __init__(self, rng: random.Random) -> None:
        """Draw from `rng`, whose state advances."""
        self.rng = rng

    def number(self, low: int, high: int) -> int:
        """Return an integer, both ends included."""
        return self.rng.randint(low, high)

    def one_of(self, choices: Sequence[T]) -> T:
        """Return one of the choices."""
        return self.rng.choice(choices)

    def several(self, choices: Sequence[T], count: int) -> list[T]:
        """Return `count` different choices."""
        return self.rng.sample(choices, count)

    def people(self) -> Values:
        """Return two people of different names: `who` with pronouns (`he`, `his`, `him`, `He`, `His`) and `other`."""
        who, other = self.rng.sample(GIRLS + BOYS, 2)
        he, his, him = ("she", "her", "her") if who in GIRLS else ("he", "his", "him")
        return {
            "who": who,
            "he": he,
            "his": his,
            "him": him,
            "He": he.capitalize(),
            "His": his.capitalize(),
            "other": other,
        }


def plus(a: int, b: int) -> str:
    """Return a worked sum; a carry out of the ones is taken in two steps."""
    if b >= 10 and a % 10 + b % 10 >= 10:
        return f"{a} + {b} = {a + b - b % 10} + {b % 10} = {a + b}"
    return f"{a} + {b} = {a + b}"


def minus(a: int, b: int) -> str:
    """Return a worked difference; a borrow from the tens is taken in two steps."""
    if b >= 10 and a % 10 < b % 10:
        return f"{a} - {b} = {a - b + b % 10} - {b % 10} = {a - b}"
    return f"{a} - {b} = {a - b}"


def times(a: int, b: int) -> str:
    """Return a worked product; a factor between two tens is split into tens and ones."""
    if a > 10 and b > 1 and a % 10:
        return f"{a} * {b} = {(a - a % 10) * b} + {a % 10 * b} = {a * b}"
    return f"{a} * {b} = {a * b}"


def divide(a: int, b: int) -> str:
    """Return a worked exact quotient; one between two tens is reached in two steps."""
    quotient = a // b
    if quotient > 10 and quotient % 10:
        tens = quotient - quotient % 10
        return f"{a} / {b} = {tens} + {quotient % 10} = {quotient}"
    return f"{a} / {b} = {quotient}"
