#!/usr/bin/env bash
# Run a command in the CPU image: setup/docker/run_cpu.sh python train_rl.py --num_seeds 8
# Results go to the repository's runs/. Compiled programs are kept on the host, so a second start does not compile.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# > 0)) || refuse "a command is missing: run_cpu.sh <command>, for example run_cpu.sh python train_rl.py."
run_image cpu -- "$@"
