#!/usr/bin/env bash
# Lay a delivery, or one COCO file, out for a YOLO detector, and check the labels.
# usage: scripts/prepare_yolo.sh DELIVERY|COCO.json OUT
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,3s/^# //p' "$0"; exit 2; }
exec python - "$1" "$2" <<'PY'
import sys
from pathlib import Path
from pillsnap.core.errors import PillsnapError
from pillsnap.dataset.conversion import convert_coco_to_yolo
from pillsnap.dataset.yolotree import check_yolo_tree
try: y = convert_coco_to_yolo(sys.argv[1], sys.argv[2])
except PillsnapError as e: sys.exit(f"prepare_yolo: {e}")
wrong = check_yolo_tree(y.parent) if (y.parent/"labels"/"train").is_dir() else []
for line in wrong: print(line, file=sys.stderr)
print(f"{y}  ({sum(1 for _ in (y.parent/'labels').rglob('*.txt'))} label files, {len(wrong)} problems)")
sys.exit(bool(wrong))
PY
