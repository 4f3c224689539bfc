#!/usr/bin/env bash
# Train as a plain batch job: one command, logs in the run folder, the trainer's own exit status.
set -uo pipefail

usage() { cat <<'TXT'
usage: scripts/train.sh [--config NAME|FILE] [--stage STAGE|all] [key=value ...]

Runs `pillsnap run STAGE --config NAME key=value ...` and keeps what it prints.

  --config   a preset of configs/ or a YAML file      (default: demo)
  --stage    all, or one stage such as classifier     (default: all)
  key=value  dotted overrides, for example train.seed=7 paths.exp_dir=./_runs/exp02
  VENV=.venv the environment; made by scripts/core/setup_venv.sh if there is none

Output: <run>/logs/train.out and train.err. Exit status: the trainer's.
TXT
}
say() { printf '[train.sh] %s\n' "$*"; }

config=demo stage=all overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) usage; exit 0;;
    --config|--stage) [ $# -ge 2 ] || { usage >&2; exit 2; }; [ "$1" = --config ] && config=$2 || stage=$2; shift 2;;
    --config=*) config=${1#*=}; shift;;
    --stage=*) stage=${1#*=}; shift;;
    -*) printf 'train.sh: no such option: %s\n' "$1" >&2; usage >&2; exit 2;;
    *=*) overrides+=("$1"); shift;;
    *) printf 'train.sh: not an override (key=value): %s\n' "$1" >&2; usage >&2; exit 2;;
  esac
done

# 1. the environment
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$top/.venv}
[ -x "$VENV/bin/python" ] || VENV="$VENV" "$top/scripts/core/setup_venv.sh" || exit $?
PATH="$VENV/bin:$PATH"; export PATH

# 2. the configuration: refused here, before anything is made, when a key is wrong
core=$("$VENV/bin/python" - "$config" ${overrides[@]+"${overrides[@]}"} <<'PY'
import sys
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
try: cfg = load_config(sys.argv[1], sys.argv[2:])
except PillsnapError as e: sys.exit(str(e))
c, d = cfg.train.classification, cfg.train.detection
print(cfg.paths.exp_dir)
print(f"data        {cfg.data.source}, {cfg.paths.root}, stage {cfg.data.progressive_validation.current_stage}, seed {cfg.train.seed}")
print(f"classifier  {c.backbone}, {cfg.data.classification.img_size} px, {c.epochs} epochs, batch {c.batch_size}, lr {c.lr:g}, {c.optimizer}, {c.scheduler}")
print(f"detector    {d.model}, {cfg.data.detection.img_size} px, {d.epochs} epochs, batch {d.batch_size}")
PY
) || exit 2
run=$(head -n 1 <<<"$core")

# 3. the folders
mkdir -p "$run"/{logs,tb,reports,checkpoints,export,notebooks,hard_cases} || { say "cannot write the run folder $run"; exit 1; }
out=$run/logs/train.out err=$run/logs/train.err

say "run folder  $run"
tail -n +2 <<<"$core" | while IFS= read -r line; do say "$line"; done
say "command     pillsnap run $stage --config $config ${overrides[*]-}"
{ printf -- '--- %s  pillsnap run %s --config %s %s\n' "$(date -Is)" "$stage" "$config" "${overrides[*]-}"; } | tee -a "$out" >> "$err"

# 4. the trainer, seen here and kept there; Ctrl-C reaches it, and what it says last is still written
trap : INT
{
  { pillsnap run "$stage" --config "$config" ${overrides[@]+"${overrides[@]}"} 2>&1 >&3 3>&- | tee -ia "$err" >&2; exit "${PIPESTATUS[0]}"; } 3>&1
} | tee -ia "$out"
status=${PIPESTATUS[0]}

# 5. how it ended
case $status in
  0)   say "SUCCESS";;
  1)   say "FAILED (1): an unexpected error; the traceback is in $err";;
  2)   say "REFUSED (2): something to mend; the reason stands above and in $err";;
  126|127) say "NOT STARTED ($status): pillsnap is not in $VENV; run scripts/core/setup_venv.sh";;
  130) say "INTERRUPTED (130): the same command continues from the last checkpoint";;
  137) say "KILLED (137): by hand or for lack of memory; the same command continues from the last checkpoint";;
  139) say "CRASHED (139): segmentation fault in a native library; see $err";;
  143) say "TERMINATED (143): the same command continues from the last checkpoint";;
  *)   say "FAILED ($status): see $err";;
esac
if [ "$status" = 0 ]; then
  if [ -f "$run/reports/metrics.json" ]; then say "$run/reports/metrics.json:"; cat "$run/reports/metrics.json"; echo
  else say "no reports/metrics.json: this run trained nothing"; fi
else
  tail -n 5 "$err" >&2
fi
exit "$status"
