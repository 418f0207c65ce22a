"""The answer in a generated text, and whether it is the right one.

What counts as the answer, by the first rule that applies:

    1. nothing, if the text began inside thinking and never left it (no `</think>`)
    2. only what follows the last `</think>` is looked at by the rules below
    3. the content of the last `\\boxed{...}`
    4. the first line after the last "Answer:" (any case, also "Final answer:", "**Answer**:")
    5. the text itself, if it is one word
    6. the last word with a digit in it, for prose around a number: "which makes 258 insects."
    7. the last line

Right is what equals the expected answer after both lost their outer blanks, quotes, `$`, `*` and
final full stop, upper case, thousands commas and trailing zeros of decimals. Values are not
computed: 4/8 is not 1/2, since "in its lowest terms" may have been the question.
"""

import re

from dskjax.tokenizer import END_THINK

_MARKED = re.compile(r"answer\s*(?:is)?\s*\**\s*:\s*\**\s*(?P<said>[^\n]*\S)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*{")
_OUTER = " \t\n\r\"'`$*"


def extract_answer(text: str, *, inside_thinking: bool = False) -> str | None:
    """The answer in a text, or None if there is none.

    Args:
        text: what the model wrote, without its closing eos.
        inside_thinking: the prompt ended with an open `<think>`.
    """
    if inside_thinking and END_THINK not in text:
        return None
    text = text.rpartition(END_THINK)[2].strip()
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if marked := list(_MARKED.finditer(text)):
        return marked[-1]["said"].strip(_OUTER)
    words = text.split()
    if len(words) <= 1:
        return text or None
    numbers = [word for word in words if any(c.isdigit() for c in word)]
    if numbers:
        return numbers[-1].strip(_OUTER + ".,;:!?=()[]")
    return text.splitlines()[-1].strip()


def is_right(found: str | None, expected: str) -> bool:
    """Whether the extracted answer is the expected one."""
    return found is not None and _plain(found) == _plain(expected)


def _last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} that is closed; braces inside it are kept."""
    for opening in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for at in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[opening.end() : at].strip()
    return None


def _plain(answer: str) -> str:
    text = answer.strip(_OUTER).removesuffix(".").strip(_OUTER).casefold()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[-+]?\d*\.\d+", text):
        text = text.rstrip("0").removesuffix(".")
    return text.removeprefix("+")
