#!/bin/sh
# Trains the nano weights that ship with the package, from nothing, through every stage of the method.
# Two processes, one per core. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=1
# jemalloc (apt-get install libjemalloc2), where it is here and nothing else is preloaded: see docs/howto/train.md.
PRELOAD=${LD_PRELOAD:-$(ldconfig -p 2>/dev/null | sed -n 's/.*libjemalloc\.so\.2 .*=> //p' | head -1)}
TRAIN="env LD_PRELOAD=$PRELOAD MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:16
    $BIN/torchrun --standalone --nproc-per-node ${PROCESSES:-2} --no-python $BIN/spear train"

"$BIN/spear" label --num-scenes 13056 --first-seed 200000 --out "$RUNS/labels"
"$BIN/spear" record --num-episodes 2000 --out "$RUNS/episodes"
# The two encoders side by side, one process each.
"$BIN/spear" train nano-depth --labels "$RUNS/labels" --out "$RUNS/nano-depth" &
DEPTH=$!
"$BIN/spear" train nano-siglip --labels "$RUNS/labels" --out "$RUNS/nano-siglip"
wait "$DEPTH"
$TRAIN nano-vlm-0 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-0" --init "$RUNS/nano-siglip"
$TRAIN nano-vlm-1 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-1" --init "$RUNS/nano-vlm-0" \
    --init-depth-encoder "$RUNS/nano-depth"
$TRAIN nano-vlm-2 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-2" --init "$RUNS/nano-vlm-1" --steps 4000
$TRAIN nano-vla --labels "$RUNS/labels" --episodes "$RUNS/episodes" --out "$RUNS/nano-vla" \
    --init "$RUNS/nano-vlm-2"
# What the policy does wrong, put right by the expert; then everything learns a little more. Twice, the second time
# more of the families that fail most.
correct() { # FROM TO STEPS CORRECTIONS SHARES
    from=$1 to=$2 steps=$3 corrections=$4
    shift 4
    $TRAIN nano-vla --labels "$RUNS/labels" --episodes "$RUNS/episodes" "$RUNS"/$corrections --sampling-weights "$@" \
        --init "$RUNS/$from" --out "$RUNS/$to" --steps "$steps" --set lr=4e-4 warmup=200 \
        'lr_scale={"vlm":0.4,"vlm.vision_tower":0.15}' 'frozen=["vlm.moge"]'
}
"$BIN/spear" record --policy "$RUNS/nano-vla" --first-seed 40000 --out "$RUNS/corrections-1"
"$BIN/spear" record --policy "$RUNS/nano-vla" --tasks stack_cube --num-episodes 500 --first-seed 50000 \
    --out "$RUNS/corrections-1-stacking"
correct nano-vla nano-corrected-1 1720 'corrections-1*' 0.65 0.2 0.15
"$BIN/spear" record --policy "$RUNS/nano-corrected-1" --tasks put_on put_in_basket --num-episodes 100 \
    --first-seed 70000 --out "$RUNS/corrections-2"
"$BIN/spear" record --policy "$RUNS/nano-corrected-1" --tasks spoon_on_towel stack_cube --num-episodes 250 \
    --first-seed 60000 --out "$RUNS/corrections-2-hard"
correct nano-corrected-1 nano-corrected 3500 'corrections-*' 0.45 0.13 0.08 0.10 0.24
"$BIN/spear" evaluate --policy "$RUNS/nano-corrected" --num-scenes 200 --out "$RUNS/evaluate"
# nano-vlm: the SPEAR-VLM inside it learns to answer again, from more images, and above all how far things are and where
# one lies from another; then, at a lower rate, also the form of image locations.
ask() { # FROM TO STEPS SETTINGS
    from=$1 to=$2 steps=$3
    shift 3
    $TRAIN nano-vlm-2 --labels "$RUNS/labels" "$RUNS/labels-more" --init "$RUNS/$from" --out "$RUNS/$to" --steps "$steps" \
        --set "$@"
}
BOXES='"box_vertices","box_vertices","box_vertices","box_vertices","box_vertices","box_vertices"'
WORDS='"chain_of_thought","what_at","centre_2d"'
"$BIN/spear" label --num-scenes 18000 --first-seed 300000 --out "$RUNS/labels-more"
ask nano-corrected nano-vlm-a 18000 warmup=200 "families=[$BOXES,\"keypoint\",\"keypoint\",\"keypoint\",
    \"offset\",\"offset\",\"offset\",\"offset\",\"distance\",\"distance\",\"distance\",
    \"back_projection\",\"back_projection\",$WORDS]"
ask nano-vlm-a nano-vlm 3600 lr=1.5e-4 warmup=100 "families=[$BOXES,\"keypoint\",\"keypoint\",
    \"offset\",\"offset\",\"offset\",\"distance\",\"distance\",
    \"back_projection\",\"back_projection\",\"back_projection\",\"back_projection\",$WORDS]"
"$BIN/spear" evaluate vqa --model "$RUNS/nano-vlm" --labels sim --num-images 400 --out "$RUNS/evaluate-vqa"
