#!/bin/sh
# Trains nano-colorful further for LIBERO-Object and -Spatial, on demonstrations of the oracle, and evaluates it.
# One process at a time. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=1

"$BIN/spear" evaluate libero --setup
"$BIN/spear" record libero --suites libero_object libero_spatial --fast-rendering --num-episodes 20 --workers 1 \
    --out "$RUNS/libero-episodes"
"$BIN/spear" train nano-libero --init nano-colorful --episodes "$RUNS"/libero-episodes/* --steps 6000 \
    --out "$RUNS/nano-libero"
"$BIN/spear" evaluate libero --policy "$RUNS/nano-libero" --replan-steps 3 --suites libero_object libero_spatial \
    --num-scenes 5 --batch-size 1 --videos failures --out "$RUNS/evaluate-libero"
"$BIN/spear" evaluate libero --policy "$RUNS/nano-libero" --replan-steps 3 --suites libero_object_swap \
    libero_object_lan --fast-rendering --num-scenes 2 --batch-size 1 --videos failures --out "$RUNS/evaluate-libero-pro"
