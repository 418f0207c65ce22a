"""Stop strings found in a stream of characters: an Aho-Corasick automaton over all of them.

The match that counts is the one that is complete first; of several complete with the same
character, the longest. That depends on the text alone, not on how it comes in pieces, and nothing
has to be waited for: whatever could still become a match is a suffix of the text so far.
"""

import functools
from collections import deque
from collections.abc import Sequence

ROOT = 0


class StopMatcher:
    """The automaton; it has no state of its own, so that answers share it.

    A state is an integer, `ROOT` at the start: the longest suffix of the text that begins a stop
    string.

    Attributes:
        held: by state, how many of the text's last characters could still become a stop string.
        found: by state, the stop string that its character completed, or None.
        starts: first characters of the stop strings; at `ROOT`, text without them changes nothing.
    """

    def __init__(self, stops: Sequence[str]):
        self._children: list[dict[str, int]] = [{}]
        self.found: list[str | None] = [None]
        depth = [0]
        for stop in stops:
            state = ROOT
            for char in stop:
                following = self._children[state].get(char)
                if following is None:
                    following = self._children[state][char] = len(depth)
                    self._children.append({})
                    self.found.append(None)
                    depth.append(depth[state] + 1)
                state = following
            self.found[state] = stop
        self.starts = frozenset(self._children[ROOT])
        self._shorter = [ROOT] * len(depth)  # the state of the next shorter suffix
        self.held = depth
        waiting = deque(self._children[ROOT].values())
        while waiting:  # breadth first: shorter suffixes are finished before they are asked for
            state = waiting.popleft()
            for char, child in self._children[state].items():
                self._shorter[child] = self.step(self._shorter[state], char)
                waiting.append(child)
            shorter = self._shorter[state]
            self.found[state] = self.found[state] or self.found[shorter]
            if not self._children[state]:  # complete: only a shorter suffix can become another one
                self.held[state] = self.held[shorter]

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while (following := self._children[state].get(char)) is None:
            if state == ROOT:
                return ROOT
            state = self._shorter[state]
        return following


@functools.lru_cache(maxsize=64)
def stop_matcher(stops: tuple[str, ...]) -> StopMatcher:
    """A matcher for these strings; clients repeat theirs, so the last ones are kept."""
    return StopMatcher(stops)
