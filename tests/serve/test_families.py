"""From messages to reasoning and answer, with the prompts and the tags of every family."""

import pytest

from dskjax.tokenizer import END_THINK, EOS, THINK, USER, Tokenizer
from serve.http.prompt import PromptEncoder
from serve.plan import TokenEvent
from serve.request import FinishReason
from serve.text import AnswerText
from tests.chat_families import WRITERS, family
from tests.serve.text_fakes import options, request

ASK = [{"role": "user", "content": "1+1?"}]
ANSWERED = [
    *ASK,
    {"role": "assistant", "content": f"{THINK}\none\n{END_THINK}\n\n2"},
    {"role": "user", "content": "2+2?"},
]
BROKEN_OFF = [*ASK, {"role": "assistant", "content": f"{THINK}on"}, ANSWERED[2]]

# (family, thinking switch, what the model writes, reasoning, answer)
CASES = [
    ("deepseek_v2", None, " 2", "", " 2"),
    ("deepseek_v3", None, f"{THINK}x{END_THINK}2", "", f"{THINK}x{END_THINK}2"),  # no tokens there
    ("deepseek_r1", None, f"one\n{END_THINK}\n\n2", "one", "2"),
    ("deepseek_v31", None, "2", "", "2"),
    ("deepseek_v31", False, "2", "", "2"),
    ("deepseek_v31", True, f"one{END_THINK}2", "one", "2"),
    ("kimi_k2", None, "2", "", "2"),
    ("kimi_k2_thinking", None, f"{THINK} one {END_THINK} 2", " one ", " 2"),
    ("kimi_k2_thinking", None, f"{THINK}one 今天", "one 今天", ""),  # no room for an answer
]


def answer(tokenizer: Tokenizer, prompt: list[int], text: str):
    """The pieces of an answer, token by token, ended by each end token in turn."""
    encoder = PromptEncoder(tokenizer)
    opts = options(thinking=encoder.thinking(prompt), split_reasoning=encoder.splits_reasoning)
    for end in tokenizer.eos_ids:
        req = request(prompt=prompt)
        made = AnswerText(tokenizer, opts, req)
        ids = tokenizer.encode(text)
        pieces = [made.push(TokenEvent(req, [i])) for i in ids]
        pieces.append(made.push(TokenEvent(req, [end], FinishReason.STOP, stop_token=end)))
        assert pieces[-1] is not None and pieces[-1].stop_reason is None
        shown = [piece for piece in pieces if piece is not None]
        usage = pieces[-1].usage
        assert usage is not None and usage.completion_tokens == len(ids) + 1
        yield "".join(p.reasoning for p in shown), "".join(p.text for p in shown), usage


@pytest.mark.parametrize("messages", [ASK, ANSWERED, BROKEN_OFF], ids=["one", "two", "broken off"])
@pytest.mark.parametrize(("name", "thinking", "text", "reasoning", "content"), CASES)
def test_reasoning_and_answer(name, thinking, text, reasoning, content, messages):
    tokenizer = family(name)
    prompt = PromptEncoder(tokenizer).chat(messages, thinking)
    for *found, usage in answer(tokenizer, prompt, text):
        assert found == [reasoning, content]
        assert (usage.reasoning_tokens > 0) is bool(reasoning)


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_are_the_ids_of_the_rendered_text(name):
    tokenizer = family(name)
    plain = [*ASK, {"role": "assistant", "content": "2"}, ANSWERED[2]]
    text = tokenizer.apply_chat_template(plain)
    assert PromptEncoder(tokenizer).chat(plain, None) == tokenizer.encode(text)


@pytest.mark.parametrize("name", WRITERS)
def test_no_text_of_a_user_becomes_a_special_token(name):
    tokenizer = family(name)
    encoder = PromptEncoder(tokenizer)
    special = {tokenizer.token_id(text) for text in encoder.specials}
    assert {"[BOS]", "<|im_end|>"} < set(encoder.specials) or {EOS, USER} < set(encoder.specials)

    def marks(content: str) -> list[int]:
        ids = encoder.chat([{"role": "user", "content": content}], None)
        assert content in tokenizer.decode(ids)
        return [i for i in ids if i in special]

    assert marks("".join(encoder.specials)) == marks("a")


def test_a_switch_that_is_not_there_is_refused():
    for name in WRITERS:
        encoder = PromptEncoder(family(name))
        if name == "deepseek_v31":
            assert encoder.chat(ASK, True) != encoder.chat(ASK, False)
        else:
            with pytest.raises(ValueError, match="no thinking switch"):
                encoder.chat(ASK, True)
