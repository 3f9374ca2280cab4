#!/usr/bin/env bash
# A stage of dvc.yaml: stage.sh SCALE RULE TARGET ... runs one rule; without arguments it composes params.yaml.
# {1..N} in a target stands for N targets. SNAKEMAKE_PROFILE chooses where jobs run, by default on this machine.
set -euo pipefail

for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$PWD/.venv"; do
  if [ -x "$environment/bin/snakemake" ]; then
    PATH="$environment/bin:$PATH"
    break
  fi
done
command -v snakemake > /dev/null || { echo "stage.sh: error: there is no snakemake: run \`make setup\`" >&2; exit 2; }
[ $# -gt 0 ] || exec python -m rcm stages --values

scale=$1 rule=$2 targets=()
for target in "${@:3}"; do
  if [[ $target =~ ^(.*)\{1\.\.([0-9]+)\}(.*)$ ]]; then
    for ((k = 1; k <= BASH_REMATCH[2]; k++)); do targets+=("${BASH_REMATCH[1]}$k${BASH_REMATCH[3]}"); done
  else
    targets+=("$target")
  fi
done
exec snakemake --profile "${SNAKEMAKE_PROFILE:-workflow/profiles/local}" --config "scale=$scale" --notemp \
  --quiet progress host --allowed-rules "$rule" -- "${targets[@]}"
