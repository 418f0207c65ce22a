"""What became of one request: when its pieces came, how many tokens it had, what went wrong."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request, seen from outside. Times are seconds of one clock.

    Attributes:
        due: when it should have been sent; waiting for the server is counted from here, so that a
            client that falls behind does not hide a slow server.
        sent: when it was sent.
        pieces: when each piece of the answer came: an event with text, or with the end.
        text: reasoning and answer.
        finish: reason of the end.
        prompt_tokens, cached_tokens, completion_tokens: the server's count.
        drafted, accepted: drafts, where the server tells.
        lossless: the acceptance rule leaves the distribution unchanged; None: not told.
        synthetic: acceptance was simulated, the text means nothing.
        error: what kind of failure ended it; None is none.
        message: what the server or the connection said about it.
    """

    due: float
    sent: float
    pieces: Sequence[float] = ()
    text: str = ""
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted: int | None = None
    accepted: int | None = None
    lossless: bool | None = None
    synthetic: bool = False
    error: str | None = None
    message: str = ""

    @property
    def ok(self) -> bool:
        """It came to its end."""
        return self.error is None

    @property
    def ttft(self) -> float:
        """Seconds to the first piece."""
        return self.pieces[0] - self.due

    @property
    def e2e(self) -> float:
        """Seconds to the last piece."""
        return self.pieces[-1] - self.due

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for an answer of one token."""
        if self.completion_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces; a step that accepts drafts brings several tokens in a piece."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]
