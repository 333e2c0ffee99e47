#!/bin/sh
# Trains the nano weights that ship with the package, from nothing, through every stage of the method.
# Two processes, one per core. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=1
TRAIN="$BIN/torchrun --standalone --nproc-per-node ${PROCESSES:-2} --no-python $BIN/spear train"

"$BIN/spear" label --scenes 13056 --first-seed 200000 --out "$RUNS/labels"
"$BIN/spear" record --episodes 2000 --out "$RUNS/episodes"
# The two encoders side by side, one process each.
"$BIN/spear" train nano-depth --labels "$RUNS/labels" --out "$RUNS/nano-depth" &
DEPTH=$!
"$BIN/spear" train nano-siglip --labels "$RUNS/labels" --out "$RUNS/nano-siglip"
wait "$DEPTH"
$TRAIN nano-vlm-0 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-0" --init "$RUNS/nano-siglip"
$TRAIN nano-vlm-1 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-1" --init "$RUNS/nano-vlm-0" \
    --moge "$RUNS/nano-depth"
$TRAIN nano-vlm-2 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-2" --init "$RUNS/nano-vlm-1"
$TRAIN nano-vla --labels "$RUNS/labels" --episodes "$RUNS/episodes" --out "$RUNS/nano-vla" \
    --init "$RUNS/nano-vlm-2"
# What the policy does wrong, put right by the expert; then everything learns a little more.
"$BIN/spear" record --policy "$RUNS/nano-vla" --first-seed 40000 --out "$RUNS/corrections"
"$BIN/spear" record --policy "$RUNS/nano-vla" --families stack_cube --episodes 500 --first-seed 50000 \
    --out "$RUNS/corrections-stacking"
$TRAIN nano-vla --labels "$RUNS/labels" --episodes "$RUNS/episodes" "$RUNS/corrections" "$RUNS/corrections-stacking" \
    --shares 0.65 0.2 0.15 --out "$RUNS/nano-corrected" --init "$RUNS/nano-vla" --steps 1720 --set lr=4e-4 \
    'lr_scale={"vlm":0.4,"vlm.vision_tower":0.15}' 'frozen=["vlm.moge"]' warmup=200 normalization=meanstd \
    'flow={"rotation_loss":"cosine","rotation_weight":200}'
"$BIN/spear" evaluate vqa "$RUNS/nano-corrected" sim --images 300 --out "$RUNS/evaluate-vqa"
"$BIN/spear" evaluate --policy "$RUNS/nano-corrected" --scenes 200 --out "$RUNS/evaluate"
