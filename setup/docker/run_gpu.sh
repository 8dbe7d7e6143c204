#!/usr/bin/env bash
# Run a command in the GPU image on the named GPUs: setup/docker/run_gpu.sh 0,1 python sweep.py omd_capacity
# Results go to the repository's runs/. Compiled programs are kept on the host, so a second start does not compile.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The numbers that the driver knows, one per line; nothing where it cannot be asked.
known_gpus() { nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true; }

check_gpus() {
  local number known
  [[ "$1" == all ]] && return
  [[ "$1" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    refuse "the GPU ids are '$1', but must be numbers with commas, such as 0 or 0,2, or all."
  known=$(known_gpus)
  for number in ${1//,/ }; do
    [[ "$(tr ',' '\n' <<<"$1" | grep --count --line-regexp "$number")" == 1 ]] ||
      refuse "GPU $number is named twice in '$1'."
    if [[ -n "$known" ]] && ! grep --quiet --line-regexp "$number" <<<"$known"; then
      refuse "there is no GPU $number here: the driver knows ${known//$'\n'/, }."
    fi
  done
}

(($# > 1)) ||
  refuse "arguments are missing: run_gpu.sh <GPU ids> <command>, for example run_gpu.sh 0 python train_rl.py."
gpus=$1
shift
check_gpus "$gpus"
[[ "$gpus" == all ]] || gpus="\"device=$gpus\"" # docker splits at commas outside of quotes
# Processes on several GPUs exchange data through shared memory; the engine's default of 64 MB is too small.
run_image gpu --gpus "$gpus" --shm-size 2g -- "$@"
