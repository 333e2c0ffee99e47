#!/bin/sh
# Trains the nano-vlm further, in varied surroundings: tables of any color, any light, moved cameras.
# Two processes, one per core. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=1
TRAIN="$BIN/torchrun --standalone --nproc-per-node ${PROCESSES:-2} --no-python $BIN/spear train"

"$BIN/spear" label --num-scenes 2500 --first-seed 500000 --out "$RUNS/labels-default"
"$BIN/spear" label --world wild --num-scenes 7000 --first-seed 400000 --out "$RUNS/labels-wild"
"$BIN/spear" label --world varied --num-scenes 3424 --first-seed 420000 --out "$RUNS/labels-varied"

BOXES='"box_vertices","box_vertices","box_vertices","box_vertices","box_vertices","box_vertices"'
WORDS='"chain_of_thought","what_at","centre_2d"'
QUESTIONS="families=[$BOXES,\"keypoint\",\"keypoint\",\"keypoint\",\"offset\",\"offset\",\"distance\",\"distance\",
    \"back_projection\",\"back_projection\",$WORDS]"
$TRAIN nano-vlm-2 --labels "$RUNS/labels-wild" "$RUNS/labels-default" --init nano --out "$RUNS/vlm-wild" \
    --steps 2600 --set warmup=200 "$QUESTIONS"
# The two encoders learn to see in other surroundings, side by side, one process each.
LABELS="$RUNS/labels-varied $RUNS/labels-default $RUNS/labels-wild"
"$BIN/spear" train nano-depth --labels $LABELS --init nano-depth --out "$RUNS/depth-varied" --steps 4000 --lr 6e-4 &
DEPTH=$!
"$BIN/spear" train nano-siglip --labels $LABELS --init "$RUNS/vlm-wild" --out "$RUNS/siglip-varied" --steps 2000 \
    --lr 5e-4 --set moge=true 'frozen=["vlm.language_model"]'
wait "$DEPTH"
"$BIN/python" -m experiments.nano.exchange "$RUNS/siglip-varied/final" moge "$RUNS/depth-varied/final" moge \
    "$RUNS/encoders-varied"
$TRAIN nano-vlm-2 --labels $LABELS --init "$RUNS/encoders-varied" --out "$RUNS/vlm-varied" --steps 3200 \
    --set warmup=100 "$QUESTIONS"
