#!/bin/sh
# Trains the nano weights that ship with the package, from nothing, through every stage of the method.
# Two processes, one per core. Stopped at any moment, the same command continues where it was.
# SCALE=tiny runs the same stages with few scenes, episodes and steps, to try the path: the weights learn nothing.
set -eu
BIN=${BIN:-.venv/bin}
SCALE=${SCALE:-full}
case "$SCALE" in
    full) RUNS=${RUNS:-runs} SHORT= ;;
    tiny) RUNS=${RUNS:-runs/tiny} SHORT="--steps 4 --warmup-steps 1" ;; # in place of a recipe's steps
    *) echo "train.sh: SCALE is '$SCALE'. Give full or tiny." >&2; exit 1 ;;
esac
pick() { # FULL TINY: prints the number of the scale
    if [ "$SCALE" = tiny ]; then echo "$2"; else echo "$1"; fi
}
export OMP_NUM_THREADS=1
# jemalloc (apt-get install libjemalloc2), where it is here and nothing else is preloaded: see docs/howto/train.md.
PRELOAD=${LD_PRELOAD:-$(ldconfig -p 2>/dev/null | sed -n 's/.*libjemalloc\.so\.2 .*=> //p' | head -1)}
TRAIN="env LD_PRELOAD=$PRELOAD MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:16
    $BIN/torchrun --standalone --nproc-per-node ${PROCESSES:-2} --no-python $BIN/spear train"

"$BIN/spear" label --num-scenes "$(pick 13056 64)" --first-seed 200000 --out "$RUNS/labels"
"$BIN/spear" record --num-episodes "$(pick 2000 2)" --out "$RUNS/episodes"
# The two encoders side by side, one process each.
"$BIN/spear" train nano-depth $SHORT --labels "$RUNS/labels" --out "$RUNS/nano-depth" &
DEPTH=$!
"$BIN/spear" train nano-siglip $SHORT --labels "$RUNS/labels" --out "$RUNS/nano-siglip"
wait "$DEPTH"
$TRAIN nano-vlm-0 $SHORT --labels "$RUNS/labels" --out "$RUNS/nano-vlm-0" --init "$RUNS/nano-siglip"
$TRAIN nano-vlm-1 $SHORT --labels "$RUNS/labels" --out "$RUNS/nano-vlm-1" --init "$RUNS/nano-vlm-0" \
    --init-depth-encoder "$RUNS/nano-depth"
$TRAIN nano-vlm-2 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-2" --init "$RUNS/nano-vlm-1" \
    ${SHORT:---steps 4000}
$TRAIN nano-vla $SHORT --labels "$RUNS/labels" --episodes "$RUNS/episodes" --out "$RUNS/nano-vla" \
    --init "$RUNS/nano-vlm-2"
# What the policy does wrong, put right by the expert; then everything learns a little more. Twice, the second time
# more of the families that fail most.
correct() { # FROM TO STEPS CORRECTIONS SHARES
    from=$1 to=$2 steps=$3 corrections=$4
    shift 4
    $TRAIN nano-vla --labels "$RUNS/labels" --episodes "$RUNS/episodes" "$RUNS"/$corrections --sampling-weights "$@" \
        --init "$RUNS/$from" --out "$RUNS/$to" --steps "$(pick "$steps" 4)" --set lr=4e-4 "warmup=$(pick 200 1)" \
        'lr_scale={"vlm":0.4,"vlm.vision_tower":0.15}' 'frozen=["vlm.moge"]'
}
"$BIN/spear" record --policy "$RUNS/nano-vla" --num-episodes "$(pick 200 2)" --first-seed 40000 \
    --out "$RUNS/corrections-1"
"$BIN/spear" record --policy "$RUNS/nano-vla" --tasks stack_cube --num-episodes "$(pick 500 4)" --first-seed 50000 \
    --out "$RUNS/corrections-1-stacking"
correct nano-vla nano-corrected-1 1720 'corrections-1*' 0.65 0.2 0.15
"$BIN/spear" record --policy "$RUNS/nano-corrected-1" --tasks put_on put_in_basket --num-episodes "$(pick 100 2)" \
    --first-seed 70000 --out "$RUNS/corrections-2"
"$BIN/spear" record --policy "$RUNS/nano-corrected-1" --tasks spoon_on_towel stack_cube --num-episodes "$(pick 250 2)" \
    --first-seed 60000 --out "$RUNS/corrections-2-hard"
correct nano-corrected-1 nano-corrected 3500 'corrections-*' 0.45 0.13 0.08 0.10 0.24
"$BIN/spear" evaluate --policy "$RUNS/nano-corrected" --num-scenes "$(pick 200 2)" --out "$RUNS/evaluate"
# nano-vlm: the SPEAR-VLM inside it learns to answer again, from more images, and above all how far things are and where
# one lies from another; then, at a lower rate, also the form of image locations.
ask() { # FROM TO STEPS SETTINGS
    from=$1 to=$2 steps=$3
    shift 3
    $TRAIN nano-vlm-2 --labels "$RUNS/labels" "$RUNS/labels-more" --init "$RUNS/$from" --out "$RUNS/$to" \
        --steps "$(pick "$steps" 4)" --set "$@"
}
BOXES='"box_vertices","box_vertices","box_vertices","box_vertices","box_vertices","box_vertices"'
WORDS='"chain_of_thought","what_at","centre_2d"'
"$BIN/spear" label --num-scenes "$(pick 18000 64)" --first-seed 300000 --out "$RUNS/labels-more"
ask nano-corrected nano-vlm-a 18000 "warmup=$(pick 200 1)" "families=[$BOXES,\"keypoint\",\"keypoint\",\"keypoint\",
    \"offset\",\"offset\",\"offset\",\"offset\",\"distance\",\"distance\",\"distance\",
    \"back_projection\",\"back_projection\",$WORDS]"
ask nano-vlm-a nano-vlm 3600 lr=1.5e-4 "warmup=$(pick 100 1)" "families=[$BOXES,\"keypoint\",\"keypoint\",
    \"offset\",\"offset\",\"offset\",\"distance\",\"distance\",
    \"back_projection\",\"back_projection\",\"back_projection\",\"back_projection\",$WORDS]"
"$BIN/spear" evaluate vqa --model "$RUNS/nano-vlm" --labels sim --num-images "$(pick 400 6)" --out "$RUNS/evaluate-vqa"
