#!/bin/bash
# sbatch docs/launch/slurm.sh: two nodes of eight GPUs, a process a GPU, ten jobs one after the other.
#SBATCH --job-name=gla
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=04:00:00
#SBATCH --signal=TERM@120 --array=1-10%1
#SBATCH --output=gla-%A-%a.log
set -euo pipefail
source "$HOME/env/bin/activate"
srun --kill-on-bad-exit=1 \
  gatedjax-train --config=gla_1p3b --workdir="$SCRATCH/runs/gla" \
    --config.data.cache_dir="$SCRATCH/cache" --compile_cache="$SCRATCH/xla"
