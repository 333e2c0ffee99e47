#!/bin/sh
# Trains nano-colorful further for two of LIBERO's suites, from the scripted expert's demonstrations, and evaluates it
# in the official states. One process at a time. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
SUITES="libero_object libero_spatial"
export OMP_NUM_THREADS=1

"$BIN/spear" evaluate libero --setup
"$BIN/spear" record libero --fast-rendering --suites $SUITES --num-episodes 24 --workers 1 --out "$RUNS/libero-episodes"
"$BIN/spear" label libero:10000-10007 --workers 1 --out "$RUNS/libero-labels"
"$BIN/spear" train nano-libero --init nano-colorful --episodes "$RUNS"/libero-episodes/* --labels "$RUNS/libero-labels" \
    --out "$RUNS/nano-libero"
"$BIN/spear" evaluate libero --policy "$RUNS/nano-libero" --replan-steps 3 --suites $SUITES --num-scenes 4 \
    --batch-size 1 --videos failures --out "$RUNS/evaluate-libero"
