"""Answer text sorted into content and reasoning, without the tags and the newlines around them.

R1 writes `<think>` newline, reasoning, newline, `</think>`, two newlines, content. So one newline
after `<think>`, one before `</think>` and up to two after it belong to the format and are left out;
all others are the model's.
"""

_AFTER_THINK = 1
_AFTER_END_THINK = 2


class Sections:
    """Collects pieces of text and says at each `take` what is new in either section.

    Args:
        thinking: the text begins inside a thinking section.
    """

    __slots__ = ("_inside", "_newline", "_reasoning", "_skip", "_text")

    def __init__(self, thinking: bool):
        self._inside = thinking
        self._skip = _AFTER_THINK if thinking else 0  # newlines that the format may still have here
        self._newline = False  # one is held back: it is left out if </think> follows
        self._text = ""
        self._reasoning = ""

    def add(self, text: str) -> None:
        """Text of the section that is open."""
        while self._skip and text:
            if text[0] != "\n":
                self._skip = 0
            else:
                text = text[1:]
                self._skip -= 1
        if not self._inside:
            self._text += text
        elif text:
            if self._newline:
                text = "\n" + text
            self._newline = text[-1] == "\n"
            self._reasoning += text[:-1] if self._newline else text

    def tag(self, opens: bool) -> None:
        """A `<think>` or a `</think>`; one that changes nothing is left out all the same."""
        if opens:
            self.flush()
        self._newline = False
        self._inside = opens
        self._skip = _AFTER_THINK if opens else _AFTER_END_THINK

    def flush(self) -> None:
        """Gives up a newline that was held back: the text ends here, without `</think>`."""
        if self._newline:
            self._reasoning += "\n"
            self._newline = False

    def take(self) -> tuple[str, str]:
        """Content and reasoning since the last call."""
        taken = self._text, self._reasoning
        self._text = self._reasoning = ""
        return taken
