"""Every tolerance of the numeric tests, with the error it expects and why.

Tightening is free; loosening needs a measured reason in the commit.
"""

from pallas_kernels.testing import Tolerance

OP = {
    "float32": Tolerance(
        abs=1e-5,
        rel=1e-5,
        cosine=1e-11,
        reason="fp32 sums of up to 700 terms of order 1 against float64",
    ),
    "bfloat16": Tolerance(
        abs=2e-2,
        rel=1e-2,
        cosine=2e-5,
        reason="inputs are exact; probabilities, products and results are rounded to 8 bits",
    ),
}
FP8_LATENTS_IN_BF16 = Tolerance(
    abs=4e-2,
    rel=1e-2,
    cosine=2e-5,
    reason="as OP's bfloat16; latents, once they have their scales, are rounded to 8 bits too",
)
LAYERS_IN_BF16 = Tolerance(
    abs=3e-2,
    rel=1e-2,
    cosine=2e-5,
    reason="as OP, after some layers: of 8,160 values two near 2.6 were three steps of 8 bits "
    "apart, 0.047, where fp32 sums over experts were added in another order",
)
E4M3_ROWS = Tolerance(
    abs=2.0,
    rel=0.1,
    cosine=2e-3,
    reason="against rows that are not quantized: e4m3 keeps 4 bits, an rms error of 0.026 in each "
    "of two products, so a distance of 1e-3 whatever their length; the largest is 2.2",
)
E4M3_QUERIES = Tolerance(
    abs=0.3,
    rel=5e-2,
    cosine=2e-3,
    reason="queries have 4 bits: scores of deviation up to 4 are off by 2.6 % of that, 0.1, and so "
    "are weights; in one of 49,152 results more than 0.15 was seen, 0.17",
)
E4M3_STORED = Tolerance(
    abs=1e-2,
    rel=7e-2,
    cosine=1.5e-3,
    reason="rounded to e4m3 once: half a step of 4 bits is 1/16, and an rms error of 0.026 is a "
    "distance of 7e-4",
)
SAME_E4M3 = Tolerance(
    abs=0.1,
    rel=1e-2,
    cosine=5e-6,
    reason="both sides quantize rows alike; products and results are rounded to 8 bits, 2e-6; "
    "where an fp32 sum is rounded to the other side, e4m3 may move that value by an eighth",
)
SAME_E4M3_GPU = Tolerance(
    abs=1.0,
    rel=0.1,
    cosine=5e-4,
    reason="as SAME_E4M3, but tensor cores add fp8 products in 14 bits, so two or three in a "
    "hundred values of a row are rounded to the other side, a step of a tenth: 0.024 of the size",
)
HOPPER_STEP = {
    "bf16": Tolerance(
        abs=8e-2,
        rel=5e-2,
        cosine=2e-4,
        reason="logits of order 1 after two layers in bf16, summed in another order",
    ),
    "fp8": Tolerance(
        abs=4e-1,
        rel=1e-1,
        cosine=3e-3,
        reason="as E4M3_ROWS: rows go through the experts in e4m3, in plain JAX in bf16; what "
        "is quantized before dense products may be rounded to the other side",
    ),
}
HOPPER_STEP["w4afp8"] = HOPPER_STEP["fp8"]
GRADIENT = {
    "float32": Tolerance(
        abs=1e-4, rel=1e-4, cosine=1e-10, reason="sums of products of two fp32 results"
    ),
}
GATE = Tolerance(abs=1e-6, rel=2e-6, cosine=1e-12, reason="exp, a sum of up to 8 and a division")
GOLDEN_6_DIGITS = Tolerance(abs=1e-6, rel=0.0, cosine=1e-11, reason="printed with 6 digits")

SCALE_ULPS = 1.25
"""XLA turns amax / 448 into a product with the reciprocal, itself rounded: 0.75 + 0.5 at most."""

ROPE = {
    "near": Tolerance(abs=2e-6, rel=0.0, cosine=1e-12, reason="cos and sin of small angles"),
    "far": Tolerance(
        abs=2e-2,
        rel=0.0,
        cosine=1e-5,
        reason="angles up to 163839 have 2^-24 of that, 0.01 rad, in fp32, as in Hugging Face",
    ),
}
LAYER = Tolerance(
    abs=5e-6, rel=5e-6, cosine=1e-11, reason="one layer in fp32, a few products deep, order 1"
)
MODEL = Tolerance(
    abs=1e-5, rel=1e-5, cosine=1e-10, reason="the issue's bound: a whole tiny model in fp32"
)
