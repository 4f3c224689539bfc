"Run folders for tests that change what is in them."

import json
import shutil
from pathlib import Path


def copy_run(
    root: Path,  # a run folder
    to: Path,  # where the copy goes
    *left_out: str,  # patterns of names that are not copied
) -> Path:
    "A copy of a run folder that finds its delivery from anywhere."
    shutil.copytree(root, to, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    head = json.loads((root / "manifest.json").read_text())
    (to / "manifest.json").write_text(json.dumps(head | {"root": str((root.resolve() / head["root"]).resolve())}))
    return to


def linked_run(
    root: Path,  # a run folder
    to: Path,  # where the copy goes
) -> Path:
    "A copy of a run folder to spoil; its photos stay where they are."
    shutil.copytree(root, to, ignore=shutil.ignore_patterns("delivery", "yolo_data", "logs"))
    (to / "delivery").symlink_to(root / "delivery")
    return to
