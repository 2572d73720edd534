"""The families of word problems: how values are drawn, and the wording of each."""

import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from specjax.data.embedded.problem_families import amounts, measures, numbers
from specjax.data.embedded.problem_families.drawing import Draw, Values


@dataclass(frozen=True)
class Family:
    """A kind of problem: `draw` picks the values that the format strings `question` and `solution` are filled with.

    A solution is a function of its question, and the value `answer` ends it.
    """

    name: str
    draw: Callable[[Draw], Values]
    question: str
    solution: str

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """Return one (question, solution) pair; the solution's last line is `Answer: X`."""
        values = self.draw(Draw(rng))
        return self.question.format_map(values), f"{self.solution.format_map(values)}\nAnswer: {values['answer']}"


def _families() -> tuple[Family, ...]:
    wordings = tomllib.loads(resources.files(__name__).joinpath("wordings.toml").read_text(encoding="utf-8"))
    draws = amounts.DRAWS | measures.DRAWS | numbers.DRAWS
    return tuple(
        Family(name, draw, wordings[name]["question"], wordings[name]["solution"]) for name, draw in draws.items()
    )


FAMILIES = _families()
