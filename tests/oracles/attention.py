"""Latent attention over pages and over ragged rows, one query at a time, in NumPy float64.

Imports nothing of ours. Written from the definition: score = scale * (q . k + q_rope . k_rope)
over what the query may see, natural log-sum-exp; nothing seen gives out 0 and lse -inf.
"""

import numpy as np


def attend(scores, values):
    """(out [V], lse) of one query: scores [S], values [S, V]; S may be 0."""
    if len(scores) == 0:
        return np.zeros(values.shape[-1]), -np.inf
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum())


def decode(q_latent, q_rope, latent, rope, page_table, cached_lens, query_starts, scale):
    """Absorbed attention. latent [pages, page, C] and rope [pages, page, P] of one layer.

    Returns out [T, H, C] and lse [T, H]; only slots below a sequence's length are ever touched.
    """
    q_latent, q_rope = np.float64(q_latent), np.float64(q_rope)
    tokens, heads, width = q_latent.shape
    out, lse = np.zeros((tokens, heads, width)), np.full((tokens, heads), -np.inf)
    page = latent.shape[1]
    for b, length in enumerate(cached_lens):
        rows = range(int(query_starts[b]), int(query_starts[b + 1]))
        index = np.arange(length)
        pages, slots = page_table[b, index // page], index % page
        keys, rope_keys = np.float64(latent[pages, slots]), np.float64(rope[pages, slots])
        for i, t in enumerate(rows):
            seen = max(int(length) - len(rows) + i + 1, 0)
            for h in range(heads):
                scores = keys[:seen] @ q_latent[t, h] + rope_keys[:seen] @ q_rope[t, h]
                out[t, h], lse[t, h] = attend(scale * scores, keys[:seen])
    return out, lse


def prefill(q_nope, q_rope, k_nope, k_rope, v, query_seq, query_pos, key_seq, key_pos, scale):
    """Expanded attention over flat rows; a query sees its sequence's keys up to its position."""
    tokens, heads, _ = q_nope.shape
    out, lse = np.zeros((tokens, heads, v.shape[-1])), np.full((tokens, heads), -np.inf)
    for t in range(tokens):
        if query_seq[t] < 0:
            continue
        seen = np.flatnonzero((key_seq == query_seq[t]) & (key_pos <= query_pos[t]))
        rope_scores = np.float64(k_rope[seen]) @ np.float64(q_rope[t]).T
        for h in range(heads):
            scores = np.float64(k_nope[seen, h]) @ np.float64(q_nope[t, h]) + rope_scores[:, h]
            out[t, h], lse[t, h] = attend(scale * scores, np.float64(v[seen, h]))
    return out, lse
