"""Which recipe gives the draft that is accepted most? Trains a draft per variant of a run config, and measures each.

Every stage is a command of its own, printed before it runs: its memory is free again afterwards, and where one fails
the others go on. In the folder OUT:

    taps/KEY/            the target's states, captured once for all runs on the same data
    runs/NAME/seed-0/    a training run; in it draft/, its best checkpoint exported, and benchmark.json, the measurement
    runs/NAME/seed-0.log what its commands printed
    recipes.json, recipes.md
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from specjax.config import RunConfig, load_config, read_mapping, validated
from specjax.config_sections import Section
from specjax.data.recipe_file import check_recipe, write_recipe
from specjax.errors import InputError

RECIPE_FILE, BENCHMARK_FILE = "recipe.json", "benchmark.json"
OWNED = ("output_dir", "seed")  # settings that this command gives to every run
LOG_TAIL = 12  # lines shown of a command that failed

Say = Callable[[str], None]


class CommandError(Exception):
    """A command of a run ended with another status than 0; the message holds the end of what it printed."""


class EmbeddedData(Section):
    train_prompts: int = Field(1920, ge=2, description="a third of them code")
    heldout_prompts: int = Field(60, ge=2, description="a third of them code")


class Variant(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.+-]*$", description="of its folder, and of its row in the table")
    base: str | None = Field(
        None, description="run config of this variant, of another kind, say; null: the common base"
    )
    overrides: tuple[str, ...] = Field((), description="section.key=value settings that differ from base")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="a run each")


class Spec(Section):
    """What is compared. All variants answer the same prompts, and are trained for equal steps if `equal_steps`."""

    base: str = Field(description="run config that the variants differ from")
    embedded_data: EmbeddedData | None = Field(
        None,
        description="first write the quickstart's data beside the file in base's data.train: "
        "{train_prompts: 1920, heldout_prompts: 60}; null: it is there",
    )
    prompts: tuple[str, ...] = Field(min_length=1, description="held out: JSONL files, a column each, and their total")
    max_new_tokens: int = Field(128, ge=2, description="of an answer")
    timed_passes: int = Field(1, ge=1, description="over all prompts, autoregressive and speculative in turn")
    capture: bool = Field(False, description="compute the target's states once for all runs on the same data")
    equal_steps: bool = Field(
        True,
        description="refuse variants of other training.steps; false: to compare at equal time, which the table shows",
    )
    variants: tuple[Variant, ...] = Field(
        min_length=1,
        description="of each a name, overrides as on the command line ([]), seeds ([0]), a run each, perhaps a base",
    )

    @model_validator(mode="after")
    def _named_once(self) -> Spec:
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"variants has two of the name {name!r}; rename one, or add its seeds to the other's")
        for variant in self.variants:
            if len(set(variant.seeds)) < len(variant.seeds):
                raise ValueError(f"variant {variant.name}: seeds {list(variant.seeds)} lists one twice; drop it")
        return self


@dataclass(frozen=True)
class Run:
    """A variant's training with one seed. folder: the run's. overrides: all that differ from the config at `base`."""

    name: str
    seed: int
    folder: Path
    base: str
    config: RunConfig
    overrides: tuple[str, ...]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"


def load_spec(path: str | Path) -> Spec:
    """Raises InputError naming the file and what is wrong in it."""
    raw = read_mapping(path, "a YAML file of variants, such as configs/recipes/quickstart.yaml")
    return validated(Spec, raw, str(path))


def planned_runs(spec: Spec, source: str, out: Path) -> list[Run]:
    """All runs, the first seed of every variant before any second one.

    Raises:
        InputError: a variant's config is wrong, or its draft could not be compared with the others'.
    """
    longest = max(len(variant.seeds) for variant in spec.variants)
    runs = [
        _planned(variant.base or spec.base, variant, seed, f"{source}: variant {variant.name}", out)
        for order in range(longest)
        for variant in spec.variants
        for seed in variant.seeds[order : order + 1]
    ]
    for run in runs:
        if spec.equal_steps and run.config.training.steps != runs[0].config.training.steps:
            raise InputError(
                f"{source}: variant {run.name} trains {run.config.training.steps} steps and {runs[0].name} "
                f"{runs[0].config.training.steps}; override it in neither, or set equal_steps: false"
            )
    return runs


def _planned(base: str, variant: Variant, seed: int, place: str, out: Path) -> Run:
    for setting in OWNED:
        if any(override.startswith(f"{setting}=") for override in variant.overrides):
            raise InputError(f"{place}: overrides sets {setting}, which every run is given by itself; drop it")
    folder = out / "runs" / variant.name / f"seed-{seed}"
    overrides = (*variant.overrides, f"seed={seed}", f"output_dir={folder}")
    config = load_config(base, overrides)
    _check_comparable(config, place)
    return Run(variant.name, seed, folder, base, config, overrides)


def _check_comparable(config: RunConfig, place: str) -> None:
    if config.kind == "causal_lm":
        raise InputError(f"{place}: kind is {config.kind}; only drafts (dflash, lora) are compared")
    if config.training.steps is None:
        raise InputError(f"{place}: training.epochs is set; a comparison counts steps: set training.steps")
    if not config.data.validation and config.data.validation_fraction is None:
        raise InputError(f"{place}: no validation data, by which the best checkpoint is chosen; set data.validation")
    if not config.logging.tensorboard:
        raise InputError(f"{place}: logging.tensorboard is false; step times are read from there: leave it true")
    if config.data.taps is not None:
        raise InputError(f"{place}: data.taps is set; leave it null, and set capture: true to share captured states")


def carry_out(spec: Spec, runs: list[Run], out: Path, say: Say) -> dict[str, str]:
    """Trains and measures what is not yet; returns the labels of the runs that failed, each with the reason.

    Raises:
        InputError: a run in `out` was made with other settings.
        CommandError: the embedded data could not be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if spec.embedded_data is not None:
        run_command(_data_command(spec, spec.embedded_data), out / "data.log", say)
    measurement = _measurement(spec)
    measured = [run for run in runs if (run.folder / BENCHMARK_FILE).exists()]
    for run in measured:
        check_recipe(
            run.folder / RECIPE_FILE,
            _settings(run.config) | measurement,
            otherwise="the run was made with other settings",
            remedy=f"delete {run.folder}, or give the variant another name",
        )
    failed = {}
    for run in runs:
        if run in measured:
            say(f"{run.label}: is measured already")
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            report = _train_and_measure(spec, run, out, say)
            write_recipe(run.folder / RECIPE_FILE, _settings(run.config) | measurement)
            os.replace(report, run.folder / BENCHMARK_FILE)
        except CommandError as error:
            failed[run.label] = str(error)
            say(f"{run.label}: failed: {error}")
    return failed


def _train_and_measure(spec: Spec, run: Run, out: Path, say: Say) -> Path:
    """Carries out what is missing of a run; returns the file of its measurement."""
    from specjax.weights.orbax_checkpoint import latest_step

    overrides = list(run.overrides)
    if spec.capture and run.config.kind == "dflash":  # adapters need the target's keys, which are not captured
        taps = str(out / "taps" / _data_key(run.config))
        run_command(["specjax.capture", run.base, taps, *overrides], run.log, say)
        overrides.append(f"data.taps={taps}")
    run_command(["specjax.train", run.base, *overrides, "--resume"], run.log, say)
    if latest_step(run.folder) != run.config.training.steps:
        raise CommandError(f"training stopped at step {latest_step(run.folder)}; the same command continues it")
    draft, report = run.folder / "draft", run.folder / f"{BENCHMARK_FILE}.partial"
    run_command(["converters.flax_to_hf", str(run.folder), str(draft), "--step", "best"], run.log, say)
    run_command(_decode_command(spec, run.config, draft, report), run.log, say)
    return report


def _data_command(spec: Spec, data: EmbeddedData) -> list[str]:
    sizes = data.model_dump() | {"max_new_tokens": spec.max_new_tokens}
    options = (part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", str(size)))
    return ["specjax.quickstart", spec.base, "--data-only", *options]


def _decode_command(spec: Spec, config: RunConfig, draft: Path, report: Path) -> list[str]:
    options = {
        "--target": config.target.path,
        "--draft": draft,
        "--dtype": config.target.dtype,
        "--tensor": config.mesh.tensor,
        "--chat-template-kwargs": json.dumps(config.data.chat_template_kwargs),
        "--max-new-tokens": spec.max_new_tokens,
        "--runs": spec.timed_passes,
        "--json": report,
    }
    named = [str(part) for option in options.items() for part in option]
    return ["specjax.benchmark", "decode", "--data", *spec.prompts, *named]


def run_command(command: list[str], log: Path, say: Say) -> None:
    """Runs `python -m command` to its end, its output appended to `log`; asked to stop, it first waits for the child,
    which saves.

    Raises:
        CommandError: another status than 0.
    """
    shown = f"python -m {shlex.join(command)}"
    say(shown)
    with log.open("ab") as output:
        child = subprocess.Popen([sys.executable, "-m", *command], stdout=output, stderr=subprocess.STDOUT)

        def stop(*_: object) -> None:
            child.terminate()
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGTERM, stop)  # Ctrl-C reaches the child by itself
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        raise CommandError("\n  ".join([f"status {status} of {shown}", *lines, f"(all of it: {log})"]))


def _measurement(spec: Spec) -> dict[str, Any]:
    """What decides a draft's figures."""
    digests = {}
    for path in spec.prompts:
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"prompts {path}: cannot be read ({error.strerror}); give a JSONL file") from error
    return {"prompts": digests, "max_new_tokens": spec.max_new_tokens, "timed_passes": spec.timed_passes}


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that decide its draft, by dotted name."""
    settings = config.model_dump(mode="json")
    del settings["output_dir"], settings["data"]["taps"]
    return dict(_flat("", settings))


def _flat(prefix: str, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value


def _data_key(config: RunConfig) -> str:
    """Equal for configs that are trained on the same states."""
    data = config.data.model_dump(mode="json", exclude={"taps", "packing", "num_anchors", "supervise"})
    layers = [config.draft.num_taps, config.draft.target_layer_ids]
    parts = json.dumps([config.target.model_dump(mode="json"), data, layers], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]
