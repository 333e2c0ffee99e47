#!/bin/sh
# What only a GPU can tell, in some eight minutes on an H200: the tests that need one and the tables of
# benchmarks/measurements.md. Most telling first; each has its time limit and its log in FOLDER.
#   sh scripts/gpu.sh [FOLDER]        # runs/gpu; PYTHON=... for another interpreter than .venv's
set -u
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$folder"

run() { # NAME SECONDS ARGUMENT...
    name=$1 most=$2
    shift 2
    echo "== $name ($(date +%T))"
    timeout "$most" "$python" "$@" >"$folder/$name.log" 2>&1 || echo "$name: exit code $?"
    tail -n "${lines:-6}" "$folder/$name.log"
}
spear='import sys; from spear.cli import main; sys.exit(main(sys.argv[1:]))'

run few-rows 60 benchmarks/models/few_rows.py
lines=8 run doctor-spear1 90 -c "$spear" doctor --device cuda --preset spear1 --out "$folder/spear1.html"
run steps 60 benchmarks/models/train_step.py --device cuda --presets spear1 --batch-size 16 --frozen none vlm --alone
run answers 60 benchmarks/models/vlm_decode.py --device cuda --presets spear1 --dtypes bfloat16
run actions 180 benchmarks/models/policy_latency.py --device cuda --presets spear1 --dtypes bfloat16 --views 2 \
    --moge --compiled
lines=8 run doctor-nano 60 -c "$spear" doctor --device cuda --out "$folder/nano.html"
run tests 180 -m pytest -n 6 --dist loadgroup tests/models tests/train/test_devices.py tests/test_doctor.py
