"""Exact laws of small speculative decoders, and of truncated sampling, in NumPy float64.

Imports nothing of ours: the acceptance formulas here are a second writing of the papers', used to
find where a rule changes its mind as a function of its uniforms. A model is a list of tables:
`tables[l][code]` is the next-token law after the prefix of length l whose base-V digits are `code`.
Everything is enumerated, nothing is drawn.
"""

import dataclasses

import numpy as np

Tables = list[np.ndarray]


def softmax(logits, temperature=1.0):
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def random_logits(rng, vocab, depth, scale=1.5) -> Tables:
    """Logits that depend on the whole prefix, for prefixes of length 0..depth."""
    return [scale * rng.standard_normal((vocab**length, vocab)) for length in range(depth + 1)]


def truncated_distribution(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """One row, token by token in plain loops: temperature, top-k, top-p, min-p; ties by id."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    weights = np.exp((logits - logits.max()) / np.float64(temperature))
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if 0 < top_k < len(order):
        order = order[:top_k]
    if top_p < 1:
        total, mass, kept = sum(weights[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            mass += weights[i]
            if mass >= np.float64(top_p) * total:
                break
        order = kept
    probs = np.zeros(len(logits))
    for i in order:
        if weights[i] >= min_p:
            probs[i] = weights[i]
    return probs / probs.sum()


def target_law(p: Tables, length: int) -> np.ndarray:
    """Law of the first `length` tokens of the target, [V**length]."""
    law = np.ones(1)
    for step in range(length):
        law = (law[:, None] * p[step]).ravel()
    return law


def total_variation(a, b) -> float:
    return float(0.5 * np.abs(a - b).sum())


@dataclasses.dataclass
class Rows:
    """Every (prefix, drafts) of a step; `weight` is the law of the drafts given the prefix."""

    start: np.ndarray  # [N] length of the prefix
    context: np.ndarray  # [N] code of the prefix
    drafts: np.ndarray  # [N, m]
    weight: np.ndarray  # [N]
    p: np.ndarray  # [N, m+1, V]
    q: np.ndarray  # [N, m, V]

    def gather(self, tables: Tables, slots: int) -> np.ndarray:
        """Laws of the first slots, each after the prefix and earlier drafts, [N, slots, V]."""
        vocab = tables[0].shape[-1]
        out = np.zeros((len(self.start), slots, vocab))
        code = self.context.copy()
        for slot in range(slots):
            for start in np.unique(self.start):
                rows = self.start == start
                out[rows, slot] = tables[start + slot][code[rows]]
            if slot < self.drafts.shape[1]:
                code = code * vocab + self.drafts[:, slot]
        return out


def step_rows(p: Tables, q: Tables, m: int) -> Rows:
    """Rows for prefixes of length 0..m: enough for m+1 tokens; needs tables to depth 2m."""
    vocab = p[0].shape[-1]
    start = np.concatenate([np.full(vocab ** (s + m), s) for s in range(m + 1)])
    context = np.concatenate([np.repeat(np.arange(vocab**s), vocab**m) for s in range(m + 1)])
    drafts = np.concatenate(
        [np.tile(np.indices((vocab,) * m).reshape(m, -1).T, (vocab**s, 1)) for s in range(m + 1)]
    )
    rows = Rows(start, context, drafts, np.ones(len(start)), np.empty(0), np.empty(0))
    rows.p, rows.q = rows.gather(p, m + 1), rows.gather(q, m)
    rows.weight = at_drafts(rows.q, drafts).prod(axis=1)
    return rows


def at_drafts(x, drafts):
    return np.take_along_axis(x[:, : drafts.shape[1]], drafts[..., None], axis=2)[..., 0]


def chain_law(start, context, tokens, count, weight, *, vocab, length) -> np.ndarray:
    """Law of the first `length` tokens when steps follow one another, [V**length].

    Row r says: a step that starts from prefix (start, context) emits tokens[:count] with
    probability weight. Where a step emits fewer than are wanted, the steps from the longer prefix
    continue.
    """
    reach = [np.zeros(vocab**s) for s in range(length + 1)]
    reach[0][0] = 1
    for s in range(length):
        rows = start == s
        code, emitted = context[rows], count[rows]
        mass = weight[rows] * reach[s][code]
        for i in range(min(tokens.shape[1], length - s)):
            code = np.where(i < emitted, code * vocab + tokens[rows, i], code)
        end = np.minimum(s + emitted, length)
        for e in range(s + 1, length + 1):
            np.add.at(reach[e], code[end == e], mass[end == e])
    return reach[length]


def length_law(h, kind: str) -> np.ndarray:
    """P(accepted = 0..m), [N, m+1], from the tests' probabilities h [N, m]."""
    n, m = h.shape
    law = np.zeros((n, m + 1))
    for accepted in range(m + 1):
        if kind == "rejection":  # all up to here pass, the next one fails
            fail = 1 - h[:, accepted] if accepted < m else 1
            law[:, accepted] = h[:, :accepted].prod(1) * fail
        else:  # this one passes, all later ones fail
            here = h[:, accepted - 1] if accepted else 1
            law[:, accepted] = here * (1 - h[:, accepted:]).prod(1)
    return law


def emissions(rows: Rows, h, residual, kind: str):
    """(start, context, tokens, count, weight) of each outcome.

    From the tests' probabilities h [N, m] and the final laws `residual` [N, m+1, V].
    """
    m, vocab = rows.drafts.shape[1], rows.p.shape[-1]
    lengths = length_law(h, kind)
    parts = []
    for accepted in range(m + 1):
        for token in range(vocab):
            tokens = np.concatenate([rows.drafts, np.zeros_like(rows.drafts[:, :1])], axis=1)
            tokens[:, accepted] = token
            weight = rows.weight * lengths[:, accepted] * residual[:, accepted, token]
            count = np.full(len(weight), accepted + 1)
            parts.append((rows.start, rows.context, tokens, count, weight))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def prefix_ratios(rows: Rows):
    m = rows.drafts.shape[1]
    p_d, q_d = at_drafts(rows.p, rows.drafts), at_drafts(rows.q, rows.drafts)
    ratio = np.divide(p_d, q_d, out=np.zeros_like(p_d), where=q_d > 0)
    pi = np.ones((len(ratio), m + 1))
    for i in range(m):
        pi[:, i + 1] = np.minimum(pi[:, i] * ratio[:, i], 1)
    return ratio, pi


def accept_probs(rows: Rows, kind: str) -> np.ndarray:
    """The tests' probabilities, [N, m]; block divides by sum max(q - pi p, 0) = S + 1 - pi."""
    m = rows.drafts.shape[1]
    ratio, pi = prefix_ratios(rows)
    if kind == "rejection":
        return np.minimum(ratio, 1)
    h = pi[:, 1:].copy()
    for i in range(1, m):
        diff = pi[:, i, None] * rows.p[:, i] - rows.q[:, i]
        gain, loss = np.maximum(diff, 0).sum(-1), np.maximum(-diff, 0).sum(-1)
        h[:, i - 1] = np.where(loss > 0, gain / np.where(loss > 0, loss, 1), 1)
    return np.minimum(h, 1)


def residuals(rows: Rows, kind: str) -> np.ndarray:
    """Final laws after 0..m accepted drafts, [N, m+1, V]; p where the difference is all zero."""
    m = rows.drafts.shape[1]
    scale = prefix_ratios(rows)[1][:, :m] if kind == "block" else np.ones(rows.drafts.shape)
    out = rows.p.copy()
    excess = np.maximum(scale[..., None] * rows.p[:, :m] - rows.q, 0)
    total = excess.sum(-1, keepdims=True)
    out[:, :m] = np.where(total > 0, excess / np.where(total > 0, total, 1), rows.p[:, :m])
    return out


def cells(probs):
    """Intervals of u in which an inverse CDF is constant: (midpoint, length), each [.., V]."""
    high = np.cumsum(probs, axis=-1)
    return high - probs / 2, probs


def drive(rows: Rows, kind: str, rng):
    """Uniforms that visit every decision of a rule: (row index, u_accept, u_final, weight).

    A rule is constant between breakpoints: the tests' probabilities in u_accept, the CDF of the
    final law in u_final. One point per cell, the cell's volume as its weight. For rejection and
    block only the final uniform of the slot that ends the step may matter: the others are random,
    so that a rule which reads one of them is found out.
    """
    n, m = rows.drafts.shape
    vocab = rows.p.shape[-1]
    parts = []
    if kind == "strict":
        mid, size = cells(rows.p)
        for choice in np.ndindex((vocab,) * (m + 1)):
            slots = np.arange(m + 1)
            weight = rows.weight * size[:, slots, choice].prod(1)
            parts.append((np.arange(n), rng.random((n, m)), mid[:, slots, choice], weight))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    h = accept_probs(rows, kind)
    mid, size = cells(residuals(rows, kind))
    for passed in np.ndindex((2,) * m):
        passes = np.array(passed, bool)
        u_accept = np.where(passes, h / 2, (1 + h) / 2)
        volume = rows.weight * np.where(passes, h, 1 - h).prod(1)
        if kind == "rejection":
            accepted = int(np.cumprod(passes).sum())
        else:
            accepted = max(np.flatnonzero(passes), default=-1) + 1
        for token in range(vocab):
            u_final = rng.random((n, m + 1))
            u_final[:, accepted] = mid[:, accepted, token]
            parts.append((np.arange(n), u_accept, u_final, volume * size[:, accepted, token]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
