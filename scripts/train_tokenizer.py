#!/usr/bin/env python3
"""Train the byte-level BPE of the small example model.

    python scripts/train_tokenizer.py --text TRAIN.txt.xz --reasoning REASONING.jsonl.xz \\
        --out examples/tiny-deepseek

Writes `tokenizer.json` (minified) and `tokenizer_config.json`. The pre-tokenizer is DeepSeek-V3's
(digits in groups of up to three, indentation as one run with the last space left to the next word);
special tokens have DeepSeek's names: bos 0, eos 1, pad 2, and User, Assistant, <think>, </think> as
the last four ids. The chat template follows DeepSeek-V3.1. 60 MB of text take some 20 s.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dskjax import tokenizer as names
from dskjax.documents import iter_documents, iter_records

# The three patterns of DeepSeek-V3's tokenizer.json.
PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
FIRST_IDS = (names.BOS, names.EOS, names.PAD)
LAST_IDS = (names.USER, names.ASSISTANT, names.THINK, names.END_THINK)
DROPPED_TASKS = {"gsm_symbolic"}  # its templates' licence is not clear

# DeepSeek-V3.1's format: no newlines; past turns without their thinking.
CHAT_TEMPLATE = """\
{%- if thinking is not defined %}{% set thinking = false %}{% endif -%}
{{ bos_token }}
{%- for message in messages if message.role == 'system' -%}
{{ ('' if loop.first else '\\n\\n') ~ message.content }}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '<｜User｜>' ~ message.content }}
{%- elif message.role == 'assistant' -%}
{{ '<｜Assistant｜></think>' ~ message.content.split('</think>')[-1] ~ eos_token }}
{%- elif message.role != 'system' -%}
{{ raise_exception('unknown role ' ~ message.role ~ ': use system, user or assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}
{{ '<｜Assistant｜>' ~ ('<think>' if thinking else '</think>') }}
{%- endif -%}"""


def sample(
    text: Path, text_bytes: int, reasoning: Path | None, reasoning_bytes: int
) -> Iterator[str]:
    """Whole documents from the front of both files until each has given its share."""
    for document in iter_documents([text]):
        yield document.text
        text_bytes -= len(document.text.encode())
        if text_bytes <= 0:
            break
    if reasoning is None:
        return
    for _, row in iter_records(reasoning):
        if row["task"] in DROPPED_TASKS:
            continue
        trace = f"{row['question']}\n{row['thinking']}\n{row['answer']}\n"
        yield trace
        reasoning_bytes -= len(trace.encode())
        if reasoning_bytes <= 0:
            break


def train(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A BPE over `texts` with room left for the last four ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in PATTERNS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_IDS),
        special_tokens=list(FIRST_IDS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,  # no ids spent on ruler lines
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size - len(LAST_IDS):
        raise ValueError(
            f"too little text: only {backend.get_vocab_size()} of {vocab_size} tokens found"
        )
    # Flags as in DeepSeek's file: these four are kept by a decoder that skips special tokens.
    backend.add_tokens([tokenizers.AddedToken(t, normalized=True, special=False) for t in LAST_IDS])
    return backend


def write(backend: tokenizers.Tokenizer, out: Path) -> None:
    """Writes both files, merges in the short form "a b" (a byte-level token holds no space)."""
    spec = json.loads(backend.to_str())
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": names.BOS,
        "eos_token": names.EOS,
        "pad_token": names.PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Parses the command line, trains, writes."""
    parser = argparse.ArgumentParser(description="Train the small model's tokenizer.")
    parser.add_argument("--text", type=Path, required=True, help="corpus file (.txt, .txt.xz)")
    parser.add_argument("--text-mb", type=float, default=64, help="how much of its front to use")
    parser.add_argument("--reasoning", type=Path, help="question/thinking/answer rows (.jsonl.xz)")
    parser.add_argument("--reasoning-mb", type=float, default=1.5)
    parser.add_argument("--vocab-size", type=int, default=6144, help="special tokens included")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory")
    args = parser.parse_args()
    start = time.perf_counter()
    texts = sample(args.text, int(args.text_mb * 1e6), args.reasoning, int(args.reasoning_mb * 1e6))
    write(train(texts, args.vocab_size), args.out)
    size = (args.out / "tokenizer.json").stat().st_size
    seconds = time.perf_counter() - start
    print(
        f"{args.out / 'tokenizer.json'}: {args.vocab_size} tokens, {size:,} bytes, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
