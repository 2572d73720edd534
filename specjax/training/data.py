"""The data sets of a run, as its config names them."""

from __future__ import annotations

from dataclasses import dataclass

from specjax.config import RunConfig
from specjax.data.answer_folder import RECIPE_FILE
from specjax.data.conversations import JsonlRecords
from specjax.data.pipeline import TokenizedExamples, tokenized
from specjax.data.sources import MixedRecords, read_sources
from specjax.data.turns import TurnRules
from specjax.weights import read_target_config, target_digest
from specjax.weights.config_fields import read_json
from specjax.weights.tokenizer import load_tokenizer, stop_token_ids


@dataclass(frozen=True)
class RunData:
    """train: the samples of an epoch. validation: held out, or None."""

    train: MixedRecords
    validation: MixedRecords | None

    def identity(self) -> dict[str, list[int | str]]:
        """What tells these sources from changed ones: the bytes of every file, rows and fingerprint of a hub set."""
        split = self.validation is None or self.validation.sources == self.train.sources
        sets = {"train": self.train, "validation": None if split else self.validation}
        return {name: [] if records is None else records.identity for name, records in sets.items()}


def open_data(config: RunConfig) -> RunData:
    """The records of `config`; errors as `read_sources`."""
    train, held_out = read_sources(config.data.weighted_sources, config.data.validation_fraction)
    if config.data.validation:
        held_out, _ = read_sources([(path, 1.0) for path in config.data.validation])
    return RunData(train, held_out)


def examples_of(config: RunConfig, records: MixedRecords) -> TokenizedExamples:
    """`records`, tokenised as the config says."""
    return tokenized(
        records,
        load_tokenizer(config.target.path),
        chat_template_kwargs=config.data.chat_template_kwargs,
        stop_token_ids=stop_token_ids(config.target.path),
        vocab_size=read_target_config(config.target.path).vocab_size,
        rules=TurnRules(config.data.supervise, config.data.reasoning),
    )


def answer_warnings(config: RunConfig, records: RunData) -> list[str]:
    """A sentence for each folder of `specjax.regenerate` whose answers are another target's or of another chat mode.

    Token ids show neither, and a draft is seldom right in a mode that it has not learnt.
    """
    mode = config.data.chat_template_kwargs
    sets = (records.train, records.validation)
    sources = [source for each in sets if each is not None for source in each.sources]
    paths = [path for source in sources if isinstance(source, JsonlRecords) for path in source.paths]
    warnings = []
    for folder in dict.fromkeys(path.parent for path in paths):
        recipe = read_json(folder / RECIPE_FILE) if (folder / RECIPE_FILE).exists() else {}
        if "chat_template_kwargs" not in recipe:  # a recipe of something else, such as the quickstart's
            continue
        if recipe.get("target") != target_digest(config.target.path):
            warnings.append(f"{folder}: its answers are of another target than target.path {config.target.path}")
        if recipe["chat_template_kwargs"] != mode:
            warnings.append(
                f"{folder}: its answers were written with the chat template kwargs {recipe['chat_template_kwargs']}, "
                f"but data.chat_template_kwargs is {mode}, which is recorded as the draft's mode: set it to theirs"
            )
    return warnings
