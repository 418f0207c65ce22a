"""Every known way to get DeepSeek wrong that exists in this code base: the test that sees it,
proved by planting the mistake. `TABLE` is the one list; `python -m tests.model.test_pitfalls`
prints it.
"""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.config import ModelConfig, YarnConfig, yarn_mscale
from pallas_kernels.testing import assert_close
from tests.kernels import test_act_quant, test_matmul, test_router
from tests.model import test_forward, test_mla, test_moe, test_rope
from tests.model.common import Pages, oracle, ragged, run_forward_mtp, run_trunk, tiny
from tests.oracles import weights
from tests.tolerances import MODEL

TESTS = Path(__file__).parents[1]


# ------------------------------------------------------------------ 1-3, 5-7: layers and MTP inputs


def raw_rotary_rows(_):
    """Loads interleaved rotary rows as they are, and rotates them as halves."""
    t = tiny()
    params = jax.tree.map(jnp.asarray, weights.stacked(t.raw, t.hf, reorder=False))
    test_forward.check_trunk("tiny-v3", params)


def scale_without_mscale(monkeypatch):
    scale = property(lambda cfg: cfg.mla.qk_head_dim**-0.5)
    monkeypatch.setattr(ModelConfig, "softmax_scale", scale)
    test_rope.check_softmax_scale(*test_rope.GOLDEN_SCALES[0])


def scale_with_mscale_once(monkeypatch):
    def once(cfg):
        yarn = cfg.rope.yarn
        return cfg.mla.qk_head_dim**-0.5 * yarn_mscale(yarn.factor, yarn.mscale_all_dim)

    monkeypatch.setattr(ModelConfig, "softmax_scale", property(once))
    test_rope.check_softmax_scale(*test_rope.GOLDEN_SCALES[0])


def cos_and_sin_scaled(monkeypatch):
    factor = property(lambda yarn: yarn_mscale(yarn.factor, yarn.mscale))
    monkeypatch.setattr(YarnConfig, "attention_factor", factor)
    test_rope.check_tables(test_rope.V3)


def kv_b_in_blocks(_):
    test_mla.check("absorbed", "tiny-v3", test_mla.BUGS["kv_b split in blocks"])


def shared_experts_scaled(_):
    test_moe.check("tiny-v3", test_moe.BUGS["shared experts scaled"])


def hidden_before_embedding(_):
    """Swaps the halves of eh_proj: what concat([hidden, embedding]) would compute."""
    params = tiny().params
    modules = params["mtp_layers"]
    swapped = jnp.roll(modules["eh_proj"], tiny().cfg.hidden_size, axis=-1)
    test_forward.check_mtp_chain(params | {"mtp_layers": modules | {"eh_proj": swapped}})


def trunk_state_before_its_norm(_):
    test_forward.check_mtp_chain(hidden=lambda out: out.layers[-1])


def module_state_before_its_norm(_):
    """Depth 2 fed the state before shared_head.norm: only the norm's weight tells them apart."""
    norm = np.asarray(tiny().params["mtp_layers"]["norm"]["weight"][0])

    def change(depth, start, following, given):
        return following, given / norm if depth == 2 else given

    test_forward.check_mtp_rows(test_forward.CHUNKS, change=change)


# ------------------------------------------------------------------ 8, 9: slots of the MTP layer


class Module1:
    """The first MTP module of one sequence over the cache: rows of (hidden, following token)."""

    def __init__(self):
        t = tiny()
        self.ids = t.tokens[2].copy()
        out = run_trunk(t)
        self.hidden, self.want = np.asarray(out.hidden[2]), oracle()[2][3][0]
        self.pages = Pages.make(t.cfg)

    def run(self, start, following, hidden):
        """Rows from `start` on, written to their slots; returns their outputs."""
        t, n, rows = tiny(), len(following), test_forward.ROWS
        tokens, padded = np.zeros((3, 17), np.int32), np.full((rows, 128), np.nan, np.float32)
        tokens[2, start : start + n], padded[:n] = following, hidden
        batch = ragged(self.pages, tokens, [0, 0, start], [0, 0, n], rows, "absorbed")
        h, self.pages.cache = run_forward_mtp(t.cfg)(
            t.params, self.pages.cache, batch, jnp.asarray(padded), jnp.int32(0)
        )
        return np.asarray(h[:n])

    def true_rows(self, start, stop):
        """Rows with the trunk's states and the known tokens, against the oracle."""
        h = self.run(start, self.ids[start + 1 : stop + 1], self.hidden[start:stop])
        assert_close(h, self.want[start:stop], MODEL)
        return h


def check_draft_extend(first_row=6):
    """Drafting leaves rows of recycled states in slots 6 and 7; the next round writes them anew."""
    module = Module1()
    h = module.true_rows(0, 6)[-1:]
    for slot in (6, 7):
        h = module.run(slot, [int(module.ids[slot + 1]) ^ 1], h)
    module.true_rows(first_row, 9)


def test_draft_extend_overwrites_drafted_rows():
    check_draft_extend()


def check_prefix_hit(matched):
    """Slot 7 was written for another request, whose token 8 differs; `matched` rows are reused."""
    module = Module1()
    others = module.ids[1:9].copy()
    others[-1] ^= 1
    module.run(0, others, module.hidden[:8])
    module.true_rows(matched, 12)


def test_the_last_slot_of_a_matched_prefix_is_recomputed():
    check_prefix_hit(7)


def sampled_token_at_a_chunk_border(_):
    """At the end of a chunk the next prompt token is known; a sample in its place is wrong."""

    def change(depth, start, following, given):
        if start == 0:
            following = np.append(following[:-1], following[-1] ^ 1)
        return following, given

    test_forward.check_mtp_rows(test_forward.CHUNKS, change=change)


# ------------------------------------------------------------------ 4, 10, 14, 21, 23: the rest


def gate(name, **wrong):
    return lambda _: test_router.check(test_router._broken(**wrong), test_router.CASES[name])


def weight_of(bug):
    def plant(_):
        name, change = test_matmul.BUGS[bug]
        test_matmul.check(test_matmul._weight(change), test_matmul.CASES[name])

    return plant


def quantizer(bug):
    def plant(_):
        name, wrong = test_act_quant.BUGS[bug]
        test_act_quant.check(test_act_quant._broken(**wrong), test_act_quant.CASES[name])

    return plant


@dataclasses.dataclass(frozen=True)
class Pitfall:
    """A row of the table. `planted` makes the mistake and runs the check of `red`, or names a test
    elsewhere that does.
    """

    number: int
    mistake: str
    red: str
    planted: Callable | str


TRUNK = "model/test_forward.py::test_trunk_matches_oracle"
CHAIN = "model/test_forward.py::test_mtp_chain_matches_oracle"
PAGED_MTP = "model/test_forward.py::test_mtp_over_the_cache_equals_the_chain"
ROUTER = "kernels/test_router.py::test_matches_oracle"
GOLDEN_SCALE = "model/test_rope.py::test_golden_softmax_scale"
MOE = "model/test_moe.py::test_matches_oracle"
MATMUL = "kernels/test_matmul.py::test_matches_oracle"
PACKING = "kernels/test_quant.py::test_int4_golden_bytes"
NIBBLES = "kernels/test_quant.py::test_golden_bytes_see_another_nibble_order"
QUANTIZER = "kernels/test_act_quant.py::test_matches_oracle"
PREFIX_HIT = "model/test_pitfalls.py::test_the_last_slot_of_a_matched_prefix_is_recomputed"
ACCEPTANCE = "decode/test_acceptance.py::"
ENUMERATION = "decode/test_lossless.py::"
LOSSLESS = ENUMERATION + "test_rule_is_lossless_by_enumeration"
BUG_SEEN = ENUMERATION + "test_planted_bug_is_seen"
STATS = "decode/test_stats.py::"

TABLE = [
    Pitfall(1, "interleaved rotary rows rotated as halves", TRUNK, raw_rotary_rows),
    Pitfall(2, "softmax scale without mscale^2", GOLDEN_SCALE, scale_without_mscale),
    Pitfall(2, "softmax scale with mscale once", GOLDEN_SCALE, scale_with_mscale_once),
    Pitfall(
        2,
        "cos and sin scaled as well",
        "model/test_rope.py::test_cos_and_sin_are_not_scaled",
        cos_and_sin_scaled,
    ),
    Pitfall(
        3,
        "kv_b read as [all k | all v], not per head",
        "model/test_mla.py::test_matches_oracle",
        kv_b_in_blocks,
    ),
    Pitfall(4, "expert weights with the bias", ROUTER, gate("v3 groups", biased=True)),
    Pitfall(4, "dropped groups masked with 0.0", ROUTER, gate("negative bias", mask=0.0)),
    Pitfall(5, "shared experts scaled", MOE, shared_experts_scaled),
    Pitfall(6, "eh_proj fed [hidden | embedding]", CHAIN, hidden_before_embedding),
    Pitfall(7, "trunk state before model.norm into MTP", CHAIN, trunk_state_before_its_norm),
    Pitfall(7, "depth 2 fed a state before its norm", PAGED_MTP, module_state_before_its_norm),
    Pitfall(
        8,
        "draft-extend leaves recycled MTP rows in the cache",
        "model/test_pitfalls.py::test_draft_extend_overwrites_drafted_rows",
        lambda _: check_draft_extend(first_row=8),
    ),
    Pitfall(
        9,
        "a sample in place of the known token at a chunk's end",
        PAGED_MTP,
        sampled_token_at_a_chunk_border,
    ),
    Pitfall(9, "last MTP slot of a prefix hit reused", PREFIX_HIT, lambda _: check_prefix_hit(8)),
    Pitfall(10, "weight scales divide", MATMUL, weight_of("scales divide")),
    Pitfall(10, "no scale for a ragged block", MATMUL, weight_of("ragged row block forgotten")),
    Pitfall(12, "nibbles swapped, offset or halved", PACKING, NIBBLES),
    Pitfall(
        13,
        "cast to e4m3 without clipping",
        QUANTIZER,
        quantizer("ue8m0 to the nearest power, no clip"),
    ),
    Pitfall(14, "ue8m0 to the nearest", QUANTIZER, quantizer("ue8m0 to the nearest power")),
    Pitfall(14, "ue8m0 rounded down", QUANTIZER, quantizer("ue8m0 rounded down")),
    Pitfall(
        16,
        "q of verification is not the q drafts were drawn from",
        LOSSLESS,
        ENUMERATION + "test_wrong_q_temperature_is_seen",
    ),
    Pitfall(17, "bonus or residual from another law", LOSSLESS, BUG_SEEN),
    Pitfall(
        18,
        "tokens after an accepted eos kept",
        ACCEPTANCE + "test_truncate_at_stop",
        ACCEPTANCE + "test_truncate_at_stop",
    ),
    Pitfall(
        19,
        "acceptance without the name of its metric",
        STATS + "test_stats_name_each_metric",
        STATS + "test_stats_refuse_impossible_counts",
    ),
    Pitfall(
        21,
        "combine weights applied twice, or not",
        MOE,
        "model/test_moe.py::test_suite_sees_a_wrong_combine",
    ),
    Pitfall(
        23,
        "idle rows take part, but write to the cache",
        "model/test_forward.py::test_idle_rows_write_nothing",
        lambda _: test_forward.check_idle("absorbed", length=1),
    ),
    Pitfall(
        24,
        "think-token ids as constants",
        "test_tokenizer.py::test_special_ids_follow_the_file_not_constants",
        "test_tokenizer.py::test_special_ids_follow_the_file_not_constants",
    ),
    Pitfall(
        25,
        "tokens a second without saying whether in, out or both",
        "serve/bench/test_summary.py::test_summary",
        "serve/bench/test_summary.py::test_summary",
    ),
]
ABSENT = {
    11: "w4afp8 checkpoints are not loaded",
    15: "quantized weights are not split over tensor parallel ranks",
    20: "no EPLB yet",
    22: "no ragged_all_to_all yet",
}


def render() -> str:
    """The table in markdown."""
    head = ["| # | mistake | goes red | planted in |", "|---|---|---|---|"]
    here = "model/test_pitfalls.py::test_mistake_goes_red"
    rows = [
        f"| {p.number} | {p.mistake} | `{p.red}` | "
        f"`{p.planted if isinstance(p.planted, str) else here}` |"
        for p in TABLE
    ]
    return "\n".join([*head, *rows])


@pytest.mark.parametrize(
    "pitfall", [p for p in TABLE if callable(p.planted)], ids=lambda p: f"{p.number}-{p.mistake}"
)
def test_mistake_goes_red(pitfall, monkeypatch):
    with pytest.raises(AssertionError):
        pitfall.planted(monkeypatch)


def test_the_table_names_tests_that_exist():
    named = {p.red for p in TABLE} | {p.planted for p in TABLE if isinstance(p.planted, str)}
    for node in sorted(named):
        path, _, name = node.partition("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        assert name in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, node


def test_the_table_covers_the_list():
    numbers = [p.number for p in TABLE]
    assert numbers == sorted(numbers) and not set(numbers) & set(ABSENT)
    assert set(numbers) | set(ABSENT) == set(range(1, 26))
    assert len({p.mistake for p in TABLE}) == len(TABLE)
    assert render().count("\n") == len(TABLE) + 1


if __name__ == "__main__":
    print(render())
