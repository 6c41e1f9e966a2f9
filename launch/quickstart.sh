#!/usr/bin/env bash
# Train a small model on embedded real images, sample it and score the samples. Minutes on two CPU cores.
#
# usage: bash launch/quickstart.sh [dit|dis|udit|diffit|diffit-latent|digit]    -> runs/quickstart-<model>/{samples.npz,samples.png,scores.json}
# DIFFJAX_VENV names an environment to reuse.
set -euo pipefail
model="${1:-dit}"
. "$(dirname "$0")/environment.sh" ""  # no extras; without an argument it would see ours

run="runs/quickstart-$model"
if [ "$model" = digit ]; then
  "$PYTHON" -m diffjax tokenize --config="configs/quickstart.py:model=$model" --out="$run/tokens"
fi
"$PYTHON" -m diffjax train --config="configs/quickstart.py:model=$model" --workdir="$run"
"$PYTHON" -m diffjax sample --workdir="$run" --num=500 --out="$run/samples.npz"
"$PYTHON" -m diffjax evaluate --samples="$run/samples.npz" --reference=digits --out="$run/scores.json"
echo "look at $run/samples.png"
