#!/usr/bin/env bash
# Set-up step of the Makefile: a virtual environment with PillSnap and its pinned dependencies.
set -euo pipefail

usage() { cat <<'TXT'
usage: scripts/core/setup_venv.sh [--help]

Makes .venv beside settings.ini if there is none and installs PillSnap into it (editable, with the developer tools),
with the exact versions of constraints.txt. Does nothing when it was done before with the same files.

  PYTHON=python3.12   the interpreter to build on; 3.11 or 3.12 (default: the first of python3.11, python3.12, python3)
  VENV=.venv          where the environment goes
TXT
}
say() { printf '%s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case "${1:-}" in -h|--help) usage; exit 0;; "") ;; *) usage >&2; exit 2;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV=${VENV:-.venv}

# Debian packages: installed when we may, otherwise named.
apt_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "setup: installing Debian's $*"
  DEBIAN_FRONTEND=noninteractive apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
supported() { case "$1" in 3.11|3.12) return 0;; *) return 1;; esac; }
interpreter() {
  local p v
  if [ -n "${PYTHON:-}" ]; then
    v=$(version_of "$PYTHON")
    supported "$v" || die "PYTHON=$PYTHON is ${v:+Python }${v:-no Python}; PillSnap runs on Python 3.11 and 3.12"
    say "$PYTHON"; return
  fi
  for p in python3.11 python3.12 python3 python; do
    supported "$(version_of "$p")" && { say "$p"; return; }
  done
  die "no Python 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python3.12 $0"
}

if [ -x "$VENV/bin/python" ] && ! supported "$(version_of "$VENV/bin/python")"; then
  die "$VENV does not hold a working Python 3.11 or 3.12; remove it (rm -r $VENV) and run this again"
fi

# What the installation depends on; the folder too, because an editable install points at it.
stamp_now=$( { pwd; "$VENV/bin/python" -V 2>&1 || true; cat constraints.txt settings.ini setup.py pyproject.toml; } | sha256sum | cut -d' ' -f1)
if [ -f "$VENV/.pillsnap-setup" ] && [ "$(cat "$VENV/.pillsnap-setup")" = "$stamp_now" ]; then exit 0; fi

if [ ! -x "$VENV/bin/python" ]; then
  py=$(interpreter)
  say "setup: making $VENV with $($py -V)"
  "$py" -m venv "$VENV" || { rm -rf "$VENV"
    apt_install "python$(version_of "$py")-venv" || die "$py cannot make virtual environments; install Debian's python$(version_of "$py")-venv and run this again"
    "$py" -m venv "$VENV"; }
fi

say "setup: installing the pinned packages (several minutes the first time)"
rm -f "$VENV/.pillsnap-setup"
"$VENV/bin/python" -m pip install --disable-pip-version-check -q -e '.[train,lab,serve,dev]' -c constraints.txt
# albumentations asks for opencv-python-headless, which would lie in one folder with ultralytics' opencv-python: without its dependencies, which are here.
"$VENV/bin/python" -m pip install --disable-pip-version-check -q --no-deps albumentations albucore simsimd stringzilla -c constraints.txt

# opencv-python (it comes with ultralytics) needs two system libraries that a bare server lacks.
if ! "$VENV/bin/python" -c 'import cv2' 2>/dev/null; then
  apt_install libgl1 libglib2.0-0 || true
  "$VENV/bin/python" -c 'import cv2' || die "OpenCV does not load; install libgl1 and libglib2.0-0 (sudo apt-get install libgl1 libglib2.0-0) and run this again"
fi
"$VENV/bin/python" -c 'import pillsnap, torch, torchvision' || die "the installation does not import; see the lines above"

{ pwd; "$VENV/bin/python" -V 2>&1; cat constraints.txt settings.ini setup.py pyproject.toml; } | sha256sum | cut -d' ' -f1 > "$VENV/.pillsnap-setup"
say "setup: ready"
