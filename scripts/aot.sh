#!/bin/sh
# Compiles every GPU kernel for an H100 on a machine without a GPU (pallas_kernels/testing/aot.py)
# and compares registers, spills and memory with benchmarks/results/aot.json; then whole decode steps
# (benchmarks/aot_step.py).
#
#   scripts/aot.sh [--record] [-k TEXT]     with both, only those cases are recorded anew
#   scripts/aot.sh --module NAME ARGS...    another module that compiles, in the project's .venv
#   AOT_VENV=/path scripts/aot.sh           another place for its environment, 0.6 GB
#
# The environment holds only JAX, its CUDA plugin and ptxas, as pinned in requirements/lock-gpu.txt;
# it is made when it is not there.
set -eu
cd "$(dirname "$0")/.."

venv=${AOT_VENV:-build/aot/venv}
packages='jax|jaxlib|jax-cuda12-pjrt|jax-cuda12-plugin|jaxtyping|ml-dtypes|numpy|nvidia-cuda-nvcc-cu12'
packages="$packages|opt-einsum|scipy|wadler-lindig"

if [ ! -x "$venv/bin/python" ]; then
    echo "aot: making $venv"
    mkdir -p "$venv"
    # A pin is a line NAME==VERSION and the indented lines with its hashes.
    awk -v names="^($packages)==" '/^[^ ]/ { take = $0 ~ names } take' requirements/lock-gpu.txt \
        >"$venv.txt"
    if command -v uv >/dev/null; then
        uv venv --quiet --clear --python 3.12 "$venv"
        uv pip install --quiet --no-deps --require-hashes --python "$venv/bin/python" -r "$venv.txt"
    else
        "${PYTHON:-python3}" -m venv --clear "$venv"
        "$venv/bin/python" -m pip install --quiet --no-deps --require-hashes -r "$venv.txt"
    fi
fi

nvcc=$("$venv/bin/python" -c 'import nvidia.cuda_nvcc as n; print(*n.__path__)')
export PATH="$nvcc/bin:$PATH" PYTHONPATH=. JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
export XLA_FLAGS="--xla_gpu_cuda_data_dir=$nvcc" JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
if [ "${1:-}" = --module ]; then
    shift
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    PYTHONPATH=".:$site" exec .venv/bin/python -m "$@"
fi
dump=$(mktemp -d)
trap 'rm -rf "$dump"' EXIT
export MOSAIC_GPU_DUMP_PTXAS=1 MOSAIC_GPU_DUMP_TO="$dump/mosaic"
# Mosaic and XLA complain of what is not needed here: a driver, a disassembler.
"$venv/bin/python" -m benchmarks.aot "$@" 2>"$dump/errors" || {
    cat "$dump/errors" >&2
    exit 1
}
# And whole steps, which must copy neither weights nor caches.
if [ $# -eq 0 ]; then
    unset MOSAIC_GPU_DUMP_PTXAS MOSAIC_GPU_DUMP_TO
    scripts/aot.sh --module benchmarks.aot_step
    # And a training step, which must run no kernel of the forward pass twice.
    scripts/aot.sh --module benchmarks.train_step --compile-only --once --layers 3 --rows 1 \
        --remat none
fi
