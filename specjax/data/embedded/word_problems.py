"""Generated word problems with worked solutions: a domain that a model of a few million parameters can master."""

import random

from specjax.data.embedded.problem_families import FAMILIES
from specjax.data.embedded.splitting import Conversation, Split, conversation, in_split
from specjax.errors import InputError

# Held-out questions are one in 50, and repeated questions are drawn again.
MAX_DRAWS_PER_PROBLEM = 1000


def word_problems(count: int, seed: int, split: Split) -> list[Conversation]:
    """Return `count` different problems of a split; every solution's last line is `Answer: X`.

    A larger `count` extends the list of a smaller one. Raises InputError if the families cannot fill `count`.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    conversations: list[Conversation] = []
    for _ in range(count * MAX_DRAWS_PER_PROBLEM):
        if len(conversations) == count:
            break
        question, solution = rng.choice(FAMILIES).problem(rng)
        if question not in seen and in_split(question, split):
            seen.add(question)
            conversations.append(conversation(question, solution))
    if len(conversations) < count:
        raise InputError(
            f"count is {count}, but there are only {len(conversations)} different word problems; ask for fewer"
        )
    return conversations
