"""Conversations of every family as exact text, the thinking switch, and the phase that follows."""

import json

import pytest

from dskjax.chat_template import ChatTemplate
from dskjax.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer
from tests.chat_families import KIMI, WRITERS, corpus_tokens, family, write_deepseek, write_tiktoken

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": f"{THINK}\none and\none{END_THINK}\n\n2"},
    {"role": "user", "content": "and 2+2?"},
]
"""The earlier answer is with its reasoning, as a client may send it back."""

UNFINISHED = [CHAT[1], {"role": "assistant", "content": f"{THINK}so far"}, CHAT[3]]
"""The earlier answer was broken off inside its reasoning."""

CALLS = [
    {"id": "functions.sum:0", "type": "function", "function": {"name": "sum", "arguments": "[1]"}},
    {"id": "functions.sum:1", "type": "function", "function": {"name": "sum", "arguments": "[2]"}},
]
TOOL_CHAT = [
    CHAT[1],
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "functions.sum:0", "content": "1"},
    {"role": "tool", "tool_call_id": "functions.sum:1", "content": "2"},
]
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "é<"}}]


def im(role: str, text: str, name: str | None = None) -> str:
    return f"<|im_{role}|>{name or role}<|im_middle|>{text}<|im_end|>"


ASK_KIMI = "<|im_assistant|>assistant<|im_middle|>"
OPENED = f"{BOS}Be brief.{USER}1+1?{ASSISTANT}"
RENDERED = {
    "deepseek_v2": f"{BOS}Be brief.\n\nUser: 1+1?\n\nAssistant: 2{EOS}User: and 2+2?\n\nAssistant:",
    "deepseek_v3": f"{OPENED}2{EOS}{USER}and 2+2?{ASSISTANT}",
    "deepseek_r1": f"{OPENED}\n\n2{EOS}{USER}and 2+2?{ASSISTANT}{THINK}\n",
    "deepseek_v31": f"{OPENED}{END_THINK}\n\n2{EOS}{USER}and 2+2?{ASSISTANT}{END_THINK}",
    "kimi_k2": im("system", "Be brief.")
    + im("user", "1+1?")
    + im("assistant", "2")
    + im("user", "and 2+2?")
    + ASK_KIMI,
    "kimi_k2_thinking": im("system", "Be brief.")
    + im("user", "1+1?")
    + im("assistant", f"{THINK}{END_THINK}2")
    + im("user", "and 2+2?")
    + ASK_KIMI,
}
KEEPS_CONTENT = {"deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k2_thinking"}


def conversation(name: str) -> list[dict[str, str]]:
    """CHAT, with the bare answer for templates that leave the content as it is."""
    answer = {"role": "assistant", "content": "2"}
    return [*CHAT[:2], answer, CHAT[3]] if name in KEEPS_CONTENT else CHAT


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("name", WRITERS)
def test_conversation(name):
    assert family(name).apply_chat_template(conversation(name)) == RENDERED[name]


@pytest.mark.parametrize("name", WRITERS)
def test_without_generation_prompt(name):
    text = family(name).apply_chat_template(conversation(name), add_generation_prompt=False)
    last = im("user", "and 2+2?") if name.startswith("kimi") else "and 2+2?"
    assert RENDERED[name].startswith(text)
    assert text.removesuffix("\n\n").endswith(last)  # V2 has two newlines after a turn


@pytest.mark.parametrize("name", WRITERS)
def test_ids_are_those_of_the_text_with_bos_at_most_once(name):
    tokenizer = family(name)
    text = tokenizer.apply_chat_template(conversation(name))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_id) == (0 if name.startswith("kimi") else 1)
    ends = [i for i in ids if i in tokenizer.eos_ids]
    assert len(ends) == (4 if name.startswith("kimi") else 1)


def test_kimi_without_a_system_message():
    user = [CHAT[1]]
    assert family("kimi_k2").apply_chat_template(user) == (
        im("system", "You are a helpful assistant") + im("user", "1+1?") + ASK_KIMI
    )
    assert family("kimi_k2_thinking").apply_chat_template([{**CHAT[1], "name": "bob"}]) == (
        im("system", "You are Kimi, an AI assistant created by Moonshot AI.")
        + im("user", "1+1?", "bob")
        + ASK_KIMI
    )


# ------------------------------------------------------------------ tools


def test_r1_tool_calls():
    calls = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sum\n```json\n[1]\n```"
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>sum\n```json\n[2]\n```"
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
    )
    results = (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    start = f"{BOS}{USER}1+1?{ASSISTANT}{calls}{results}"
    r1 = family("deepseek_r1")
    assert r1.apply_chat_template(TOOL_CHAT) == start
    later = [*TOOL_CHAT, CHAT[2], CHAT[3]]
    assert r1.apply_chat_template(later) == (f"{start}\n\n2{EOS}{USER}and 2+2?{ASSISTANT}{THINK}\n")


def test_v31_tool_calls():
    calls = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>sum<｜tool▁sep｜>[1]<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>sum<｜tool▁sep｜>[2]<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
    )
    results = (
        "<｜tool▁output▁begin｜>1<｜tool▁output▁end｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜>"
    )
    start = f"{BOS}{USER}1+1?{ASSISTANT}{END_THINK}{calls}{results}"
    v31 = family("deepseek_v31")
    assert v31.apply_chat_template(TOOL_CHAT, thinking=True) == start
    later = [*TOOL_CHAT, {"role": "assistant", "content": "3"}, CHAT[3]]
    assert v31.apply_chat_template(later, thinking=True) == (
        f"{start}3{EOS}{USER}and 2+2?{ASSISTANT}{THINK}"
    )


def test_kimi_tools_and_calls():
    declared = '[{"function":{"description":"é<","name":"sum"},"type":"function"}]'  # sorted
    head = im("system", "You are Kimi, an AI assistant created by Moonshot AI.")
    calls = (
        "<|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.sum:0<|tool_call_argument_begin|>[1]<|tool_call_end|>"
        "<|tool_call_begin|>functions.sum:1<|tool_call_argument_begin|>[2]<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    )
    start = im("system", declared, "tool_declare") + head + im("user", "1+1?")
    results = "".join(
        im("system", f"## Return of functions.sum:{i}\n{i + 1}", "tool") for i in range(2)
    )
    thinking = family("kimi_k2_thinking")
    # Reasoning is kept until an answer is given.
    assert thinking.apply_chat_template(TOOL_CHAT, tools=TOOLS) == (
        start + im("assistant", f"{THINK}hm{END_THINK}{calls}") + results + ASK_KIMI
    )
    later = [*TOOL_CHAT, {"role": "assistant", "content": "3", "reasoning_content": "so"}, CHAT[3]]
    assert thinking.apply_chat_template(later, tools=TOOLS) == (
        start
        + im("assistant", f"{THINK}{END_THINK}{calls}")
        + results
        + im("assistant", f"{THINK}{END_THINK}3")
        + im("user", "and 2+2?")
        + ASK_KIMI
    )
    wide = '[{"function": {"description": "é<", "name": "sum"}, "type": "function"}]'
    plain = family("kimi_k2").apply_chat_template([CHAT[1]], tools=TOOLS)
    assert plain.startswith(im("system", wide, "tool_declare"))


def test_only_moonshots_tools_are_sorted(tmp_path):
    write_deepseek(tmp_path, thinks=True)
    (tmp_path / "chat_template.jinja").write_text("{{ tools | tojson }}")
    text = Tokenizer.load(tmp_path).apply_chat_template(CHAT, tools=TOOLS)
    assert text.startswith('[{"type": "function", "function": {"name": "sum",')


# ------------------------------------------------------------------ thinking


def test_v31_switch():
    v31 = family("deepseek_v31")
    assert v31.supports_thinking
    text = RENDERED["deepseek_v31"]
    assert v31.apply_chat_template(CHAT, thinking=False) == text
    assert v31.apply_chat_template(CHAT, thinking=True) == text.removesuffix(END_THINK) + THINK


@pytest.mark.parametrize("name", sorted(WRITERS.keys() - {"deepseek_v31"}))
@pytest.mark.parametrize("thinking", [True, False])
def test_other_families_have_no_switch(name, thinking):
    tokenizer = family(name)
    assert not tokenizer.supports_thinking
    assert tokenizer.apply_chat_template(conversation(name), thinking=thinking) == RENDERED[name]


@pytest.mark.parametrize(
    ("template", "switches", "texts"),
    [
        ("{{ thinking }}", ["thinking"], ["", "True", "False"]),
        ("{{ enable_thinking }}", ["enable_thinking"], ["", "True", "False"]),
        (
            "{%- set enable_thinking = enable_thinking | default(true) %}{{ enable_thinking }}",
            ["enable_thinking"],
            ["True", "True", "False"],
        ),
        (
            "{% if thinking is defined and thinking is false %}off{% else %}on{% endif %}",
            ["thinking"],
            ["on", "on", "off"],
        ),
        ("{% set thinking = 1 %}{{ thinking }}", [], ["1", "1", "1"]),
        (
            "{{ enable_thinking }}{{ thinking }}",
            ["thinking", "enable_thinking"],
            ["", "TrueTrue", "FalseFalse"],
        ),
    ],
)
def test_switches_of_templates(template, switches, texts):
    made = ChatTemplate(template, source="x")
    assert made.switches == switches
    for thinking, text in zip((None, True, False), texts, strict=True):
        assert made.render(CHAT, thinking=thinking, tools=None, variables={}) == text


def test_a_switch_given_by_name_wins():
    made = ChatTemplate("{{ enable_thinking }}", source="x")
    given = {"enable_thinking": False}
    assert made.render(CHAT, thinking=True, tools=None, variables=given) == "False"


def phase(name: str, messages, thinking=None) -> bool:
    tokenizer = family(name)
    return tokenizer.is_thinking(
        tokenizer.encode(tokenizer.apply_chat_template(messages, thinking=thinking))
    )


@pytest.mark.parametrize("messages", [CHAT[:2], CHAT, UNFINISHED, [*TOOL_CHAT, CHAT[2], CHAT[3]]])
@pytest.mark.parametrize(
    ("name", "thinking", "inside"),
    [
        ("deepseek_v2", None, False),
        ("deepseek_v3", None, False),
        ("deepseek_r1", None, True),
        ("deepseek_v31", None, False),
        ("deepseek_v31", False, False),
        ("deepseek_v31", True, True),
        ("kimi_k2", None, False),
        ("kimi_k2_thinking", None, False),  # it writes the opening tag itself
    ],
)
def test_phase_after_the_prompt(name, thinking, inside, messages):
    if name in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        messages = [m for m in messages if isinstance(m["content"], str)]  # no tools there
    assert phase(name, messages, thinking) is inside


def test_phase_inside_an_answer():
    r1 = family("deepseek_r1")
    assert r1.think_id is not None and r1.end_think_id is not None
    end, ids = r1.eos_ids[0], r1.encode("a b")
    assert r1.is_thinking([r1.think_id, *ids])
    assert not r1.is_thinking([r1.think_id, *ids, r1.end_think_id, *ids])
    assert not r1.is_thinking([r1.think_id, *ids, end, *ids])  # broken off, another turn
    assert r1.is_thinking([end, r1.end_think_id, r1.think_id])
    assert not r1.is_thinking([])


def test_phase_of_a_model_without_tags():
    v3 = family("deepseek_v3")
    assert v3.think_id is None
    assert not v3.is_thinking(v3.encode(f"{THINK} a"))


# ------------------------------------------------------------------ no template


@pytest.mark.parametrize("file", ["encoding/encoding_dsv32.py", "encoding_k3.py"])
def test_python_encoders_are_named_and_not_run(tmp_path, file):
    write_deepseek(tmp_path, thinks=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise RuntimeError('this was run')")
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.supports_thinking
    message = rf"Python code \({file}\), which is not run here; put a chat_template\.jinja"
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(CHAT)
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert Tokenizer.load(tmp_path).apply_chat_template(CHAT) == "4"


# ------------------------------------------------------------------ ends


def test_every_end_token_ends(tmp_path):
    write_tiktoken(tmp_path, corpus_tokens(), {**KIMI, 9: "[EOT]"}, eos_token="<|im_end|>")
    base = len(corpus_tokens())
    assert Tokenizer.load(tmp_path).eos_ids == (base + 2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [base + 9]}))
    assert Tokenizer.load(tmp_path).eos_ids == (base + 2, base + 9)
