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
"$BIN/spear" evaluate vqa "$RUNS/nano-vlm-2" sim --images 300 --out "$RUNS/evaluate-vqa"
"$BIN/spear" evaluate --policy "$RUNS/nano-vla" --scenes 200 --out "$RUNS/evaluate"
