"""A folder of training answers, written shard by shard, by one process or several, and continued after a kill.

    recipe.json                 what decides every byte of the answers (`Recipe`); another one is refused
    answers-00000.jsonl         the records of the first `shard_prompts` prompts, in order: what `data.train` reads
    reports/answers-00000.json  what became of these prompts: `ShardReport`
    counts.json                 the sum of the reports, once every shard is there

A shard holds fixed prompts and does not depend on other shards, so who writes it, and when, changes nothing. It is
written beside its place and renamed, after its report: where it stands, both are complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specjax.data.dialogues import OUTCOMES, Dialogue
from specjax.data.recipe_file import check_recipe, write_recipe, write_whole
from specjax.errors import InputError

RECIPE_FILE = "recipe.json"
COUNTS_FILE = "counts.json"
REPORTS = "reports"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """What decides the answers; where any of it differs, a folder is not continued.

    target: digest of the target's weights. chat_template: digest of its text. prompts: how many are answered, the
    first ones of the data. shard_prompts: prompts a shard. data_*: one entry a file.
    """

    target: str
    dtype: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    unfinished: str
    prompts: int
    shard_prompts: int
    data_files: tuple[str, ...]
    data_bytes: tuple[int, ...]
    data_sha256: tuple[str, ...]

    @property
    def shards(self) -> list[range]:
        """The prompts of every shard."""
        starts = range(0, self.prompts, self.shard_prompts)
        return [range(start, min(start + self.shard_prompts, self.prompts)) for start in starts]

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}))
        return value


@dataclass
class Counts:
    """Prompts by what became of them, and the training records and supervised tokens that they gave."""

    done: int = 0
    unfinished: int = 0
    failed: int = 0
    records: int = 0
    supervised_tokens: int = 0

    @property
    def prompts(self) -> int:
        return self.done + self.unfinished + self.failed

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Failure:
    """A prompt that could not be answered, where it stands in the data, and why."""

    file: str
    line: int
    reason: str


@dataclass
class ShardReport:
    """counts: of the shard's prompts. failures: one for each that failed."""

    counts: Counts = field(default_factory=Counts)
    failures: list[Failure] = field(default_factory=list)

    def add(self, dialogue: Dialogue, place: tuple[Path, int]) -> None:
        """Counts a dialogue that has ended; `place` is the file and the line that it comes from."""
        assert dialogue.outcome in OUTCOMES
        tokens = sum(sum(record["loss_mask"]) for record in dialogue.records)
        outcome = {dialogue.outcome: 1}
        self.counts += Counts(**outcome, records=len(dialogue.records), supervised_tokens=tokens)
        if dialogue.outcome == "failed":
            self.failures.append(Failure(str(place[0]), place[1], dialogue.reason))


class AnswerFolder:
    """The shards of one recipe in a folder, which is made where it is missing.

    Raises InputError where the folder holds answers of another recipe, or JSONL files that are no answers.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.shards = recipe.shards
        recipe_file = path / RECIPE_FILE
        wanted = recipe.to_json()
        if recipe_file.exists():
            remedy = "name a new folder"
            check_recipe(recipe_file, wanted, otherwise="holds answers of another recipe", remedy=remedy)
            return
        if others := sorted(path.glob("*.jsonl")):
            raise InputError(f"{others[0]}: is there, but {recipe_file} is not; name a new folder for the answers")
        (path / REPORTS).mkdir(parents=True, exist_ok=True)
        write_recipe(recipe_file, wanted)

    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return [shard for shard in range(len(self.shards)) if not self._answers(shard).exists()]

    def write(self, shard: int, dialogues: Iterable[Dialogue], report: ShardReport) -> None:
        """Writes the records of the shard's dialogues; the file appears complete or not at all."""
        for path in (self._report(shard), self._answers(shard)):
            for left_over in path.parent.glob(f"{path.name}.*.partial"):  # of a process that was killed
                left_over.unlink()
        lines = (json.dumps(record) + "\n" for dialogue in dialogues for record in dialogue.records)
        write_whole(self._report(shard), json.dumps(asdict(report), indent=2) + "\n")
        write_whole(self._answers(shard), "".join(lines))

    def read_report(self, shard: int) -> ShardReport:
        path = self._report(shard)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return ShardReport(Counts(**value["counts"]), [Failure(**failure) for failure in value["failures"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: unreadable ({error}); delete {self._answers(shard)} to answer it anew"
            ) from error

    def write_counts(self) -> Counts | None:
        """The counts of all prompts, also written to the folder; None while shards are missing."""
        if self.missing():
            return None
        total = sum((self.read_report(shard).counts for shard in range(len(self.shards))), Counts())
        write_whole(self.path / COUNTS_FILE, json.dumps({"prompts": total.prompts, **asdict(total)}, indent=2) + "\n")
        return total

    def _answers(self, shard: int) -> Path:
        return self.path / f"answers-{shard:05d}.jsonl"

    def _report(self, shard: int) -> Path:
        return self.path / REPORTS / f"answers-{shard:05d}.json"
