"""Answer text: decoding, stop strings, reasoning and usage against a naive oracle on all ids."""

import json
import re
from typing import NamedTuple

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dskjax.tokenizer import IncrementalDecoder, Tokenizer
from serve import stops
from serve.api import TextLogprob
from serve.plan import TokenEvent, TokenLogprob
from serve.request import FinishReason, SamplingOptions
from serve.text import AnswerText
from tests.serve.text_fakes import EOS, FOLDER, TINY, ids, joined, options, request

THINK, END_THINK = TINY.think_id, TINY.end_think_id
assert THINK is not None and END_THINK is not None

# Letters, newlines, tags, a special token, characters of several tokens, and bytes of no character.
POOL = [
    *ids("a") + ids("b") + ids("ab") + ids("ca") + ids(" <") + ids("th") + ids("\n") + ids("\n\n"),
    *ids("ï") + ids(" 😀") + ids("日"),
    *[THINK, END_THINK] * 3,
    EOS,
]
STOPS = ["a", "ab", "ba", "bab", "aabb", "\n", "\n\n", "\na", "ï", "😀", "\ufffd"]
STOPS += ["</think>", "nk>\n", "a<th", "</thi", "<｜end", "日a", "aïb", "b 😀"]


class Expected(NamedTuple):
    text: str
    reasoning: str
    tokens: list[int]
    stop: str | None
    reasoning_tokens: int


def groups(tokens) -> list[list[int]]:
    """Runs between tags, and the tags: run, tag, run, ..., run."""
    found: list[list[int]] = [[]]
    for token in tokens:
        if token in (THINK, END_THINK):
            found += [[token], []]
        else:
            found[-1].append(token)
    return found


def complete_text(tokens, opts, final, tok) -> str:
    """The plain text; without `final`, only what no further token changes."""
    skip = not opts.echo_special
    *earlier, last = groups(tokens) if opts.split_reasoning else [tokens]
    decoder = IncrementalDecoder(tok, skip_special=skip)
    text = "".join(tok.decode(group, skip_special=skip) for group in earlier)
    return text + decoder.push(*last) + (decoder.finish() if final else "")


def first_match(tokens, opts, tok):
    """(stop string, where it begins, tokens up to its last character): the first complete one."""
    lengths = [len(complete_text(tokens[:k], opts, False, tok)) for k in range(len(tokens) + 1)]
    text = complete_text(tokens, opts, True, tok)
    for end in range(1, len(text) + 1):
        count = next((k for k, n in enumerate(lengths) if n >= end), len(tokens))
        for stop in sorted(opts.stop.stop, key=len, reverse=True):
            if text[:end].endswith(stop) and count > opts.stop.min_tokens:
                return stop, end - len(stop), count
    return None, len(text), len(tokens)


def split(tokens, opts, cut, tok) -> tuple[str, str]:
    """Content and reasoning of the first `cut` characters of the plain text."""
    runs = [[opts.thinking, "", False]]  # inside, text, closed by </think>
    trim = [1 if opts.thinking else 0]
    left = cut
    for group in groups(tokens):
        text = tok.decode(group, skip_special=not opts.echo_special)
        if group in ([THINK], [END_THINK]):
            if len(text) > left:
                break
            runs[-1][2] = group == [END_THINK]
            runs.append([group == [THINK], "", False])
            trim.append(1 if group == [THINK] else 2)
        else:
            runs[-1][1] += text[:left]
            if len(text) > left:
                break
        left -= len(text)
    content, reasoning = "", ""
    for (inside, text, closed), lead in zip(runs, trim, strict=True):
        text = re.sub(rf"\A\n{{0,{lead}}}", "", text)
        if inside:
            reasoning += re.sub(r"\n\Z", "", text) if closed else text
        else:
            content += text
    return content, reasoning


def expected(tokens, opts, tok) -> Expected:
    stop, cut, count = first_match(tokens, opts, tok)
    kept = tokens[:count]
    inside, thought = opts.thinking, 0
    for token in kept:
        if token in (THINK, END_THINK):
            inside = token == THINK
        else:
            thought += inside
    if opts.split_reasoning:
        content, reasoning = split(tokens, opts, cut, tok)
    else:
        content, reasoning = complete_text(tokens, opts, True, tok)[:cut], ""
    return Expected(content, reasoning, kept, stop, thought)


def run(opts, batches, *, finish=FinishReason.LENGTH, finish_apart=False, tok=TINY):
    """All pieces that batches of ids become."""
    req = request()
    answer = AnswerText(tok, opts, req)
    events = [TokenEvent(req, batch) for batch in batches]
    if finish_apart:
        events.append(TokenEvent(req, [], finish))
    else:
        events[-1] = events[-1]._replace(finish=finish)
    pieces = []
    for event in events:
        if not answer.ended and (piece := answer.push(event)) is not None:
            pieces.append(piece)
    return pieces


def check(tokens, opts, cuts, finish_apart, tok=TINY):
    """The pieces of tokens cut into batches, joined, are what the oracle says of all tokens."""
    edges = [0, *sorted({c for c in cuts if 0 < c < len(tokens)}), len(tokens)]
    batches = [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    got = joined(run(opts, batches, finish_apart=finish_apart, tok=tok))
    want = expected(tokens, opts, tok)
    assert (got.text, got.reasoning) == (want.text, want.reasoning)
    assert got.token_ids == want.tokens
    assert got.finish is (FinishReason.LENGTH if want.stop is None else FinishReason.STOP)
    assert got.stop_reason == want.stop
    assert got.usage is not None
    assert got.usage.completion_tokens == len(want.tokens)
    assert got.usage.reasoning_tokens == want.reasoning_tokens


tokens_st = st.lists(st.sampled_from(POOL), min_size=1, max_size=14)
options_st = st.fixed_dictionaries(
    {
        "stop": st.lists(st.sampled_from(STOPS), max_size=3, unique=True).map(tuple),
        "min_tokens": st.integers(0, 4),
        "thinking": st.booleans(),
        "split_reasoning": st.booleans(),
        "echo_special": st.booleans(),
    }
)
cuts_st = st.lists(st.integers(1, 13), max_size=13)


def with_special_tags():
    """The small model's tokenizer, with tags that are special tokens and so left out of text."""
    spec = json.loads((FOLDER / "tokenizer.json").read_text())
    for added in spec["added_tokens"]:
        added["special"] |= added["content"] in ("<think>", "</think>")
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize("tok", [TINY, with_special_tags()], ids=["tags", "special-tags"])
@settings(max_examples=400)
@given(tokens=tokens_st, chosen=options_st, cuts=cuts_st, finish_apart=st.booleans())
@example(
    tokens=[*ids("\n"), *ids("a"), *ids("\n"), END_THINK, *ids("\n\n"), *ids("b")],
    chosen={"thinking": True, "split_reasoning": True, "stop": ("</think>",)},
    cuts=[2],
    finish_apart=False,
)
def test_any_split_into_batches_is_what_the_oracle_says(tokens, chosen, cuts, finish_apart, tok):
    check(tokens, options(**chosen), cuts, finish_apart, tok)


def test_suite_sees_an_automaton_that_forgets_shorter_suffixes(monkeypatch):
    tokens, opts = ids("a") + ids("ab"), options(stop=("ab",))
    check(tokens, opts, [1], False)
    stops.stop_matcher.cache_clear()
    # After "a", another "a" is taken for the end of every attempt.
    monkeypatch.setattr(
        stops.StopMatcher, "step", lambda self, state, char: self._children[state].get(char, 0)
    )
    with pytest.raises(AssertionError):
        check(tokens, opts, [1], False)
    stops.stop_matcher.cache_clear()


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple),
)
def test_text_is_held_back_only_as_far_as_it_could_become_a_stop_string(text, stop):
    matcher = stops.StopMatcher(stop)
    state = stops.ROOT
    for end, char in enumerate(text, 1):
        state = matcher.step(state, char)
        complete = [s for s in stop if text[:end].endswith(s)]
        assert matcher.found[state] == max(complete, key=len, default=None)
        prefixes = {s[:k] for s in stop for k in range(len(s))}
        longest = max(len(p) for p in prefixes if text[:end].endswith(p))
        assert matcher.held[state] == longest


# ------------------------------------------------------------------ by hand


def test_text_comes_as_soon_as_it_cannot_become_a_stop_string():
    pieces = run(options(stop=("abc",)), [ids("x"), ids("a"), ids("b"), ids("d"), ids("e")])
    assert [p.text for p in pieces] == ["x", "", "", "abd", "e"]
    assert [len(p.token_ids) for p in pieces] == [1] * 5  # ids come at once


def test_a_character_over_several_tokens_is_never_split():
    emoji = ids("😀")
    assert len(emoji) > 1
    pieces = run(options(), [[i] for i in emoji + ids("!")])
    assert [p.text for p in pieces] == [*[""] * (len(emoji) - 1), "😀", "!"]
    assert joined(run(options(), [emoji[:-1]])).text == "\ufffd"


def test_r1_format_is_split_without_its_newlines():
    text = "\nfirst\n\nsecond\n</think>\n\n# Title\n\nbody\n"
    assert END_THINK in ids(text)
    got = joined(run(options(thinking=True, split_reasoning=True), [ids(text)]))
    assert (got.reasoning, got.text) == ("first\n\nsecond", "# Title\n\nbody\n")
    plain = joined(run(options(thinking=True), [ids(text)]))
    assert (plain.reasoning, plain.text) == ("", text)
    assert got.usage == plain.usage and got.usage is not None and got.usage.reasoning_tokens > 0


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (False, "<think>\na\n</think>\n\nb", "a", "b"),
        (False, "<think>\n\n</think>\n\nb", "", "b"),  # an empty thought
        (True, "</think>b", "", "b"),
        (True, "\n\na\n\n</think>\n\n\nb", "\na\n", "\nb"),  # more newlines are the model's
        (True, "a\n</think>", "a", ""),
        (True, "a\n", "a\n", ""),  # cut off: the newline may be the text's
        (False, "\n\nb\n", "", "\n\nb\n"),
        (False, "b</think>c", "", "bc"),  # a stray tag
        (True, "a</think>b<think>c</think>d", "ac", "bd"),
    ],
)
def test_reasoning_sections(thinking, text, reasoning, content):
    for stop in ((), ("never",)):
        opts = options(thinking=thinking, split_reasoning=True, stop=stop)
        for batches in ([ids(text)], [[i] for i in ids(text)]):
            got = joined(run(opts, batches))
            assert (got.reasoning, got.text) == (reasoning, content)


def test_a_stop_string_ends_reasoning_too():
    opts = options(thinking=True, split_reasoning=True, stop=("stop",))
    got = joined(run(opts, [ids("one\nstop two"), ids("</think>three")]))
    assert (got.reasoning, got.text) == ("one\n", "")
    assert (got.finish, got.stop_reason) == (FinishReason.STOP, "stop")


@pytest.mark.parametrize("split_reasoning", [False, True])
def test_the_end_tag_as_a_stop_string(split_reasoning):
    opts = options(thinking=True, split_reasoning=split_reasoning, stop=("</think>",))
    got = joined(run(opts, [ids("why"), [END_THINK, *ids("so")]]))
    assert got.text + got.reasoning == "why"
    assert got.stop_reason == "</think>" and got.token_ids[-1] == END_THINK


def test_the_first_complete_stop_string_wins_and_then_the_longest():
    assert joined(run(options(stop=("abcd", "bc")), [ids("xabcd")])).stop_reason == "bc"
    assert joined(run(options(stop=("c", "abc", "bc")), [ids("xabcd")])).stop_reason == "abc"


def test_tokens_after_a_stop_string_do_not_exist():
    a, b, c = ids("a")[0], ids("b")[0], ids("c")[0]
    entries = [TokenLogprob(-float(k), []) for k in range(4)]
    req = request()
    answer = AnswerText(TINY, options(stop=("ab",), sampling=SamplingOptions(logprobs=0)), req)
    piece = answer.push(TokenEvent(req, [c, a, b, EOS], FinishReason.STOP, entries, EOS))
    assert piece is not None and answer.ended
    assert (piece.text, piece.token_ids, piece.stop_reason) == ("c", [c, a, b], "ab")
    assert [entry.chosen.logprob for entry in piece.logprobs or ()] == [0, -1, -2]
    assert piece.usage is not None and piece.usage.completion_tokens == 3


def test_min_tokens_lets_a_stop_string_pass():
    a = ids("a")[0]
    for least, count in ((0, 1), (1, 2), (3, 4)):
        got = joined(run(options(stop=("a",), min_tokens=least), [[a] * 6]))
        assert got.text == "a" * (count - 1) and len(got.token_ids) == count


@pytest.mark.parametrize(
    ("token", "opts", "text", "reason"),
    [
        (EOS, options(), "a", None),
        (EOS, options(echo_special=True), "a" + TINY.decode([EOS]), None),
        (ids("b")[0], options(stop_token_ids=(ids("b")[0],)), "a", ids("b")[0]),
        (ids("b")[0], options(stop_token_ids=(ids("b")[0],), echo_special=True), "a", ids("b")[0]),
        (EOS, options(stop_token_ids=(EOS,), ignore_eos=True), "a", EOS),
    ],
)
def test_stop_token(token, opts, text, reason):
    req = request()
    tokens = [*ids("a"), token]
    event = TokenEvent(req, tokens, FinishReason.STOP, stop_token=token)
    piece = AnswerText(TINY, opts, req).push(event)
    assert piece is not None and piece.usage is not None
    assert (piece.text, piece.stop_reason, piece.token_ids) == (text, reason, tokens)
    assert piece.usage.completion_tokens == 2


def test_logprobs_have_text_and_bytes_of_every_token():
    emoji = ids("😀")
    req = request()
    answer = AnswerText(TINY, options(sampling=SamplingOptions(logprobs=2)), req)
    only_the_models = TINY.vocab_size + 5
    tops = [(EOS, -0.5), (only_the_models, -0.7), (4, -0.9)]
    piece = answer.push(TokenEvent(req, [emoji[0]], logprobs=[TokenLogprob(-0.25, tops)]))
    assert piece is not None and piece.text == "" and piece.logprobs is not None
    (entry,) = piece.logprobs
    raw = TINY.token_bytes(emoji[0])
    assert entry.chosen == TextLogprob(raw.decode("utf-8", "replace"), list(raw), -0.25)
    eos = TINY.decode([EOS])
    assert entry.top == [TextLogprob(eos, list(eos.encode()), -0.5), TextLogprob("", [], -0.7)]


def test_usage_has_the_engines_counters():
    req = request(prompt=range(7))
    req.hit, req.drafted, req.accepted = 4, 9, 5
    answer = AnswerText(TINY, options(), req, lossless=False, synthetic=True)
    piece = answer.push(TokenEvent(req, [3, 4], FinishReason.ABORT))
    assert piece is not None and piece.usage is not None
    usage = piece.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (7, 2, 4)
    assert (usage.drafted, usage.accepted) == (9, 5)
    assert not usage.lossless and usage.synthetic


def test_events_that_bring_nothing_and_errors():
    req = request()
    answer = AnswerText(TINY, options(stop=("ab",)), req)
    assert answer.push(TokenEvent(req, [])) is None
    piece = answer.push(TokenEvent(req, ids("a")))
    assert piece is not None and piece.text == ""
    with pytest.raises(ValueError, match=str(TINY.vocab_size)):
        answer.push(TokenEvent(req, [TINY.vocab_size]))
    last = answer.end(FinishReason.ERROR, "broken")
    assert (last.text, last.finish, last.message) == ("a", FinishReason.ERROR, "broken")
    assert last.usage is not None and last.usage.completion_tokens == 1


def test_the_engines_message_is_handed_on():
    req = request()
    event = TokenEvent(req, [], FinishReason.ERROR, message="device lost")
    piece = AnswerText(TINY, options(), req).push(event)
    assert piece is not None
    assert (piece.finish, piece.message) == (FinishReason.ERROR, "device lost")
