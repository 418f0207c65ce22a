#!/bin/sh
# The MTP experiment (docs/mtp_experiment.md) on one GPU: three steps. On an H100 the first took 185 s
# of training, compilation included, to which reading the text and validation are to be added; the
# third 368 s in all, beside another run on the same card; the second was not timed. It needs a
# folder `corpus`, from scripts/prepare_corpus.py --data DATA --out corpus; of its training files
# train-00, train-01 and reasoning were used. Then
#     dskjax train-mtp study-report runs/mtp-study/study.json --out docs/mtp_experiment.md
set -eu
held_out() { # KIND... of a split, as options
    split=$1
    shift
    for kind in "$@"; do
        case $kind in reasoning) end=jsonl ;; *) end=txt ;; esac
        printf -- '--eval-data %s=corpus/%s/%s-%s.%s.xz ' "$kind" "$split" "$split" "$kind" $end
    done
}

# 1. The trunk, the same bits every time. Its record: `trunk` in
# benchmarks/results/mtp-experiment.json, and mtp-trunk-twice.json beside it.
# shellcheck disable=SC2046
dskjax pretrain --model benchmarks/mtp_experiment --tokenizer examples/tiny-deepseek \
    --data corpus/train --out runs/mtp-trunk --steps 1200 --batch-size 64 --seq-len 1024 \
    --lr 1.2e-3 --warmup 150 --save-every 1000000 --log-every 10 --deterministic \
    $(held_out valid code-python code-other tech-prose prose math reasoning)

# 2. What the trunk writes itself, at most 6.3M tokens, for the on-policy rows. Its record:
# benchmarks/results/mtp-on-policy.json.
generate="dskjax train-mtp generate-data runs/mtp-trunk/model --temperature 1"
generate="$generate --max-tokens 512 --batch 1024"
$generate --prompts corpus/train/train-00.txt.xz --prompts corpus/train/train-01.txt.xz \
    --prefix 64 --per-text 4 --limit 9216 --out runs/on-policy/text.jsonl
$generate --prompts corpus/train/reasoning.jsonl.xz --limit 3072 --seed 9216 \
    --out runs/on-policy/reasoning.jsonl

# 3. All variants and seeds of the table, on the same trunk passes of each data set.
# shellcheck disable=SC2046
dskjax train-mtp study runs/mtp-trunk/model --table benchmarks/mtp_experiment/table.json \
    --data corpus/train --data-set on-policy=runs/on-policy/text.jsonl \
    --data-set on-policy=runs/on-policy/reasoning.jsonl --out runs/mtp-study \
    --cache-dir runs/mtp-trunk/tokens --steps 250 --batch-size 16 --seq-len 1024 --lr 1e-3 \
    --warmup 20 --top-k 256 --log-every 10 --prompts 96 --prompt-tokens 64 --max-tokens 64 \
    --stride 768 --max-minutes 12 --deterministic \
    $(held_out test code-python code-other tech-prose prose reasoning)
