#!/usr/bin/env bash
# Install what tests need from Debian: SLURM, and ip of iproute2. Does nothing where all of it is there. Needs root.
set -euo pipefail
packages=()
command -v slurmctld >/dev/null || packages+=(slurmctld slurmd slurm-client munge)
command -v ip >/dev/null || packages+=(iproute2)
if ((${#packages[@]} == 0)); then
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# the daemons that the packages start, where there is an init, are not needed: the tests start their own
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
