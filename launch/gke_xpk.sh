#!/usr/bin/env bash
# Runs a command on a TPU slice of a GKE cluster, through xpk and a container image.
#
#   launch/gke_xpk.sh --cluster=my-cluster --zone=us-west4-a --type=v5litepod-256 --name=photos \
#       --image=us-docker.pkg.dev/my-project/my-images/dec-diffusion:1 --build --storage=bucket -- \
#       python -m dec_diffusion.main --config=configs/clusterddpm.py:images \
#       --config.data.path=/mnt/bucket/photos --workdir=/mnt/bucket/runs/photos
#
# The cluster exists already (README.md beside this file says how to make it). The hosts find each
# other; data and workdir must be on a storage attached to the cluster.
#
# Options:
#   --cluster=NAME   made by xpk
#   --zone=ZONE      where it is
#   --project=NAME   of Google Cloud; gcloud's own setting if left out
#   --type=TYPE      of the slice, say v5litepod-256
#   --slices=N       how many (1)
#   --name=NAME      of the workload: at most 40 small letters, digits and hyphens
#   --image=IMAGE    container image, in a registry that the cluster can read
#   --build          first build the image from this repository, with docker, and push it
#   --storage=NAME   attached by xpk, to mount; give several as a,b
#   --restarts=N     how often the cluster starts the command again after status 75, or after a
#                    host has failed (10)
#   --dry-run        print the commands instead of running them
#   --help           print this
#
# Status 75 says that the run was pre-empted and has saved, 76 that another host was lost: the same
# command resumes. Other failures of the program end the workload. Bad arguments: status 2.

set -euo pipefail
# shellcheck source=launch/command.sh
. "$(dirname "${BASH_SOURCE[0]}")/command.sh"

cluster='' zone='' project='' type='' slices=1 name='' image='' build=no storage='' restarts=10
parse "cluster zone project type slices name image build? storage restarts" "$@"
require cluster "the cluster's name"
require zone "the zone of the cluster"
require type "the type of the slice"
require name "a name for the workload"
require image "the container image"
whole slices 1
whole restarts 0
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: give at most 40 small letters, digits and hyphens, a letter first"

# xpk pastes the command into YAML and a shell script. exec, so that the program and not a shell
# around it gets SIGTERM.
line="exec $(quote_all "${command[@]}")"
[[ $line != *$'\n'* ]] || fail "the command has a line break in an argument; leave it out"

if [[ $build == yes ]]; then
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  run docker build --platform=linux/amd64 "--file=$here/Dockerfile" "--tag=$image" "${here%/launch}"
  run docker push "$image"
fi

mounted=()
for one in ${storage//,/ }; do mounted+=("--storage=$one"); done
run xpk workload create "--cluster=$cluster" "--zone=$zone" ${project:+"--project=$project"} \
  "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
  ${mounted[@]+"${mounted[@]}"} "--max-restarts=$restarts" "--restart-on-exit-codes=$PREEMPTED,$LOST" \
  --termination-grace-period-seconds=120 "--command=$line"
