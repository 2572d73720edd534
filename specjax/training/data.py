"""The data sets of a run, as its config names them."""

from __future__ import annotations

from dataclasses import dataclass

from specjax.config import RunConfig
from specjax.data.pipeline import TokenizedExamples, tokenized
from specjax.data.sources import MixedRecords, read_sources
from specjax.data.turns import TurnRules
from specjax.weights import read_target_config
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
