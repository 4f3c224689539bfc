#!/usr/bin/env bash
# Are the notebooks clean, and is the package what they export? Works on a copy, so nothing here is changed and no git is needed.
set -euo pipefail

usage() { cat <<'TXT'
usage: scripts/core/in_step.sh clean|export

  clean    the notebooks are as nbdev_clean leaves them
  export   pillsnap/ is as nbdev_export writes it
TXT
}
case "${1:-}" in clean|export) what=$1;; -h|--help) usage; exit 0;; *) usage >&2; exit 2;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=$PWD
bin=$(cd "${VENV:-.venv}/bin" && pwd)
copy=$(mktemp -d); trap 'rm -rf "$copy"' EXIT

for f in settings.ini setup.py pyproject.toml README.md _quarto.yml nbs pillsnap; do [ ! -e "$f" ] || cp -a "$f" "$copy/"; done
find "$copy" -name __pycache__ -prune -exec rm -rf {} +
find "$copy" -name .ipynb_checkpoints -prune -exec rm -rf {} +
cd "$copy"
"$bin/nbdev_$what"
case $what in clean) part=nbs; mend="run nbdev_clean";; export) part=pillsnap; mend="edit the notebook, never the .py, then run nbdev_export";; esac
if ! diff -r -x __pycache__ -x .ipynb_checkpoints "$here/$part" "$copy/$part" > "$copy/diff"; then
  printf '%s-check: %s/ is out of step (< as it is, > as it should be); %s\n' "$what" "$part" "$mend" >&2
  cut -c1-160 "$copy/diff" | head -40 >&2
  exit 1
fi
printf '%s-check: %s/ is in step\n' "$what" "$part"
