#!/usr/bin/env bash
# Install what the tests of launch/ need: SLURM and iproute2 from Debian (as root), TorchX and the shapes of Kubernetes' kinds
# from PyPI into .venv-launch. Does nothing where all of it is there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

packages=()
command -v slurmctld >/dev/null || packages+=(slurmctld slurmd slurm-client munge)
command -v ip >/dev/null || packages+=(iproute2)
if ((${#packages[@]})); then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # the daemons that the packages start, where there is an init, are not needed: the tests start their own
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

env=$root/.venv-launch
recipe=$(<"$root/scripts/launch_tools.txt")
if [[ ! -f $env/recipe || $(<"$env/recipe") != "$recipe" ]]; then
  echo "installing into $env ..."
  "${PYTHON:-python3}" -m venv --clear "$env"
  "$env/bin/python" -m pip install -qq --disable-pip-version-check -r "$root/scripts/launch_tools.txt"
  printf '%s\n' "$recipe" >"$env/recipe"
fi
