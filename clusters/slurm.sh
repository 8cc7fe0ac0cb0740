#!/bin/bash
# One sweep as one Slurm job: Ray starts on all its nodes, `tfkd` runs on the first, and Ray ends with it.
#
#   tfkd cluster check clusters/slurm.sh --space search_spaces/cifar100_tfkd_reg.yaml
#   tfkd cluster submit clusters/slurm.sh -- tfkd tune search_spaces/cifar100_tfkd_reg.yaml --name cifar100-1
#   tfkd cluster status clusters/slurm.sh
#
# Change five lines:  partition, nodes, gpus-per-node, time, and TFKD_RESULTS. GPUs need NVIDIA's driver 580 or later.
# If trials share a GPU, put before srun: srun --ntasks-per-node=1 nvidia-cuda-mps-control -d
# If the job runs out of time or is preempted, submit: tfkd resume $TFKD_RESULTS/cifar100-1
#
#SBATCH --job-name=tfkd
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
# --exclusive: when the sweep ends, Ray's `symmetric-run` ends all your Ray processes on these nodes

set -euo pipefail
TFKD_RESULTS=/shared/$USER/tfkd_results      # experiments and teachers: a directory that all nodes can reach
source "$HOME/tfkd-env/bin/activate"         # with Python 3.11, created once; its versions are checked here:
python -c 'import importlib.metadata as m, sys
wrong = [p for p in sys.argv[1:] if m.version(p.split("==")[0]).split("+")[0] != p.split("==")[1]]
sys.exit(f"tfkd-env has other versions; pip install {chr(32).join(wrong)}" if wrong else 0)' \
  tfkd_ray==0.1.0 ray==2.60.0 torch==2.14.1

# the token: in your home directory, which all nodes see; created once, readable by you alone
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
umask 077
ray get-auth-token --generate > /dev/null
chmod 600 "$HOME/.ray/auth_token"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))       # each job has its own port
case "${2:-}, $* " in
  *" --storage"*) ;;                         # keep a given --storage
  tune,* | teacher,*) set -- "$@" --storage "$TFKD_RESULTS" ;;
esac

# --resources: trials of several workers need it, because their own process takes no CPU
# srun takes CPUs of a task from sbatch no more (Slurm 22.05): without them Ray runs on one core
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  ${SLURM_GPUS_ON_NODE:+--gpus-per-task="$SLURM_GPUS_ON_NODE"} \
  ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --dashboard-host=127.0.0.1 --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
  --resources='{"tfkd_driver": 1000}' \
  -- "$@"
