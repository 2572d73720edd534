"""The families of word problems: how values are drawn, and two wordings of each."""

import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from specjax.data.embedded.problem_families import amounts, measures, numbers
from specjax.data.embedded.problem_families.drawing import Draw, Values


@dataclass(frozen=True)
class Family:
    """A kind of problem: `draw` picks the values, a wording is a (question, worked solution) pair of format strings.

    A question's wording fixes its solution's wording, so a solution is a function of its question.
    The value `answer` ends the solution.
    """

    name: str
    draw: Callable[[Draw], Values]
    wordings: tuple[tuple[str, str], ...]

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """Return one (question, solution) pair; the solution's last line is `Answer: X`."""
        values = self.draw(Draw(rng))
        question, solution = self.wordings[rng.randrange(len(self.wordings))]
        return question.format_map(values), f"{solution.format_map(values)}\nAnswer: {values['answer']}"


def _families() -> tuple[Family, ...]:
    wordings = tomllib.loads(resources.files(__name__).joinpath("wordings.toml").read_text(encoding="utf-8"))
    draws = amounts.DRAWS | measures.DRAWS | numbers.DRAWS
    return tuple(
        Family(name, draw, tuple((wording["question"], wording["solution"]) for wording in wordings[name]))
        for name, draw in draws.items()
    )


FAMILIES = _families()
