"""Decoding: sampling, acceptance rules, MTP drafting, the one jitted step, and the offline loop.

Every way of producing tokens goes through here: the command line, on-policy data, evaluation and
serving call the same step.
"""

from dskjax.decode.acceptance import RULES, Rule
from dskjax.decode.generate import Generation, generate
from dskjax.decode.rows import DecodeRows, PrefillRows, StepOutput
from dskjax.decode.rules import RuleOptions, ThinkIds
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.slots import Slots
from dskjax.decode.stats import AcceptanceStats
from dskjax.decode.step import DecodeConfig, step

__all__ = [
    "RULES",
    "AcceptanceStats",
    "DecodeConfig",
    "DecodeRows",
    "Generation",
    "PrefillRows",
    "Rule",
    "RuleOptions",
    "SamplingParams",
    "Slots",
    "StepOutput",
    "ThinkIds",
    "generate",
    "step",
]
