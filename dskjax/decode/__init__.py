"""Decoding: sampling, acceptance rules, MTP drafting, the one jitted step, and the offline loop.

Every way of producing tokens goes through here: the command line, on-policy data, evaluation and
serving call the same step.
"""

from dskjax.decode.acceptance import RULES, Rule
from dskjax.decode.generate import Generation, generate
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.stats import AcceptanceStats
from dskjax.decode.step import DecodeConfig, DecodeState, StepOutput, decode_step, prefill, start

__all__ = [
    "RULES",
    "AcceptanceStats",
    "DecodeConfig",
    "DecodeState",
    "Generation",
    "Rule",
    "SamplingParams",
    "StepOutput",
    "decode_step",
    "generate",
    "prefill",
    "start",
]
