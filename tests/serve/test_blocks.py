import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.blocks import BlockManager, Chain
from tests.serve.harness import assert_red

SIZE = 4


def hold(blocks: BlockManager, tokens, salt: str = "") -> list[int]:
    """Takes pages for all of `tokens`, shared ones first, and publishes what has a key."""
    chain = blocks.chain(salt)
    pages = blocks.match(tokens, salt, chain=chain)
    blocks.acquire(pages)
    pages = pages + blocks.allocate(-(-len(tokens) // SIZE) - len(pages))
    chain.extend(tokens, len(pages))
    for page, key in zip(pages, chain.keys, strict=False):
        blocks.publish(page, key)
    return pages


def store(blocks: BlockManager, tokens, salt: str = "") -> list[int]:
    pages = hold(blocks, tokens, salt)
    blocks.free(pages)
    return pages


def test_match_finds_the_longest_run_of_published_pages():
    blocks = BlockManager(8, SIZE)
    pages = store(blocks, range(12))
    assert blocks.match([*range(12), 99]) == pages
    assert blocks.match([*range(8), 77, 78, 79, 80, 81]) == pages[:2]
    assert blocks.match([5, *range(12)]) == []


def test_a_hit_leaves_the_last_token_and_the_tail():
    tokens = list(range(12))
    for tail, expected in ((0, 2), (3, 2), (4, 1), (7, 1), (8, 0), (50, 0)):
        blocks = BlockManager(8, SIZE, tail=tail)
        store(blocks, tokens)
        assert len(blocks.match(tokens)) == expected, tail


def test_limit_is_the_most_tokens_taken():
    blocks = BlockManager(8, SIZE)
    store(blocks, range(13))
    assert [len(blocks.match(range(13), limit=n)) for n in (0, 3, 4, 11, 12, 99)] == [
        0,
        0,
        1,
        2,
        3,
        3,
    ]


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_a_page_is_another_when_a_token_of_its_lookahead_differs(lookahead):
    blocks = BlockManager(16, SIZE, lookahead=lookahead)
    tokens = list(range(12))
    store(blocks, tokens)
    assert len(blocks.match(tokens)) == 2
    for ahead in range(4):
        other = tokens[: 4 + ahead] + [60 + ahead] + tokens[5 + ahead :]
        assert len(blocks.match(other)) == (0 if ahead < lookahead else 1), ahead


def test_a_page_whose_lookahead_is_unknown_has_no_key():
    chain = BlockManager(4, SIZE, lookahead=2).chain()
    chain.extend(range(9), 2)
    assert len(chain.keys) == 1
    chain.extend(range(10), 2)
    assert len(chain.keys) == 2


def test_keys_computed_piecewise_equal_those_computed_at_once():
    blocks = BlockManager(4, SIZE, lookahead=3)
    tokens = list(range(40))
    whole, pieces = blocks.chain("s"), blocks.chain("s")
    whole.extend(tokens, 9)
    for known in range(41):
        pieces.extend(tokens[:known], known)
    assert len(whole.keys) == 9 and pieces.keys == whole.keys


def test_each_page_is_hashed_once(monkeypatch):
    import serve.blocks

    calls = []
    digest = serve.blocks._digest
    monkeypatch.setattr(serve.blocks, "_digest", lambda data: calls.append(1) or digest(data))
    chain = BlockManager(4, SIZE).chain()
    for known in range(41):
        chain.extend(list(range(known)), known)
    assert len(calls) == 1 + 10


def test_salt_and_fingerprint_keep_name_spaces_apart():
    blocks = BlockManager(16, SIZE, fingerprint=b"a")
    store(blocks, range(9), "red")
    assert blocks.match(range(9), "red") and not blocks.match(range(9), "blue")
    keys = set()
    for fingerprint, salt in ((b"a", "b"), (b"ab", ""), (b"", "ab"), (b"a", ""), (b"", "")):
        chain = BlockManager(1, SIZE, fingerprint=fingerprint).chain(salt)
        chain.extend(range(4), 1)
        keys.add(chain.keys[0])
    assert len(keys) == 5


def test_private_pages_are_given_out_before_findable_ones_and_tails_before_heads():
    blocks = BlockManager(6, SIZE)
    old = store(blocks, range(9))  # two findable pages and a private one
    new = store(blocks, range(50, 62))
    assert blocks.cached == 5
    private = ({*range(6)} - {*old[:2], *new}).pop()
    order = [blocks.allocate(1)[0] for _ in range(6)]
    assert order == [private, old[1], old[0], new[2], new[1], new[0]]
    assert blocks.cached == blocks.available == 0


def test_a_hit_makes_pages_young_again():
    blocks = BlockManager(4, SIZE)
    old, new = store(blocks, range(8)), store(blocks, range(50, 58))
    found = blocks.match(range(9))
    blocks.acquire(found)
    blocks.free(found)
    assert [blocks.allocate(1)[0] for _ in range(4)] == [new[1], new[0], old[1], old[0]]


def test_shared_pages_stay_until_the_last_holder_lets_go():
    blocks = BlockManager(3, SIZE)
    pages = hold(blocks, range(8))
    shared = blocks.match(range(9))
    blocks.acquire(shared)
    assert blocks.sole(pages) == 0
    blocks.free(pages)
    assert blocks.available == 1 and blocks.sole(pages) == 2 and blocks.idle(pages) == 0
    blocks.free(shared)
    assert blocks.available == 3 and blocks.idle(pages) == 2


def test_equal_content_is_published_once():
    blocks = BlockManager(4, SIZE)
    first = hold(blocks, range(4))
    chain = blocks.chain()
    chain.extend(range(4), 1)
    second = blocks.allocate(1)
    assert blocks.publish(first[0], chain.keys[0])
    assert not blocks.publish(second[0], chain.keys[0])
    assert blocks.match(range(5)) == first
    blocks.check([first, second])


def test_forgotten_pages_are_never_found_again():
    blocks = BlockManager(4, SIZE)
    held = hold(blocks, range(8))
    blocks.forget(held)
    assert blocks.match(range(9)) == []
    blocks.check([held])
    blocks.free(held)
    free = store(blocks, range(8))
    blocks.forget(free[:1])
    assert blocks.match(range(9)) == [] and blocks.cached == 1
    blocks.check([])


def test_sizes_are_checked():
    for bad in (dict(num_pages=0), dict(page_size=0), dict(lookahead=-1), dict(tail=-1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BlockManager(**{"num_pages": 4, "page_size": 4, **bad})


class Machine(RuleBasedStateMachine):
    """Sequences come and go; the cache must only ever hand out pages with the right content."""

    def __init__(self):
        super().__init__()
        self.blocks = self.make()
        self.content: dict[int, tuple] = {}
        self.holders: list[list[int]] = []

    def make(self) -> BlockManager:
        return BlockManager(9, 2, lookahead=2, tail=1)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), salt=st.sampled_from("ab"))
    def come(self, tokens, salt):
        blocks, chain = self.blocks, self.blocks.chain(salt)
        found = blocks.match(tokens, chain=chain)
        assert len(found) * 2 <= max(len(tokens) - 1 - 1, 0)
        for at, page in enumerate(found):
            assert self.content[page] == (salt, *tokens[: 2 * at + 4]), "another page's content"
        needed = len(tokens) // 2 - len(found)
        if needed > blocks.available - blocks.idle(found):
            return
        blocks.acquire(found)
        pages = found + blocks.allocate(max(needed, 0))
        chain.extend(tokens, len(pages))
        for at, (page, key) in enumerate(zip(pages, chain.keys, strict=False)):
            if at >= len(found):
                self.content[page] = (salt, *tokens[: 2 * at + 4])
                blocks.publish(page, key)
        for page in pages[len(chain.keys) :]:
            self.content[page] = ("private",)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def go(self, data):
        self.blocks.free(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def spoil(self, data):
        pages = data.draw(st.sampled_from(self.holders))
        self.blocks.forget(pages)
        for page in pages:
            self.content[page] = ("spoiled",)

    @invariant()
    def balance(self):
        self.blocks.check(self.holders)
        held = {page for pages in self.holders for page in pages}
        assert self.blocks.available + len(held) == 9

    def teardown(self):
        for pages in self.holders:
            self.blocks.free(pages)
        self.blocks.check([])
        assert self.blocks.available == 9


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30)


def _blind(chain_extend):
    """A chain whose keys leave the lookahead out."""

    def extend(self, tokens, pages):
        ahead, self._lookahead = self._lookahead, 0
        chain_extend(self, tokens[: len(tokens) - ahead], pages)
        self._lookahead = ahead

    return extend


def _freed_forwards(self, pages):
    for page in pages:
        BlockManager.free(self, [page])


def _shared_free(self, pages):
    BlockManager.free(self, pages)
    for page in pages:
        if self._refs[page]:  # forgets that others hold it
            self._refs[page] = 0
            self._free[page] = None


def test_machine_sees_keys_without_lookahead(monkeypatch):
    monkeypatch.setattr(Chain, "extend", _blind(Chain.extend))
    assert_red(Machine, "another page's content")


def test_machine_sees_pages_freed_under_another_holder():
    class Broken(BlockManager):
        free = _shared_free

    broken = {"make": lambda self: Broken(9, 2, lookahead=2, tail=1)}
    assert_red(type("M", (Machine,), broken), ".")


def test_eviction_test_sees_pages_freed_forwards():
    blocks = BlockManager(4, SIZE)
    blocks.free = lambda pages: _freed_forwards(blocks, pages)
    pages = store(blocks, range(16))
    assert blocks.allocate(1)[0] == pages[0]  # a right manager would give out pages[3]
