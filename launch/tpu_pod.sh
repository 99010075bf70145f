#!/usr/bin/env bash
# Runs a command on all hosts of a Cloud TPU slice, through gcloud.
#
#   launch/tpu_pod.sh --name=my-tpu --zone=us-west4-a --restarts=20 \
#       --install=dist/dec_diffusion-0.1.0-py3-none-any.whl -- \
#       python -m dec_diffusion.main --config=configs/clusterddpm.py:images \
#       --config.data.path=/mnt/bucket/photos --workdir=/mnt/bucket/runs/photos
#
# The slice exists already (README.md beside this file says how to make it). The hosts find each
# other; data and workdir must be in a folder that all of them see, such as a mounted bucket.
#
# Options:
#   --name=NAME      of the TPU
#   --zone=ZONE      where it is
#   --project=NAME   of Google Cloud; gcloud's own setting if left out
#   --install=FILE   wheel of this package, installed first, with Python 3.12 and JAX for TPU, in
#                    ~/.dec_diffusion of every host; leave it out once that is done
#   --restarts=N     how often to run the command again after status 75 (0)
#   --dry-run        print the commands instead of running them
#   --help           print this
#
# Status 75 says that the run was pre-empted and has saved: the same command resumes. The exit status
# is that of the last run, as gcloud reports it. Bad arguments: status 2.

set -euo pipefail
# shellcheck source=launch/command.sh
. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

name='' zone='' project='' install='' restarts=0
parse "name zone project install restarts" "$@"
require name "the TPU's name"
require zone "the zone of the TPU"
whole restarts 0
if [[ -n $install ]]; then
  [[ $install =~ (^|/)dec_diffusion-[A-Za-z0-9_.!+]+-py3-none-any\.whl$ ]] ||
    fail "--install=$install: is not a wheel of dec_diffusion; make one with" \
      "python3 -m pip wheel --no-deps --wheel-dir=dist ."
  [[ $dry_run == yes || -f $install ]] || fail "--install=$install: no such file; make it with" \
    "python3 -m pip wheel --no-deps --wheel-dir=dist ."
fi

where=("--zone=$zone" ${project:+"--project=$project"})
gcloud_tpu() { run gcloud compute tpus tpu-vm "$@"; }
on_all_hosts() { gcloud_tpu ssh "$name" "${where[@]}" --worker=all "--command=$1"; }

if [[ -n $install ]]; then
  wheel=${install##*/}
  gcloud_tpu scp "$install" "$name:" "${where[@]}" --worker=all
  # The hosts' own Python is too old; uv brings another.
  # shellcheck disable=SC2016 # $HOME is that of the hosts
  on_all_hosts 'set -e; python3 -m pip install --quiet --user uv; uv="$HOME/.local/bin/uv"; '"$(
    printf '%s' '"$uv" venv --quiet --allow-existing --python=3.12 "$HOME/.dec_diffusion"; '
    printf '%s' '"$uv" pip install --quiet --python="$HOME/.dec_diffusion/bin/python" '
    printf '%s' '--reinstall-package=dec_diffusion '
    printf '"dec_diffusion[tpu] @ file://$HOME/%s"' "$wheel"
  )"
fi

# Prints the state of the TPU once it can be used; ends the script if it will not come back.
await_tpu() {
  local state
  while true; do
    state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)') ||
      state=GONE
    case $state in
      READY) return ;;
      PREEMPTED | TERMINATED | STOPPED | GONE)
        say "TPU $name is $state: delete it, make it again, then give the same command"
        exit "$PREEMPTED"
        ;;
    esac
    say "TPU $name is $state; waiting"
    sleep 30
  done
}

# shellcheck disable=SC2016 # as above
remote='export PATH="$HOME/.dec_diffusion/bin:$PATH"; exec '$(quote_all "${command[@]}")
for ((run_number = 0; ; run_number++)); do
  status=0
  on_all_hosts "$remote" || status=$?
  if ((status != PREEMPTED || run_number >= restarts)); then exit "$status"; fi
  say "pre-empted and saved; restart $((run_number + 1)) of $restarts"
  await_tpu
done
