#!/bin/sh
# Trains the nano weights that ship with the package, from nothing, through every stage of the method.
# Two hours on two CPU cores. Stopped at any moment, the same command continues where it was.
set -eu
SPEAR=${SPEAR:-.venv/bin/spear}
RUNS=${RUNS:-runs}

"$SPEAR" label --scenes 12544 --first-seed 200000 --out "$RUNS/labels"
[ -d "$RUNS/episodes" ] || "$SPEAR" record --episodes 700 --out "$RUNS/episodes"
"$SPEAR" train nano-depth --labels "$RUNS/labels" --out "$RUNS/nano-depth"
"$SPEAR" train nano-vlm-0 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-0"
"$SPEAR" train nano-vlm-1 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-1" \
    --init "$RUNS/nano-vlm-0" --moge "$RUNS/nano-depth"
"$SPEAR" train nano-vlm-2 --labels "$RUNS/labels" --out "$RUNS/nano-vlm-2" --init "$RUNS/nano-vlm-1"
"$SPEAR" train nano-vla --labels "$RUNS/labels" --episodes "$RUNS/episodes" --out "$RUNS/nano-vla" \
    --init "$RUNS/nano-vlm-2"
"$SPEAR" evaluate vlm --model "$RUNS/nano-vlm-2" --scenes 300 --out "$RUNS/evaluate-vlm"
"$SPEAR" evaluate --policy "$RUNS/nano-vla" --scenes 200 --out "$RUNS/evaluate"
