"""Static shapes: which sizes an engine compiles, and which of them a step takes.

Every launch is padded to one of these, all are compiled before the first request, and nothing is
compiled afterwards. Few buckets start fast; many waste little. No JAX.
"""

import dataclasses
import enum
import itertools
from collections.abc import Sequence


class Variant(enum.IntEnum):
    """What the rows of a decode step may ask for; each is a program of its own.

    Only FULL decides anything at run time. At such a branch a GPU waits for the host, so the steps
    that most requests need have none.
    """

    PLAIN = 0  # the server's own acceptance rule, temperature, seed, stops and limits
    TRUNCATED = 1  # the same, and top-k, top-p
    FULL = 2  # everything


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one program.

    Attributes:
        batch: decoding rows; 0 has none.
        chunks: prompt rows' sequences; 0 has none.
        length: prompt tokens of each of them.
        drafts: drafts verified a step.
        columns: pages of the longest sequence.
        variant: what decoding rows may ask for.
        scored: log-probabilities of the prompt rows' next tokens come out.
    """

    batch: int
    chunks: int
    length: int
    drafts: int
    columns: int
    variant: Variant = Variant.FULL
    scored: bool = False

    @property
    def tokens(self) -> int:
        """Rows of the forward pass."""
        return self.batch * (1 + self.drafts) + self.chunks * self.length

    def __str__(self) -> str:
        parts = []
        if self.batch:
            parts.append(f"decode {self.batch}x{1 + self.drafts}")
        if self.chunks:
            parts.append(f"{'scored ' * self.scored}prefill {self.chunks}x{self.length}")
        kind = f", {self.variant.name.lower()}" if self.batch else ""
        return " + ".join(parts) + f", {self.columns} pages{kind}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes an engine compiles.

    Attributes:
        batches: decoding rows, rising.
        chunk_shapes: (sequences, tokens each) of prompt rows.
        drafts: numbers of drafts a step may verify.
        columns: page table widths, rising.
        mixed: prompt rows may share a program with decoding rows (of the largest batch); otherwise
            they are launched one after another.
        variants: of decoding, rising.
        scored: prompt rows may be scored. Beside decoding rows only in the largest variant, which
            serves them all: scored prompts are seldom followed by long answers.

    Raises:
        ValueError: an empty or unsorted list, or a size below 1.
    """

    batches: tuple[int, ...]
    chunk_shapes: tuple[tuple[int, int], ...]
    drafts: tuple[int, ...]
    columns: tuple[int, ...]
    mixed: bool = False
    variants: tuple[Variant, ...] = (Variant.FULL,)
    scored: bool = False

    def __post_init__(self):
        for name in ("batches", "drafts", "columns"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < (name != "drafts"):
                raise ValueError(f"{name}={sizes}: give rising, positive sizes")
        if not self.chunk_shapes or any(min(shape) < 1 for shape in self.chunk_shapes):
            raise ValueError(f"chunk_shapes={self.chunk_shapes}: give (sequences, tokens) pairs")

    @classmethod
    def make(
        cls,
        *,
        slots: int,
        columns: int,
        chunk: int,
        drafts: tuple[int, ...],
        mixed: bool = False,
        few: bool = False,
        extras: bool = True,
        scored: bool = False,
    ) -> "Buckets":
        """A ladder by factors of 4 below the largest sizes; `few` compiles only the largest of
        each, and one shape for short prompts. Without `extras` nothing compiles what only FULL
        has, without `scored` no prompt can be scored.
        """
        steps = 1 if few else 4
        kinds = (Variant.FULL,) if few and extras else tuple(Variant)
        short = max(chunk // 4, 1)
        shapes = ((1, chunk), (4, short)) if chunk >= 16 else ((1, chunk),)
        return cls(
            batches=_ladder(slots, steps, smallest=4),
            chunk_shapes=shapes,
            drafts=tuple(sorted(set(drafts))),
            columns=_ladder(columns, 1 if few else 3, smallest=8),
            mixed=mixed,
            variants=tuple(v for v in kinds if extras or v is not Variant.FULL),
            scored=scored,
        )

    @property
    def chunk(self) -> int:
        """Most prompt tokens of one sequence in a step."""
        return max(length for _, length in self.chunk_shapes)

    def all(self) -> list[Bucket]:
        """Every program, largest first."""
        found = []
        for columns in self.columns:
            for drafts, variant in itertools.product(self.drafts, self.variants):
                found += [Bucket(batch, 0, 0, drafts, columns, variant) for batch in self.batches]
            for shape, scored in itertools.product(self.chunk_shapes, (False, self.scored)):
                found.append(Bucket(0, *shape, 0, columns, scored=scored))
                if not self.mixed:
                    continue
                size, kinds = (self.batches[-1], *shape), self.beside(scored)
                for drafts, variant in itertools.product(self.drafts, kinds):
                    found.append(Bucket(*size, drafts, columns, variant, scored))
        return sorted(set(found), key=lambda b: (b.tokens * b.columns, b), reverse=True)

    def beside(self, scored: bool) -> tuple[Variant, ...]:
        """Variants of decoding rows that share a program with prompt rows."""
        return self.variants[-1:] if scored else self.variants

    def fit_columns(self, columns: int) -> int:
        """The narrowest page table that holds `columns` pages."""
        return next(width for width in self.columns if width >= columns)

    def fit_variant(self, needed: Variant, *, scored: bool = False) -> Variant:
        """The smallest variant that has what `needed` has; `scored`: beside scored prompt rows."""
        return min(variant for variant in self.beside(scored) if variant >= needed)

    def fit_batch(self, rows: int) -> int:
        """The smallest batch that holds `rows`."""
        return next(batch for batch in self.batches if batch >= rows)

    def group(self, lengths: Sequence[int]) -> list[tuple[tuple[int, int], list[int]]]:
        """Splits prompt chunks over launches.

        The longest chunk left takes the smallest shape that holds it, and the next longest ones its
        other rows.

        Args:
            lengths: tokens of each chunk, at most `chunk`.

        Returns:
            (shape, indices of the chunks in it) for each launch.
        """
        left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups = []
        while left:
            fitting = [s for s in self.chunk_shapes if s[1] >= lengths[left[0]]]
            # Fewest padded tokens for what it takes; a wider shape only if it takes more chunks.
            shape = min(fitting, key=lambda s: (s[0] * s[1] / min(s[0], len(left)), s))
            groups.append((shape, left[: shape[0]]))
            left = left[shape[0] :]
        return groups


def _ladder(largest: int, steps: int, smallest: int) -> tuple[int, ...]:
    sizes, size = {largest}, largest
    for _ in range(steps - 1):
        size = -(-size // 4)
        if size < smallest:
            break
        sizes.add(size)
    return tuple(sorted(sizes))
