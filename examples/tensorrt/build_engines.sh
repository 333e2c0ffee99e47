#!/bin/sh
# Builds TensorRT engines of the two graphs that `spear export onnx` writes, and times them.
#
# NOT RUN: no machine with TensorRT was at hand when this script was written. It uses only options
# that the documentation of trtexec (TensorRT 10) lists.
#
#     spear export onnx --policy runs/mine --out runs/onnx
#     sh examples/tensorrt/build_engines.sh runs/onnx
#
# Build on the device that will act, because an engine fits one GPU and one version of TensorRT. The
# shapes of the graphs are fixed, so no shapes are given here.
set -eu

folder=${1:?give the folder that spear export onnx has written}
precision=${2:---fp16}  # or --bf16, or --stronglyTyped for the float32 of the graphs

for name in prefix flow_step; do
    trtexec --onnx="$folder/$name.onnx" --saveEngine="$folder/$name.engine" "$precision" \
        --useCudaGraph --warmUp=200 --iterations=100
done

# The prefix runs once per observation, and the flow step as often as "steps" in export.json says.
# Its outputs `keys` and `values` are inputs of the flow step: leave them on the GPU.
# The rotary embeddings and the norms may need more than float16. Compare the actions of the engines
# with those of the graphs before a robot moves.
