"""What `dskjax generate` asks of `generate` for a text: where it ends, and whether it thinks."""

from typing import Any

import pytest

import dskjax as library
from dskjax.commands import generate as command
from dskjax.decode import Generation, SamplingParams
from dskjax.tokenizer import END_THINK, THINK
from tests.chat_families import family

CFG = library.preset("tiny-v3")


def asked(monkeypatch, name: str, text: str, new: list[int], **options) -> dict[str, Any]:
    """The arguments for a continuation of `text` that brings the ids `new`, and what is shown."""
    found: dict[str, Any] = {"shown": ""}

    def fake(params, cfg, prompts, *, on_tokens, **rest):
        on_tokens(0, new)
        found.update(rest, cfg=cfg, prompts=prompts)
        return Generation([new], ["stop"], [], 0, 0.0, 0.0)

    def write(piece: str) -> None:
        found["shown"] += piece

    monkeypatch.setattr(command, "generate", fake)
    tokenizer = family(name)
    sampling = SamplingParams.make(1, temperature=0.0)
    ids = tokenizer.encode(text)
    command.continue_text({}, CFG, tokenizer, ids, write, sampling=sampling, **options)
    return found


def test_the_ends_of_model_and_tokenizer_end_it(monkeypatch):
    kimi = family("kimi_k2")
    new = [*kimi.encode("ok"), kimi.eos_ids[1]]
    found = asked(monkeypatch, "kimi_k2", "a", new, max_tokens=5)
    assert found["shown"] == "ok" and found["max_tokens"] == 5
    assert set(found["cfg"].eos_token_id) == {*CFG.eos_token_id, *kimi.eos_ids}


@pytest.mark.parametrize(
    ("name", "text", "inside"),
    [
        ("deepseek_r1", f"a{THINK}\n", True),
        ("deepseek_v31", f"{THINK}a{END_THINK}", False),
        ("deepseek_v3", THINK, False),
    ],
)
def test_the_phase_of_the_prompt_is_handed_on(monkeypatch, name, text, inside):
    found = asked(monkeypatch, name, text, [5])
    assert found["thinking"] == [inside]
    think, tokenizer = found["think"], family(name)
    assert (think.open, think.close) == (tokenizer.think_id, tokenizer.end_think_id)
