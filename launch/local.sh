#!/usr/bin/env bash
# Runs a command as several processes on this machine, which find each other on localhost.
#
#   launch/local.sh --processes=2 --devices=4 -- \
#       python -m dec_diffusion.main --config=configs/clusterddpm.py --workdir=runs/two
#
# The command is given --distributed=on, --coordinator, --num_processes and --process_id besides
# its own arguments. A single process drives all accelerators of a machine by itself: this is for
# trying out, on a CPU, what a pod does.
#
# Options:
#   --processes=N   how many (2)
#   --devices=N     simulated CPU devices of each process; the devices of the machine if left out
#   --port=N        of the coordinator, process 0; a free one if left out
#   --grace=N       seconds that processes have to stop before they are killed (60)
#   --dry-run       print the commands instead of running them
#   --help          print this
#
# If one process fails, the others are stopped, and its exit status is that of this script. SIGTERM,
# SIGINT and SIGHUP are passed on to all processes as SIGTERM: they save and end with status 75, and
# the same command resumes. Bad arguments: status 2.

set -euo pipefail
# shellcheck source=launch/command.sh
. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

processes=2 devices='' port='' grace=60
parse "processes devices port grace" "$@"
whole processes 1
whole devices 1
whole port 1
whole grace 0

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

if [[ -z $port ]]; then
  port=$((20000 + RANDOM % 12000))
  while listening "$port"; do port=$((20000 + RANDOM % 12000)); done
elif ((port > 65535)); then
  fail "--port=$port: must be at most 65535"
elif [[ $dry_run == no ]] && listening "$port"; then
  fail "--port=$port: is in use; give another, or leave it out"
fi

environment=()
if [[ -n $devices ]]; then
  flag=--xla_force_host_platform_device_count=$devices
  # The last of several flags of one name counts; the variable would win over the flag.
  environment=(env -u JAX_NUM_CPU_DEVICES JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flag")
fi

pids=() # of the processes that still run, by their number
start() {
  local words=(${environment[@]+"${environment[@]}"} "${command[@]}" --distributed=on
    "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$1")
  if [[ $dry_run == yes ]]; then
    run "${words[@]}"
  else
    # A simple command, so that the process is the program itself and gets the signals.
    "${words[@]}" &
    pids[$1]=$!
  fi
}

signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done
}

deadline=''
stop_all() {
  signal_all TERM
  deadline=$((SECONDS + grace))
}
trap stop_all TERM INT HUP

for ((number = 0; number < processes; number++)); do start "$number"; done

status=0
while ((${#pids[@]})); do
  for number in "${!pids[@]}"; do
    kill -0 "${pids[number]}" 2>/dev/null && continue
    code=0
    wait "${pids[number]}" || code=$?
    unset "pids[number]"
    ((code == 0)) && continue
    ((status)) || status=$code
    if [[ -z $deadline ]]; then
      say "process $number ended with status $code; stopping the others"
      stop_all
    fi
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})); then
    say "killing what has not stopped in $grace seconds"
    signal_all KILL
    grace=5
    deadline=$((SECONDS + grace))
  fi
  sleep 0.1 || true # a signal to the whole group ends it too
done
exit "$status"
