#!/usr/bin/env bash
# Submits a run to a Slurm cluster with GPUs: one process per GPU, or one per node.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --partition=gpu --restarts=20 -- \
#       .venv/bin/python -m dec_diffusion.main --config=configs/clusterddpm.py:images \
#       --config.data.path=/shared/photos --workdir=/shared/runs/photos
#
# The processes find each other through Slurm. Command, data and workdir must be on a file system
# that all nodes see; the job runs in the present folder.
#
# Options:
#   --nodes=N        (1)
#   --gpus=N         of each node (1)
#   --per=gpu|node   what a process owns (gpu)
#   --cpus=N         of each process; the cluster's default if left out
#   --time=TIME      limit, [days-]hours:minutes:seconds; the cluster's default if left out
#   --partition=NAME, --account=NAME   where and for whom, if the cluster asks
#   --name=NAME      of the job (dec-diffusion)
#   --output=FILE    for what the job prints; %j is its number (NAME-%j.log)
#   --restarts=N     how often to go on after the time limit (10)
#   --warning=N      seconds before the time limit at which the run is told to save (300)
#   --dry-run        print the job instead of submitting it
#   --help           print this
#
# Near its time limit the run gets SIGTERM, saves and ends with status 75, which puts the job back
# into the queue: it resumes there. After pre-emption Slurm itself does that. Bad arguments: status 2.

set -euo pipefail
# shellcheck source=launch/command.sh
. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

nodes=1 gpus=1 per=gpu cpus='' time='' partition='' account='' name=dec-diffusion output=''
restarts=10 warning=300
parse "nodes gpus per cpus time partition account name output restarts warning" "$@"
whole nodes 1
whole gpus 1
whole cpus 1
whole restarts 0
whole warning 0
((warning <= 65535)) || fail "--warning=$warning: must be at most 65535"
[[ $per == gpu || $per == node ]] || fail "--per=$per: must be gpu or node"
[[ -z $time || $time =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] ||
  fail "--time=$time: give [days-]hours:minutes:seconds, say --time=24:00:00"
: "${output:=$name-%j.log}"
# Slurm reads its directives literally, quotes and all.
for option in partition account name output; do
  [[ ${!option} != *[[:space:]\'\"\\]* ]] ||
    fail "--$option=${!option}: must have no spaces, quotes or backslashes"
done

tasks=1 devices=''
if [[ $per == gpu ]]; then
  tasks=$gpus
else
  # Unless told, JAX uses one GPU for each process that Slurm starts.
  devices=0
  for ((gpu = 1; gpu < gpus; gpu++)); do devices+=,$gpu; done
fi

# In the job: signals are for srun and its processes, the shell must live to see their status. A
# process that has saved does not end the others, which may still be writing.
job() {
  cat <<END
#!/usr/bin/env bash
$(printf '#SBATCH --%s\n' "job-name=$name" "output=$output" open-mode=append requeue \
    "nodes=$nodes" "ntasks-per-node=$tasks" "gpus-per-node=$gpus" ${cpus:+"cpus-per-task=$cpus"} \
    ${time:+"time=$time"} ${partition:+"partition=$partition"} ${account:+"account=$account"} \
    "signal=TERM@$warning")
set -uo pipefail
trap : TERM
${devices:+export JAX_LOCAL_DEVICE_IDS=$devices}
srun --kill-on-bad-exit=0 --wait=600 ${cpus:+--cpus-per-task=$cpus }$(quote_all "${command[@]}")
status=\$?
if [ "\$status" -eq $PREEMPTED ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then
  echo "saved; back into the queue"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
END
}

if [[ $dry_run == yes ]]; then
  printf "sbatch <<'END OF JOB'\n"
  job
  printf 'END OF JOB\n'
else
  job | sbatch
fi
