#!/usr/bin/env bash
# A stage of dvc.yaml: stage.sh SCALE RULE[,RULE] TARGET ... runs one rule, with those of its temporary
# inputs; without arguments it composes params.json.
# {1..N} in a target stands for N targets. SNAKEMAKE_PROFILE chooses where jobs run, by default on this machine.
set -euo pipefail

for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$PWD/.venv"; do
  if [ -x "$environment/bin/rcm" ]; then
    PATH="$environment/bin:$PATH"
    break
  fi
done
for program in rcm snakemake; do
  command -v "$program" > /dev/null || { echo "stage.sh: error: there is no $program: run \`make setup\`" >&2; exit 2; }
done
[ $# -gt 0 ] || exec rcm stages --values

scale=$1 rules=$2 targets=()
for target in "${@:3}"; do
  if [[ $target =~ ^(.*)\{1\.\.([0-9]+)\}(.*)$ ]]; then
    for ((k = 1; k <= BASH_REMATCH[2]; k++)); do targets+=("${BASH_REMATCH[1]}$k${BASH_REMATCH[3]}"); done
  else
    targets+=("$target")
  fi
done
# the rules refuse jobs other than DVC takes them for
export RCM_STAGE=1
exec snakemake --profile "${SNAKEMAKE_PROFILE:-workflow/profiles/local}" --config "scale=$scale" \
  --quiet progress host --allowed-rules ${rules//,/ } -- "${targets[@]}"
