"""Any sequence of commands, between any two turns of an engine: right tokens, nothing left over."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from serve.engine_api import Held, Refused, Reserved, Role
from serve.request import FinishReason
from tests.serve.engine_bench import EngineBench, part, ticket
from tests.serve.fake import continuation
from tests.serve.harness import EOS, assert_red, make_request, prompt


class Commands(RuleBasedStateMachine):
    """One engine in every role at once: the contract of a handle does not depend on the role.

    `stage` says where the coordinator believes each request to be; the engine may be further.
    """

    def __init__(self):
        super().__init__()
        self.bench = self.make()
        self.stage: dict[str, str] = {}
        self.answers: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.seen: dict[str, int] = {}  # events of a request before the command that ended it
        self.hits: dict[str, int] = {}
        self.at = 0

    def make(self) -> EngineBench:
        return EngineBench(Role.DECODE, drafts=2, num_pages=24, num_slots=3)

    def new(self, length: int, first: int, max_tokens: int):
        id = f"r{len(self.stage)}#0"
        tokens = prompt(length, first)
        request = make_request(id, tokens, max_tokens)
        self.prompts[id] = tokens
        self.answers[id] = continuation(tokens, request.stop, EOS)[0]
        return id, request

    def ids(self, *stages: str) -> list[str]:
        return [id for id, stage in self.stage.items() if stage in stages]

    sizes = dict(length=st.integers(1, 40), first=st.integers(0, 3), max_tokens=st.integers(1, 12))

    @rule(**sizes)
    def submit(self, length, first, max_tokens):
        id, request = self.new(length, first, max_tokens)
        self.bench.engine.submit(request)
        self.stage[id] = "decoding"

    @rule(**sizes)
    def submit_prefill(self, length, first, max_tokens):
        id, request = self.new(length, first, max_tokens)
        request.prefill_only = True
        self.bench.engine.submit_prefill(request, ticket(id[:-2], length))
        self.stage[id] = "prefilling"

    @rule(**sizes)
    def reserve(self, length, first, max_tokens):
        id, request = self.new(length, first, max_tokens)
        if len(self.answers[id]) > 1:  # else the prefill would have ended it
            self.bench.engine.reserve(request)
            self.stage[id] = "reserving"

    @precondition(lambda self: self.ids("reserved"))
    @rule(data=st.data())
    def deliver(self, data):
        id = data.draw(st.sampled_from(self.ids("reserved")))
        tokens, skip = self.prompts[id], self.hits[id]
        if skip < len(tokens):
            sent = ticket(id[:-2], len(tokens), skip)
            known = [*tokens, self.answers[id][0]]
            self.bench.engine.deliver(sent, part(known, sent.pages))
        self.stage[id] = "delivered"

    @precondition(lambda self: self.ids("delivered"))
    @rule(data=st.data())
    def activate(self, data):
        id = data.draw(st.sampled_from(self.ids("delivered")))
        self.bench.engine.activate(id, self.answers[id][:1])
        self.stage[id] = "activated"

    @precondition(lambda self: self.ids("prefilling", "held", "reserving", "reserved", "delivered"))
    @rule(data=st.data(), failed=st.booleans())
    def release(self, data, failed):
        """In any state before it decodes; what was not delivered has failed."""
        stages = ("prefilling", "held", "reserving", "reserved", "delivered")
        id = data.draw(st.sampled_from(self.ids(*stages)))
        failed = failed or self.stage[id] in ("reserving", "reserved")
        self.bench.engine.release(id, failed)
        self.end(id)

    @precondition(lambda self: self.ids("decoding", "activated"))
    @rule(data=st.data(), abort=st.booleans())
    def end_early(self, data, abort):
        id = data.draw(st.sampled_from(self.ids("decoding", "activated")))
        if abort:
            self.bench.engine.abort(id)
        else:
            self.bench.engine.finish(id, FinishReason.STOP)
        self.end(id)

    @precondition(lambda self: self.stage)
    @rule(data=st.data())
    def command_too_late(self, data):
        """About a request that ended, or that nobody ever heard of."""
        id = data.draw(st.sampled_from([*self.ids("over"), "nobody#0"]))
        engine = self.bench.engine
        engine.abort(id)
        engine.release(id, True)
        engine.finish(id, FinishReason.STOP)
        engine.activate(id, [1])
        engine.deliver(ticket(id[:-2], 8), part([1] * 9, (0, 2)))

    @rule(times=st.integers(1, 4))
    def turn(self, times):
        self.bench.turn(times)
        self.look()

    def end(self, id: str) -> None:
        """What was posted by now may be handled later; nothing new follows the next turn."""
        self.bench.engine._obey()
        self.bench.engine._tell()
        self.stage[id], self.seen[id] = "over", len(self.bench.of(id))

    def look(self) -> None:
        """Takes the new events in, as a coordinator would."""
        events, self.at = self.bench.events[self.at :], len(self.bench.events)
        for event in events:
            if isinstance(event, Reserved) and self.stage[event.request_id] == "reserving":
                self.stage[event.request_id] = "reserved"
                self.hits[event.request_id] = event.hit_tokens
            elif isinstance(event, Refused) and self.stage[event.request_id] == "reserving":
                self.stage[event.request_id] = "over"
            elif isinstance(event, Held):
                id = event.request_id
                assert event.tokens == self.answers[id][:1]
                assert (event.finish is not None) == (len(self.answers[id]) == 1)
                if self.stage[id] == "prefilling":
                    self.stage[id] = "over" if event.finish else "held"
        for id, stage in self.stage.items():
            told = self.bench.of(id)
            skipped = 1 if stage == "activated" else 0
            said = [token for event in told for token in event.tokens]
            if stage != "over":
                whole = self.answers[id][skipped:]
                assert said == whole[: len(said)], (id, said, whole)
            if id in self.seen:
                assert len(told) == self.seen[id], f"{id}: an event after its end"
            if stage in ("decoding", "activated") and told and told[-1].finish is not None:
                assert said == self.answers[id][skipped:] and told[-1].finish is not (
                    FinishReason.ERROR
                )
                self.stage[id] = "over"

    def teardown(self):
        """Whatever is left comes to its end, and everything is given back."""
        self.look()
        for id in self.ids("prefilling", "held", "reserving", "reserved", "delivered"):
            self.bench.engine.release(id, True)
            self.end(id)
        self.bench.drain()
        self.look()
        assert not self.ids("decoding", "activated")
        self.bench.check_drained()


def test_any_sequence_of_commands_is_served_right():
    reached = set()

    class Watched(Commands):
        def look(self):
            super().look()
            reached.update(self.stage.values())

    run_state_machine_as_test(Watched)
    # Otherwise it proves little:
    assert reached >= {"decoding", "held", "reserved", "delivered", "activated", "over"}


def test_the_machine_sees_pages_that_are_lost():
    class Lost(Commands):
        def make(self):
            bench = super().make()
            free = bench.blocks.free
            bench.blocks.free = lambda pages: free(pages[1:])
            return bench

    assert_red(Lost, "pages are lost")


def test_the_machine_sees_an_abort_that_is_forgotten():
    class Forgotten(Commands):
        def make(self):
            bench = super().make()
            bench.scheduler.abort = lambda request_id, spoiled=False: None
            return bench

    assert_red(Forgotten, "an event after its end")
