"""The embedded corpus: correct solutions, disjoint splits, clean functions, and a tokenizer that loses nothing."""

import ast
import operator
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specjax.data.embedded import stdlib_conversations, train_tokenizer, word_problems
from specjax.data.embedded.problem_families import FAMILIES, Family
from specjax.data.embedded.problem_families.drawing import Draw
from specjax.data.embedded.splitting import Conversation
from specjax.errors import InputError

PACKAGE = Path(sys.modules["specjax.data.embedded"].__file__ or "").parent
REPOSITORY = PACKAGE.parents[2]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CHAIN = re.compile(r"\d+(?: [-+*/] \d+)*(?: = \d+(?: [-+*/] \d+)*)+")


def _pieces(question: str, *numbers: int) -> float:
    metres, piece = (int(re.findall(rf"(\d+) {unit}\b", question)[0]) for unit in ("m", "cm"))
    assert sorted(numbers) == sorted((metres, piece))
    return metres * 100 / piece


# The answer of each family from nothing but the numbers that its question names, in order; then those that need words.
SOLVERS: dict[str, Callable[..., object]] = {
    "shopping": lambda n, p, m, q: n * p + m * q,
    "change": lambda n, p, note: note - n * p,
    "saving": lambda start, p, n: start + p * n,
    "weeks_to_save": lambda price, have, p: (price - have) / p,
    "sharing": lambda total, kept, k: (total - kept) / k,
    "wages": lambda rate, hours, bonus: rate * hours + bonus,
    "jugs": lambda juice, water, k: (juice + water) / k,
    "rows": lambda rows, seats, extra: rows * seats + extra,
    "dozens": lambda n, used: 12 * n - used,
    "travel_time": lambda d, v, pause: d / v + pause,
    "perimeter": lambda a, b: 2 * a + 2 * b,
    "area": lambda a, b, pond: a * b - pond,
    "trees": lambda length, gap: length / gap + 1,
    "minutes": lambda hours, extra, used: hours * 60 + extra - used,
    "temperature": lambda start, up, down: start + up - down,
    "more_than": lambda a, more: a + (a + more),
    "fewer_than": lambda a, less: a + (a - less),
    "times_as_many": lambda a, k: a + a * k,
    "parent_age": lambda child, k, later: child * k + later,
    "riddle": lambda k, m, result: (result - m) / k,
    "pages": lambda total, p, days: total - p * days,
    "passengers": lambda start, off, on: start - off + on,
    "legs": lambda two, four: 2 * two + 4 * four,
}
SOLVERS_OF_WORDS: dict[str, Callable[..., object]] = {
    "ribbon": _pieces,
}


def _value(expression: str) -> float:
    """Return the value of an expression without brackets: products and quotients first, from the left."""
    first, *rest = expression.split()
    terms = [float(first)]
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        if sign in "*/":
            terms[-1] = OPERATORS[sign](terms[-1], float(number))
        else:
            terms.append(OPERATORS[sign](0.0, float(number)))
    return sum(terms)


def _prompt(conversation: Conversation) -> str:
    return conversation["messages"][0]["content"]


def _answer(conversation: Conversation) -> str:
    return conversation["messages"][1]["content"]


def _problems(family: Family, count: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"{family.name} 1")
    for _ in range(count):
        yield family.problem(rng)


@pytest.fixture(scope="module")
def stdlib() -> list[Conversation]:
    return stdlib_conversations("train")


@pytest.fixture(scope="module")
def corpus(stdlib: list[Conversation]) -> list[Conversation]:
    return stdlib[:1500] + word_problems(1500, 0, "train")


@pytest.fixture(scope="module")
def folder(corpus: list[Conversation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_solutions_are_correct(family: Family) -> None:
    for question, solution in _problems(family, 300):
        worked, answer = solution.rsplit("\nAnswer: ", 1)
        assert "{" not in question + solution
        chains = CHAIN.findall(worked)
        assert chains
        for chain in chains:
            assert len({_value(side) for side in chain.split(" = ")}) == 1, solution
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        of_words = SOLVERS_OF_WORDS.get(family.name)
        expected = of_words(question, *numbers) if of_words else SOLVERS[family.name](*numbers)
        assert answer == str(expected).removesuffix(".0"), question + solution
        assert re.search(rf"\b{answer}\b", worked), solution


def test_every_family_is_solved_independently() -> None:
    assert len(FAMILIES) >= 20
    assert {family.name for family in FAMILIES} == SOLVERS.keys() | SOLVERS_OF_WORDS.keys()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_drawn_value_is_worded(family: Family) -> None:
    drawn = family.draw(Draw(random.Random(0))).keys() - Draw(random.Random(0)).people().keys()
    assert not {key for key in drawn - {"answer"} if f"{{{key}}}" not in family.question + family.solution}


def test_solution_is_a_function_of_its_question() -> None:
    solutions: dict[str, str] = {}
    for family in FAMILIES:
        for question, solution in _problems(family, 500):
            assert solutions.setdefault(question, solution) == solution


def test_splits_are_disjoint_and_deterministic() -> None:
    train, heldout = word_problems(4000, 0, "train"), word_problems(100, 0, "heldout")
    assert not {_prompt(c) for c in train} & {_prompt(c) for c in heldout}
    assert len({_prompt(c) for c in train}) == 4000
    assert word_problems(4000, 0, "train") == train
    assert word_problems(500, 0, "train") == train[:500]
    assert word_problems(500, 1, "train") != train[:500]


def test_stdlib_splits_are_disjoint_and_deterministic(stdlib: list[Conversation]) -> None:
    heldout = stdlib_conversations("heldout")
    assert not {_prompt(c) for c in stdlib} & {_prompt(c) for c in heldout}
    assert 0.01 < len(heldout) / (len(stdlib) + len(heldout)) < 0.03
    assert stdlib_conversations("heldout") == heldout


def test_too_many_problems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = Family("only", lambda draw: {"answer": 4}, "What is 2 + 2?", "2 + 2 = 4")
    module = sys.modules[word_problems.__module__]
    monkeypatch.setattr(module, "FAMILIES", (only,))
    with pytest.raises(InputError, match="count is 2"):
        word_problems(2, 0, "train")


def test_stdlib_functions_can_be_put_together_again(stdlib: list[Conversation]) -> None:
    assert len(stdlib) > 5000
    assert len({_answer(c) for c in stdlib}) == len(stdlib)
    for conversation in stdlib[::5]:
        body = textwrap.indent(_answer(conversation), "    ", lambda line: True)
        (function,) = ast.parse(f"{_prompt(conversation)}\n{body}").body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert not _answer(conversation)[0].isspace()


def test_parts_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class Tap:\n"
        "    @property\n"
        "    def flow(self,\n"
        "             unit='l'):  # per hour\n"
        '        """Return the flow."""\n'
        "        # Litres by default.\n"
        "        if unit:\n"
        "            return 1   \n"
        "        return 2\n"
        "\n"
        "def short():\n"
        "    return 1\n"
        "\n"
        "def same_line(): return 1\n"
        "\n"
        "def same_body():\n"
        "    return 1\n"
        "\n"
        "def only_docstring():\n"
        '    """Nothing.\n'
        '    More."""\n'
    )
    (tmp_path / "b.py").write_text("print 'Python 2'\n")
    (tmp_path / "c.py").write_bytes("def f():\n    x = 'ü'\n    return x\n".encode("latin-1"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_text("def f():\n    x = 1\n    return x\n")
    found = stdlib_conversations("train", root=tmp_path) + stdlib_conversations("heldout", root=tmp_path)
    assert [(_prompt(c), _answer(c)) for c in found] == [
        (
            '# class Tap\n@property\ndef flow(self,\n         unit=\'l\'):  # per hour\n    """Return the flow."""',
            "# Litres by default.\nif unit:\n    return 1\nreturn 2",
        ),
        ("def short():", "return 1"),
    ]


def test_no_stdlib_text_is_stored(stdlib: list[Conversation]) -> None:
    suffixes = {".py", ".toml", ".json", ".jsonl", ".jinja", ".txt", ".md", ".yaml"}
    folders = (REPOSITORY / name for name in ("specjax", "scripts", "configs", "docs"))
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    stored = "\n".join(re.sub(r"\s+", " ", path.read_text(encoding="utf-8")) for path in files)
    bodies = (re.sub(r"\s+", " ", _answer(c)) for c in stdlib)
    assert not [body for body in bodies if len(body) > 80 and body in stored]


def test_tokenizer_has_its_size_and_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 1024
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.mask_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|mask|>",
    )
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|mask|>") == [0, 1, 2, 3]


def test_training_the_tokenizer_is_deterministic(corpus: list[Conversation], folder: Path, tmp_path: Path) -> None:
    train_tokenizer(corpus, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_corpus_survives_the_tokenizer(corpus: list[Conversation], tokenizer: PreTrainedTokenizerBase) -> None:
    for conversation in corpus[::10]:
        answer = _answer(conversation)
        assert tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False)) == answer


def test_digits_stand_alone_and_indentation_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1234 56") == ["1", "2", "3", "4", "Ġ5", "6"]
    assert tokenizer.tokenize("\n        return") == ["Ċ", "Ġ" * 7, "Ġreturn"]


CONTENT = st.text("ab 1\n(_é", max_size=20)


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=2), system=st.none() | CONTENT)
def test_template_and_generation_mask(
    tokenizer: PreTrainedTokenizerBase, contents: list[tuple[str, str]], system: str | None
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    expected = [(text, 0)]
    for user, assistant in contents:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        expected += [(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", 0)]
        expected += [(f"{assistant}<|im_end|>", 1), ("\n", 0)]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(part for part, _ in expected)
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    # Supervision starts exactly where the generation prompt ends, whatever an answer starts with.
    pieces = [(tokenizer.encode(part, add_special_tokens=False), mask) for part, mask in expected]
    assert encoded["input_ids"] == [token for ids, _ in pieces for token in ids]
    assert encoded["assistant_masks"] == [mask for ids, mask in pieces for _ in ids]


def test_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_answers_rarely_repeat_themselves(tokenizer: PreTrainedTokenizerBase) -> None:
    shares = []
    for conversation in word_problems(500, 3, "train"):
        tokens = tokenizer.encode(_answer(conversation), add_special_tokens=False)
        assert 30 <= len(tokens) <= 120
        grams = list(zip(*(tokens[offset:] for offset in range(4)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams))
    assert sum(shares) / len(shares) < 0.02
