"""Makes the embedded target from nothing: corpus, tokenizer, training, export, and what the result can do.

`python scripts/train_embedded_target.py [--steps N] [--out FOLDER] [--work FOLDER] [--seed N] [--resume]`

WORK/corpus holds the tokenizer, config.json and token ids, made once; WORK/run is the training run, which continues
with --resume after an interruption. OUT receives the model in bfloat16, its tokenizer and generation_config.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from transformers import AutoTokenizer

from specjax.config import RunConfig, load_config
from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import Conversation, parse_record
from specjax.data.embedded import stdlib_conversations, train_tokenizer, word_problems
from specjax.data.embedded.tokenizer import VOCAB_SIZE
from specjax.data.pipeline import fixed_batches, read_examples
from specjax.decoding import generate
from specjax.errors import InputError, exit_on_input_error
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.layers import RopeConfig
from specjax.models.sharding import mesh_scope
from specjax.training.evaluation import causal_lm_evaluator
from specjax.training.objectives import CausalLMLoss
from specjax.training.run import train
from specjax.weights import decoder_config_to_hf, load_run_params, load_target, save_target
from specjax.weights.safetensors_files import EMBEDDED_FOLDER

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "embedded-target.yaml"
CONFIG_WORK = Path("runs/embedded-target")  # the work folder that the paths in CONFIG name
# Deep and narrow: verifying a block then costs little more than one token, on CPU too.
MODEL = DecoderConfig(
    model_type="qwen3",
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope=RopeConfig(theta=10000.0),
    tie_word_embeddings=True,
    qk_norm=True,
)
DOMAINS = ("code", "problems")
TOKENIZER_PROBLEMS = 5000  # word problems that the tokenizer learns from, beside all code
HELDOUT_SHARE = 50  # training problems for each held-out one
REPORT_SAMPLES = 320
SAMPLE_TOKENS = 200


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"optimizer updates (default: those of {CONFIG.name})")
    parser.add_argument("--out", type=Path, default=EMBEDDED_FOLDER, help="folder of the model (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=CONFIG_WORK, help="corpus and run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and data order")
    parser.add_argument("--problems", type=int, default=16000, help="word problems to train on (default: %(default)s)")
    parser.add_argument("--code", type=Path, help="folder of Python source (default: this Python's standard library)")
    parser.add_argument("--resume", action="store_true", help="continue what WORK holds")
    args = parser.parse_args(argv)
    if args.work.exists() and not args.resume:
        raise InputError(f"--work {args.work} exists; continue it with --resume, or choose another folder")
    config = run_config(args.work, args.steps, args.seed)
    corpus = args.work / "corpus"
    if not corpus.exists():
        print(f"Writing {corpus}")
        write_corpus(corpus, args.code, args.problems, config.data.max_length)
    run = train(config, resume=args.resume)
    export(run, config.training.steps, corpus / "model", args.out)
    report(args.out, corpus, config.data.max_length)


def run_config(work: Path, steps: int | None, seed: int) -> RunConfig:
    """CONFIG with the command line's settings, its paths moved into `work`."""
    overrides = [f"seed={seed}"] + ([] if steps is None else [f"training.steps={steps}"])
    config = load_config(CONFIG, overrides)

    def moved(path: str) -> str:
        return str(work / Path(path).relative_to(CONFIG_WORK))

    paths = {name: tuple(map(moved, getattr(config.data, name))) for name in ("train", "validation")}
    return config.model_copy(
        update={
            "output_dir": moved(config.output_dir),
            "target": config.target.model_copy(update={"path": moved(config.target.path)}),
            "data": config.data.model_copy(update=paths),
        }
    )


def write_corpus(corpus: Path, code_folder: Path | None, problems: int, max_length: int) -> None:
    """Writes config.json and tokenizer into corpus/model, and each domain's training and held-out token ids.

    Code is learnt whole, problems by their answers alone; held-out data counts answers only. The folder appears
    complete or not at all.
    """
    train_sets = (stdlib_conversations("train", root=code_folder), word_problems(problems, 0, "train"))
    heldout_problems = max(1, problems // HELDOUT_SHARE)
    heldout_sets = (stdlib_conversations("heldout", root=code_folder), word_problems(heldout_problems, 1, "heldout"))
    partial = corpus.with_name(corpus.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = partial / "model"
    train_tokenizer([*train_sets[0], *train_sets[1][:TOKENIZER_PROBLEMS]], model)
    write_json(model / "config.json", decoder_config_to_hf(MODEL) | special_token_ids(model))
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(model))
    for domain, learnt, heldout in zip(DOMAINS, train_sets, heldout_sets, strict=True):
        write_token_ids(partial / f"{domain}.jsonl", chat, learnt, max_length, learn_prompts=domain == "code")
        write_token_ids(partial / f"heldout-{domain}.jsonl", chat, heldout, max_length, learn_prompts=False)
    os.replace(partial, corpus)


def write_token_ids(
    path: Path, chat: ChatTokenizer, conversations: Iterable[dict[str, Any]], max_length: int, *, learn_prompts: bool
) -> None:
    """Pre-tokenised JSONL; conversations of more than `max_length` tokens are left out, so that every answer ends."""
    samples = tokens = 0
    with open(path, "w", encoding="utf-8") as file:
        for i, conversation in enumerate(conversations):
            record = parse_record(conversation, f"{path.stem} {i}")
            assert isinstance(record, Conversation)
            input_ids, loss_mask = chat(record)
            if len(input_ids) > max_length:
                continue
            mask = [1] * len(input_ids) if learn_prompts else loss_mask.astype(int).tolist()
            file.write(json.dumps({"input_ids": input_ids.tolist(), "loss_mask": mask}, separators=(",", ":")) + "\n")
            samples, tokens = samples + 1, tokens + len(input_ids)
    print(f"{path.name}: {samples:,} conversations, {tokens:,} tokens")


def export(run: Path, step: int | None, model: Path, out: Path) -> None:
    """Writes the run's checkpoint of `step`, its last, to `out`; raises InputError if training did not get there."""
    decoder = load_run_params(run, step)
    assert isinstance(decoder, Decoder)
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json":
            shutil.copy(file, out)
    ids = special_token_ids(model)
    write_json(out / "generation_config.json", {"do_sample": False} | ids)
    save_target(decoder, out, jnp.bfloat16, extra_config=ids)
    print(f"{run} -> {out}")


def report(out: Path, corpus: Path, max_length: int) -> None:
    """Prints the exported model's held-out loss and one greedy answer of each domain."""
    model, tokenizer = load_target(out, dtype=jnp.float32), AutoTokenizer.from_pretrained(out)
    loss = CausalLMLoss(query_chunk=max_length, remat=False)
    for domain in DOMAINS:
        examples = read_examples([corpus / f"heldout-{domain}.jsonl"], None, vocab_size=model.config.vocab_size)
        batches = fixed_batches(examples, REPORT_SAMPLES, batch_size=8, max_length=max_length, num_anchors=None)
        with mesh_scope():
            metrics = causal_lm_evaluator(loss, batches)(model).metrics
        print(f"\nheld-out {domain}, answers: loss {metrics['loss']:.3f} nats, accuracy {metrics['accuracy']:.3f}")
        input_ids, loss_mask = examples[0]
        prompt = input_ids[: int(loss_mask.argmax())].tolist()
        answer = generate(model, [prompt], max_new_tokens=SAMPLE_TOKENS, stop_token_ids=[tokenizer.eos_token_id])
        print(tokenizer.decode(prompt) + tokenizer.decode(answer.tokens[0]))


def special_token_ids(model: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
