#!/bin/sh
# Trains nano further for tables, floors and walls of any color, other light, moved cameras and clutter.
# One process per training. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=1

"$BIN/spear" label --num-scenes 2500 --first-seed 500000 --out "$RUNS/labels-default"
"$BIN/spear" label --world colorful --num-scenes 2400 --first-seed 440000 --out "$RUNS/labels-colorful"
"$BIN/spear" record --num-episodes 500 --first-seed 210000 --out "$RUNS/episodes-default"
"$BIN/spear" record --world varied --num-episodes 600 --first-seed 120000 --out "$RUNS/episodes-varied"
"$BIN/spear" record --world colorful --num-episodes 350 --first-seed 450000 --out "$RUNS/episodes-colorful"

# First the SPEAR-VLM inside nano learns where things are in these surroundings, from images without demonstrations.
BOXES='"box_vertices","box_vertices","box_vertices","box_vertices","box_vertices","box_vertices"'
WORDS='"chain_of_thought","what_at","centre_2d"'
"$BIN/torchrun" --standalone --nproc-per-node "${PROCESSES:-2}" --no-python "$BIN/spear" train nano-vlm-2 \
    --labels "$RUNS/labels-colorful" "$RUNS/labels-default" --init nano --out "$RUNS/vlm-colorful" --steps 1800 \
    --set warmup=100 "families=[$BOXES,\"keypoint\",\"keypoint\",\"keypoint\",\"offset\",\"offset\",\"distance\",\"distance\",
    \"back_projection\",\"back_projection\",$WORDS]"

# Then the policy, with this SPEAR-VLM in place of the one that it had.
[ -d "$RUNS/nano-exchanged" ] ||
    "$BIN/python" -m experiments.nano.exchange nano vlm "$RUNS/vlm-colorful/final" . "$RUNS/nano-exchanged"
"$BIN/spear" train nano-vla --labels "$RUNS/labels-colorful" "$RUNS/labels-default" \
    --episodes "$RUNS/episodes-colorful" "$RUNS/episodes-varied" "$RUNS/episodes-default" \
    --sampling-weights 0.5 0.15 0.35 --init "$RUNS/nano-exchanged" --out "$RUNS/vla-colorful" --steps 3600 \
    --set lr=4e-4 warmup=200 'lr_scale={"vlm":0.4,"vlm.vision_tower":0.15}' 'frozen=["vlm.moge"]'
"$BIN/spear" evaluate --policy "$RUNS/vla-colorful" --num-scenes 10 --shift all --videos 0 --out "$RUNS/shifts-colorful"
