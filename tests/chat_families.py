"""Small tokenizers with the files, special tokens and chat formats of the model families.

The templates in `chat_templates/` write the same text as those that the checkpoints ship.
"""

import base64
import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from dskjax.byte_alphabet import unspell
from dskjax.tokenizer import END_THINK, THINK, Tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
TINY = Path(__file__).parents[1] / "examples" / "tiny-deepseek"
CORPUS = (
    "The quick brown fox jumps over the lazy dogs, and HTTPServer doesn't care; it's 12345.\n"
    "def encode(text):\n    return [ids[piece] for piece in split(text)]\n"
    "你好，世界。今天天气很好，我们去公园散步吧。今天的天气真的很好。 naïve café 😀\n"
)
KIMI = {  # place after the vocabulary -> special token
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
KIMI_THINKING = {**KIMI, 22: THINK, 23: END_THINK}
PLAIN_TEXT = {THINK, END_THINK, "<|tool_calls_section_begin|>"}  # not marked as special


@functools.cache
def corpus_tokens() -> list[bytes]:
    """A vocabulary of 256 bytes and what byte pairs of the corpus come to."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([CORPUS], trainer)
    vocabulary = model.get_vocab()
    return [unspell(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


def write_tiktoken(
    folder: Path, tokens: Sequence[bytes], names: Mapping[int, str] = KIMI, **config
) -> None:
    """`tiktoken.model`, its configuration, and Python code that fails if it is run."""
    lines = [b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    (folder / "tokenization_kimi.py").write_text("raise RuntimeError('this was run')\n")
    added = {
        str(len(tokens) + place): {"content": text, "special": text not in PLAIN_TEXT}
        for place, text in names.items()
    }
    given = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**given, **config}))


def write_deepseek(folder: Path, *, thinks: bool) -> None:
    """The small model's tokenizer; its tags are unnamed placeholders, as in V3, or not."""
    text = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    if not thinks:
        text = text.replace(END_THINK, "<｜place▁holder▁no▁799｜>")
        text = text.replace(THINK, "<｜place▁holder▁no▁798｜>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


WRITERS = {
    "deepseek_v2": functools.partial(write_deepseek, thinks=False),
    "deepseek_v3": functools.partial(write_deepseek, thinks=False),
    "deepseek_r1": functools.partial(write_deepseek, thinks=True),
    "deepseek_v31": functools.partial(write_deepseek, thinks=True),
    "kimi_k2": lambda folder: write_tiktoken(folder, corpus_tokens()),
    "kimi_k2_thinking": lambda folder: write_tiktoken(folder, corpus_tokens(), KIMI_THINKING),
}


@functools.cache
def family(name: str) -> Tokenizer:
    """The tokenizer of a family, with the template of that name."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        WRITERS[name](folder)
        template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return Tokenizer.load(folder)
