#!/usr/bin/env python
"""Compare a run folder with figures that were kept before the code was moved or rewritten.

    python scripts/core/golden.py _runs/demo                      compare with benchmarks/golden/demo.json
    python scripts/core/golden.py _runs/demo --write              keep this run's figures

Kept are the hashes of the manifest, the split and the predictions, the scorecard's figures, and what the exported
bundle answers. A change that only moves or renames leaves all of them as they are.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pillsnap.core.files import read_json, save_json, sha256_file

FILES = (
    "manifest.csv",
    "artifacts/test_known.csv",
    "artifacts/stage0/classes.json",
    "artifacts/stage0/manifest_train.csv",
    "artifacts/stage0/manifest_val.csv",
    "artifacts/stage0/manifest_eval_set.csv",
    "reports/predictions_single.csv",
    "reports/predictions_combo.jsonl",
)
PHOTOS = 12  # that the bundle answers, in either mode


def figures(run: Path) -> dict[str, list]:
    "Value and number of photos of each measured row, but for the leak gap, which is a training of its own."
    rows = read_json(run / "reports" / "scorecard.json")["rows"]
    return {r["figure"]: [r["value"], r["n"]] for r in rows if r["figure"] not in ("leak_gap", "memory_stable")}


def answers(run: Path) -> dict[str, list]:
    "Drugs, confidences and boxes that the exported bundle gives."
    from pillsnap.deployment.runtime import load_bundle

    bundle = load_bundle(run, device="cpu", threads=1)
    found = sorted((run / "delivery" / "data" / "train" / "images").rglob("*.png"))
    told = {}
    for photo in found[:: len(found) // PHOTOS][:PHOTOS]:
        for mode in ("single", "combo"):
            items = bundle.predict(photo, mode)["items"]
            told[f"{photo.name} {mode}"] = [[i["kcode"], round(i["confidence"], 5), i["box"]] for i in items]
    return told


def kept(run: Path) -> dict[str, dict]:
    "Everything that is compared."
    hashes = {name: sha256_file(run / name) for name in FILES}
    return {"files": hashes, "figures": figures(run), "answers": answers(run)}


def main() -> int:
    "Exit status 1 when anything differs."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with evaluation and export")
    parser.add_argument("--file", type=Path, default=ROOT / "benchmarks" / "golden" / "demo.json")
    parser.add_argument("--write", action="store_true", help="keep this run's figures instead of comparing")
    asked = parser.parse_args()
    now = json.loads(json.dumps(kept(asked.run)))
    if asked.write:
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        save_json(now, asked.file)
        return 0
    before = read_json(asked.file)
    differ = [f"{part}: {key}" for part in before for key in before[part] if before[part][key] != now[part].get(key)]
    count = sum(map(len, before.values()))
    print("\n".join([*differ, f"{count - len(differ)} of {count} figures are equal"]))
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
