#!/bin/sh
# Do 3D questions about images without robots help a policy in laboratories that no demonstration shows?
#
#   sh experiments/labs/run.sh data        labels images and records demonstrations
#   sh experiments/labs/run.sh stage0      trains the encoders on these images, and a SPEAR-VLM with them
#   sh experiments/labs/run.sh 3d          trains and scores policies whose SPEAR-VLM was asked 3D questions
#   sh experiments/labs/run.sh 3d-no-moge  the same without a depth encoder
#   sh experiments/labs/run.sh 2d          the same, whose VLM was asked 2D questions about the same images
#   sh experiments/labs/run.sh no-images   the same, whose VLM saw none of these images
#   sh experiments/labs/run.sh more-data   labels four times as many images
#   sh experiments/labs/run.sh more        trains two SPEAR-VLMs with them, from that of stage0 and from nano-vlm, and
#                                          one VLM with 2D questions
#   sh experiments/labs/run.sh 3d-more     trains policies from the first SPEAR-VLM of more, for twice as many steps
#   sh experiments/labs/run.sh 2d-more     the same with the VLM of more that was asked 2D questions
#
# The rows 3d, 3d-no-moge, 2d and no-images begin with the shipped nano-vlm-0 and nano-depth, which know the default
# world only. The rows can run side by side, one process each. Stopped at any moment, the same command continues where
# it was. PROCESSES=2 trains a VLM on two cores.
set -eu
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs/labs}
SEEDS=${SEEDS:-0 1}
LABS=${LABS:-4 64}
export OMP_NUM_THREADS=1
TASKS="put_on put_in_basket spoon_on_towel"
VLM_STEPS=2600
TRAIN_VLM="$BIN/torchrun --standalone --nproc-per-node ${PROCESSES:-1} --no-python $BIN/spear train"
POLICY_STEPS=1200

make_data() {
    # Images without a robot, and one in ten with it, of surroundings that no laboratory has.
    "$BIN/spear" label --world colorful --no-robot --num-scenes 4000 --first-seed 440000 --out "$RUNS/labels-3d"
    "$BIN/spear" label --world colorful --num-scenes 440 --first-seed 450000 --out "$RUNS/labels-robot"
    for labs in $LABS; do  # as many demonstrations, of the same tasks, in few or in many laboratories
        "$BIN/spear" record --world "colorful-labs:$labs" --tasks $TASKS --num-episodes 500 --out "$RUNS/episodes-$labs"
    done
}

make_more_data() {
    "$BIN/spear" label --world colorful --no-robot --num-scenes 14000 --first-seed 460000 --out "$RUNS/labels-more"
}

train_stage0() {
    labels="$RUNS/labels-3d $RUNS/labels-robot"
    "$BIN/spear" train nano-siglip --labels $labels --init nano-vlm-0 --out "$RUNS/siglip-colorful" \
        --steps 3000 --lr 8e-4 --set 'frozen=["vlm.language_model"]'
    "$BIN/spear" train nano-depth --labels $labels --init nano-depth --out "$RUNS/depth-colorful" --steps 10000
    "$BIN/spear" train nano-vlm-0 --labels $labels --init "$RUNS/siglip-colorful" --out "$RUNS/vlm-0-colorful" \
        --steps 1500 --lr 3e-4
    $TRAIN_VLM nano-vlm-1 --labels $labels --init "$RUNS/vlm-0-colorful" \
        --init-depth-encoder "$RUNS/depth-colorful" --out "$RUNS/vlm-3d-stage0-1" \
        --set 'lr_scale={"multi_modal_projector":0.02,"moge_projector":0.02}'
    $TRAIN_VLM nano-vlm-2 --labels $labels --init "$RUNS/vlm-3d-stage0-1" --out "$RUNS/vlm-3d-stage0" --steps 4200
}

train_with_more_data() {
    labels="$RUNS/labels-3d $RUNS/labels-robot $RUNS/labels-more"
    $TRAIN_VLM nano-vlm-2 --labels $labels --init "$RUNS/vlm-3d-stage0" --out "$RUNS/vlm-3d-more" \
        --steps 6000 --lr 3e-4
    $TRAIN_VLM nano-vlm-2 --labels $labels --init nano-vlm --out "$RUNS/vlm-nano-more" --steps 5000 --lr 2.5e-4
    $TRAIN_VLM nano-vlm-0 --labels $labels --init "$RUNS/vlm-0-colorful" --out "$RUNS/vlm-2d-more" \
        --steps 6000 --lr 3e-4 --set 'frozen=[]' 'lr_scale={"vision_tower":0.3}'
}

train_vlm() {
    case $1 in
    3d)
        $TRAIN_VLM nano-vlm-1 --labels "$RUNS/labels-3d" "$RUNS/labels-robot" --init nano-vlm-0 \
            --init-depth-encoder nano-depth --out "$RUNS/vlm-3d-1" \
            --set 'lr_scale={"multi_modal_projector":0.02,"moge_projector":0.02}'
        $TRAIN_VLM nano-vlm-2 --labels "$RUNS/labels-3d" "$RUNS/labels-robot" --init "$RUNS/vlm-3d-1" \
            --out "$RUNS/vlm-3d" --steps "$VLM_STEPS" --lr 2.5e-4
        ;;
    3d-no-moge)
        $TRAIN_VLM nano-vlm-1 --labels "$RUNS/labels-3d" "$RUNS/labels-robot" --init nano-vlm-0 \
            --out "$RUNS/vlm-3d-no-moge-1" --set moge=false 'lr_scale={"multi_modal_projector":0.02}' \
            'trained=["multi_modal_projector","language_model.embed_tokens"]'
        $TRAIN_VLM nano-vlm-2 --labels "$RUNS/labels-3d" "$RUNS/labels-robot" --init "$RUNS/vlm-3d-no-moge-1" \
            --out "$RUNS/vlm-3d-no-moge" --steps "$VLM_STEPS" --lr 2.5e-4 --set moge=false \
            'lr_scale={"vision_tower":0.3}'
        ;;
    2d)
        $TRAIN_VLM nano-vlm-0 --labels "$RUNS/labels-3d" "$RUNS/labels-robot" --init nano-vlm-0 \
            --out "$RUNS/vlm-2d" --steps "$((VLM_STEPS + 200))" --lr 2.5e-4 \
            --set 'frozen=[]' 'lr_scale={"vision_tower":0.3}'
        ;;
    esac
}

train_policy() {  # ROW LABS SEED; the settings are those of experiments/ablations/rows.toml
    row=$1; labs=$2; seed=$3
    case $row in
    3d) init=$RUNS/vlm-3d; moge=true; frozen='["vlm.moge","vlm.vision_tower.embeddings"]' ;;
    3d-no-moge) init=$RUNS/vlm-3d-no-moge; moge=false; frozen='["vlm.vision_tower.embeddings"]' ;;
    2d) init=$RUNS/vlm-2d; moge=false; frozen='["vlm.vision_tower.embeddings"]' ;;
    no-images) init=nano-vlm-0; moge=false; frozen='["vlm.vision_tower.embeddings"]' ;;
    3d-more) init=$RUNS/vlm-3d-more; moge=true; frozen='["vlm.moge","vlm.vision_tower.embeddings"]' ;;
    2d-more) init=$RUNS/vlm-2d-more; moge=false; frozen='["vlm.vision_tower.embeddings"]' ;;
    esac
    steps=$POLICY_STEPS
    case $row in *-more) steps=$((2 * POLICY_STEPS)) ;; esac
    "$BIN/spear" train nano-vla --episodes "$RUNS/episodes-$labs" --init "$init" --seed "$seed" \
        --out "$RUNS/policies/$row-$labs-$seed" --steps "$steps" --lr 6e-4 \
        --set "moge=$moge" "frozen=$frozen" question_images=0 \
        'lr_scale={"vlm":0.4166666666666667,"vlm.vision_tower":0.125}' \
        'flow={"rotation":"s3","rotation_loss":"cosine","rotation_weight":200.0,"steps":10}'
}

score_policy() {  # ROW LABS SEED
    policy=$RUNS/policies/$1-$2-$3
    # Held-out scenes from 1,000 on stand in laboratories of the same numbers. Demonstrations show 0 to 63 only.
    "$BIN/spear" evaluate --policy "$policy" --world colorful-labs:1000000 --first-seed 1000 --num-scenes 60 \
        --tasks $TASKS --out "$RUNS/scores/unseen-$1-$2-$3"
    # Held-out scenes in the laboratories of the demonstrations.
    "$BIN/spear" evaluate --policy "$policy" --world "colorful-labs:$2" --first-seed 1000 --num-scenes 20 \
        --tasks $TASKS --out "$RUNS/scores/seen-$1-$2-$3"
}

case $1 in
data) make_data ;;
more-data) make_more_data ;;
more) train_with_more_data ;;
stage0) train_stage0 ;;
3d | 3d-no-moge | 2d | no-images | 3d-more | 2d-more)
    train_vlm "$1"  # those of the last two rows come from more
    for seed in $SEEDS; do
        for labs in $LABS; do
            train_policy "$1" "$labs" "$seed"
            score_policy "$1" "$labs" "$seed"
        done
    done
    ;;
*)
    echo "run.sh: choose data, stage0, more-data, more, 3d, 3d-no-moge, 2d, no-images, 3d-more or 2d-more" >&2
    exit 2
    ;;
esac
