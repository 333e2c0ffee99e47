#!/bin/sh
# Are actions better measured from the pose where the action before them ends, or from the observed pose?
#
#   sh experiments/action_reference/run.sh data        records demonstrations
#   sh experiments/action_reference/run.sh previous    trains and scores policies whose actions follow one another
#   sh experiments/action_reference/run.sh observed    the same with actions measured from the observed pose
#
# The last two can run side by side, one process each. Stopped at any moment, the same command continues where it was.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs/action_reference}
SEEDS=${SEEDS:-0 1 2}
export OMP_NUM_THREADS=1
TASKS="put_on put_in_basket spoon_on_towel"
STEPS=${STEPS:-2000}
SCENES=${SCENES:-30}  # of each task

train_policy() {  # REFERENCE SEED; the settings are those of experiments/ablations/rows.toml
    "$BIN/spear" train nano-vla --episodes "$RUNS/episodes" --init nano-vlm --seed "$2" \
        --out "$RUNS/policies/$1-$2" --steps "$STEPS" --lr 6e-4 \
        --set "action_reference=$1" question_images=0 'frozen=["vlm.moge","vlm.vision_tower.embeddings"]' \
        'lr_scale={"vlm":0.4166666666666667,"vlm.vision_tower":0.125}' \
        'flow={"rotation":"s3","rotation_loss":"cosine","rotation_weight":200.0,"steps":10}'
}

score_policy() {  # REFERENCE SEED: success, and the changes of velocity at the seams, at three latencies
    "$BIN/python" benchmarks/evaluate/latency_study.py "$RUNS/policies/$1-$2" "$SCENES" "$RUNS/scores/$1-$2" \
        --tasks $TASKS --rows sync/1 async/1
}

case ${1:-} in
data) "$BIN/spear" record --tasks $TASKS --num-episodes 500 --out "$RUNS/episodes" ;;
previous | observed)
    for seed in $SEEDS; do
        train_policy "$1" "$seed"
        score_policy "$1" "$seed"
    done
    ;;
*)
    echo "run.sh: choose data, previous or observed" >&2
    exit 2
    ;;
esac
