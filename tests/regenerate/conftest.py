from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.model_folders import POSITIONS, STOP_TOKEN, save_draft_for, save_target_with_tokenizer, write_jsonl
from tests.regenerate.runs import ANSWERED, NEW, SHAREGPT, TEXTS, TOKENS, call, told


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ with many stop tokens, so that answers of a random model end; draft/ made for it; two data files."""
    folder = tmp_path_factory.mktemp("models")
    target = save_target_with_tokenizer(folder / "target")
    stops = [STOP_TOKEN, *range(5, json.loads((target / "config.json").read_text())["vocab_size"], 6)]
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    save_draft_for(target, folder / "draft")
    names = {role: name for name, role in SHAREGPT.items()}
    write_jsonl(
        folder / "a.jsonl",
        {"prompt": TEXTS[0]},
        {"messages": ANSWERED[1]},
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in ANSWERED[2]]},
        {"prompt": "  "},
        {"input_ids": [*TOKENS, 3, 4], "loss_mask": [0] * len(TOKENS) + [1, 1]},
    )
    write_jsonl(
        folder / "b.jsonl",
        {"messages": ANSWERED[4]},
        {"input_ids": [5] * (POSITIONS - NEW + 1), "loss_mask": [0] * (POSITIONS - NEW + 1)},
        {"messages": ANSWERED[5]},
        {"messages": [told("hello")]},
        {"messages": ANSWERED[6]},
        {"messages": ANSWERED[7]},
    )
    return folder


@pytest.fixture(scope="session")
def stops(folder: Path) -> list[int]:
    return list(json.loads((folder / "target" / "generation_config.json").read_text())["eos_token_id"])


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "answers"
    call(folder, out)
    return out
