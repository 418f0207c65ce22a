"""`dskjax demo`: the small model of this repository answers, with and without MTP speculation.

Loads `examples/tiny-deepseek`, continues three built-in prompts greedily with 0 to 3 drafts a step,
checks that the text is the same every time, and prints and plots speed and acceptance.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from dskjax.checkpoint.hf import load_hf
from dskjax.config import ModelConfig
from dskjax.decode import Generation, SamplingParams, generate
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny-deepseek"
MAX_TOKENS = 64
DRAFTS = (0, 1, 2, 3)

PROMPTS = (
    'import os\n\n\ndef read_config(path):\n    """Read the configuration file',
    "He walked slowly along the road, and when he came to the house",
)
CHAT = (
    "Your task is to convert a number between two different bases.\n\n"
    "Convert the base-2 number 1101 to base-10"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One speculation depth: the generation, and its seconds without compilation."""

    drafts: int
    result: Generation
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts over the seconds of prefill and decoding."""
        return sum(map(len, self.result.tokens)) / self.seconds


def run(
    console: Console, out: Path, *, model: Path = MODEL, max_tokens: int = MAX_TOKENS
) -> list[Row]:
    """Runs the demo and writes `out/demo.png`.

    Raises:
        RuntimeError: speculation changed the greedy text beyond near ties; a defect.
    """
    params, cfg = load_hf(model, dtype="float32")
    tokenizer = Tokenizer.load(model)
    texts = [
        *PROMPTS,
        tokenizer.apply_chat_template([{"role": "user", "content": CHAT}], thinking=True),
    ]
    prompts = [tokenizer.encode(text, bos=True) for text in PROMPTS]
    prompts.append(tokenizer.encode(texts[-1], bos=False))
    rows = []
    for drafts in DRAFTS:
        with console.status(f"compiling and decoding with {drafts} drafts a step"):
            rows.append(_measure(params, cfg, prompts, drafts, max_tokens))
        console.print(
            f"{drafts} drafts a step: {rows[-1].tokens_per_second:.0f} tokens/s", highlight=False
        )
    for index, text in enumerate(texts):
        console.rule(f"prompt {index + 1}", align="left")
        console.print(text, style="cyan", highlight=False, markup=False, end="")
        console.print(tokenizer.decode(rows[0].result.tokens[index]), highlight=False, markup=False)
    _check_same(rows)
    console.print(table(rows))
    console.print(
        "greedy text with speculation is identical to the text without it "
        f"({sum(row.result.ties for row in rows)} near ties)"
    )
    _sampled(console, params, cfg, tokenizer, prompts, max_tokens)
    console.print(f"plot: {plot(rows, out / 'demo.png')}", soft_wrap=True)
    return rows


def _measure(
    params: Params, cfg: ModelConfig, prompts: Sequence[list[int]], drafts: int, max_tokens: int
) -> Row:
    for attempt in range(2):  # the first compiles
        begun = time.perf_counter()
        result = generate(params, cfg, prompts, max_tokens=max_tokens, drafts=drafts, accept="strict")
        seconds = time.perf_counter() - begun
        if attempt:
            return Row(drafts, result, seconds)
    raise AssertionError


def _sampled(
    console: Console,
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_tokens: int,
) -> None:
    """The same prompts at a temperature; the rejection rule keeps the model's distribution."""
    sampling = SamplingParams.make(len(prompts), temperature=0.7, top_p=0.95, seed=[1, 2, 3])
    with console.status("compiling and decoding with sampling"):
        result = generate(
            params,
            cfg,
            prompts,
            max_tokens=max_tokens,
            drafts=2,
            accept="rejection",
            sampling=sampling,
        )
    stats = result.stats
    console.rule("sampled", align="left")
    console.print(
        "temperature 0.7, top-p 0.95, rejection rule, 2 drafts a step: accepted/drafted "
        f"{stats.accepted_per_drafted:.3f}, mean accepted length {stats.mean_accepted_length:.2f}",
        highlight=False,
    )
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        tail = tokenizer.decode(prompt, skip_special=True).splitlines()[-1]
        text = tokenizer.decode(tokens, skip_special=True)
        console.print(f"... {tail}", style="cyan", highlight=False, markup=False, end="")
        console.print(text, highlight=False, markup=False)


def _check_same(rows: Sequence[Row]) -> None:
    for row in rows[1:]:
        if row.result.tokens != rows[0].result.tokens and not rows[0].result.ties:
            raise RuntimeError(
                f"{row.drafts} drafts a step changed the greedy text: please report this as a "
                "defect"
            )


def table(rows: Sequence[Row]) -> Table:
    """Speed and acceptance of each depth."""
    out = Table(
        title=f"greedy, {len(rows[0].result.tokens)} prompts in one batch, fp32 on this machine"
    )
    for name in (
        "drafts",
        "tokens/s",
        "speed-up",
        "steps",
        "accepted / drafted",
        "mean accepted length",
        "per position",
    ):
        out.add_column(name, justify="right")
    for row in rows:
        stats = row.result.stats
        out.add_row(
            str(row.drafts),
            f"{row.tokens_per_second:.0f}",
            f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}x",
            str(stats.steps),
            f"{stats.accepted_per_drafted:.3f}" if row.drafts else "-",
            f"{stats.mean_accepted_length:.2f}",
            " ".join(f"{rate:.2f}" for rate in stats.per_position) or "-",
        )
    return out


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Draws speed by depth and acceptance by position."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (speed, acceptance) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    bars = speed.bar([str(row.drafts) for row in rows], [row.tokens_per_second for row in rows])
    speed.bar_label(bars, fmt="%.0f")
    speed.set(xlabel="drafts a step", ylabel="tokens/s (all prompts)", title="speed")
    for row in rows[1:]:
        rates = row.result.stats.per_position
        style = {"marker": "o", "markersize": 12 - 2 * row.drafts}  # equal rates stay visible
        acceptance.plot(range(1, len(rates) + 1), rates, label=f"{row.drafts} drafts", **style)
    acceptance.set(
        xlabel="draft position", ylabel="P(accepted up to here)", ylim=(0, 1.05), title="acceptance"
    )
    acceptance.set_xticks(range(1, max(DRAFTS) + 1))
    acceptance.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    run(Console(), Path("runs") / "demo")
