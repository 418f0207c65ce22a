"""How good a model is: bits per byte of held-out text, and right answers to questions."""

from dskjax.evaluation.answers import extract_answer, is_right
from dskjax.evaluation.intervals import bootstrap, wilson
from dskjax.evaluation.kinds import documents_by_kind
from dskjax.evaluation.logprobs import token_logprobs
from dskjax.evaluation.questions import ask, make_prompts, read_questions
from dskjax.evaluation.text import score_text

__all__ = [
    "ask",
    "bootstrap",
    "documents_by_kind",
    "extract_answer",
    "is_right",
    "make_prompts",
    "read_questions",
    "score_text",
    "token_logprobs",
    "wilson",
]
