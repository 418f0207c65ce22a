"""The gates of DeepSeek-V2-Lite, V2 and V3, one token and one expert at a time."""

import numpy as np


def ranked(scores) -> list[int]:
    """Indices from the largest score to the smallest; of equal ones the lower index first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def gate_row(
    logits, bias, top_k, scoring_func, n_group, topk_group, norm_topk_prob, routed_scaling_factor
):
    """(weights, experts) of one token, best first.

    Scores keep the dtype of `logits`: float32 finds the ties that a float32 gate has.
    """
    if scoring_func == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        e = np.exp(logits - logits.max())
        scores = e / e.sum()
    choice = scores if bias is None else scores + bias
    allowed = list(range(len(scores)))
    if n_group > 1:
        size = len(scores) // n_group
        members = [range(g * size, (g + 1) * size) for g in range(n_group)]
        best = 1 if bias is None else 2  # V2: a group is as good as its best expert
        group_scores = [sum(sorted(choice[list(m)])[-best:]) for m in members]
        kept = ranked(group_scores)[:topk_group]
        inside = [e for g in sorted(kept) for e in members[g]]
        if bias is None:  # V2 sets the other scores to 0 and chooses among all
            scores = choice = np.where(np.isin(allowed, inside), scores, np.zeros_like(scores))
        else:
            allowed = inside
    experts = [allowed[i] for i in ranked([choice[e] for e in allowed])[:top_k]]
    weights = np.float64(scores)[experts]
    if norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return weights * routed_scaling_factor, experts


def gate(logits, bias, **settings):
    """(weights float64 [T, K], experts int32 [T, K])."""
    rows = [gate_row(row, bias, **settings) for row in np.asarray(logits)]
    return np.array([w for w, _ in rows]), np.array([e for _, e in rows], np.int32)
