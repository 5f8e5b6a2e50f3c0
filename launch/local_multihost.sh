#!/usr/bin/env bash
# Runs N processes on this machine as one training run, as N hosts would be (CPU, or an equal share of the GPUs each):
#   launch/local_multihost.sh 2 --config=configs/mbv2.py:quickstart --workdir=runs/two
# Process 0 speaks here; the others only where something is wrong. The exit code is the first one that is not 0.
set -euo pipefail
usage="usage: $0 [--dry-run] N [flags of main]"
dry=false
[ "${1:-}" = --dry-run ] && { dry=true; shift; }
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2; exit 2; }
count=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
port=${PORT:-$("${PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
gpus=0
if [[ "${JAX_PLATFORMS:-cuda}" =~ cuda|gpu ]]; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=0
  if ((gpus)) && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then   # JAX counts those alone
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES#-1}"
    gpus=${#visible[@]}
  fi
fi
if ((gpus % count)); then
  echo "error: $count processes cannot share $gpus GPUs equally; N can be a divisor of $gpus (or say JAX_PLATFORMS=cpu)" >&2
  exit 2
fi
share=$((gpus / count))
place() {   # of process $1: JAX itself would give each all GPUs
  place=("JAX_PROCESS_ID=$1")
  ((share == 0)) || place+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * share)) $(($1 * share + share - 1)))")
}
if $dry; then
  for ((i = 0; i < count; i++)); do
    place "$i"
    printf '%q ' "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$count" "${place[@]}" \
      "$python" -m lightclip_jax.main "$@"
    echo
  done
  exit 0
fi

processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  if ((i)); then exec 3>/dev/null; else exec 3>&1; fi
  place "$i"
  env "${place[@]}" "$python" -m lightclip_jax.main "$@" >&3 &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  while true; do   # a trapped signal ends `wait`, but not the process
    wait "$process" && one=0 || one=$?
    kill -0 "$process" 2>/dev/null || break
  done
  ((code)) || code=$one
done
exit "$code"
