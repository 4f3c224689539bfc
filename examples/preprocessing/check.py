"""Check a program that prepares photos for the narrow family against the golden vectors of this folder.

    python examples/preprocessing/check.py                             this installation
    python examples/preprocessing/check.py --command "./prepare {photo}"

The command gets the path of a photo in place of {photo} and writes the tensor to standard output: float32,
little-endian, [3, 512, 512]. Exit status 1: a photo is not within its tolerance.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pillsnap.photos.golden import check_golden
from pillsnap.photos.intake import InferencePreprocessor


def by_command(command: str):
    "A function that runs the command on a photo's bytes and reads its tensor."

    def prepare(photo: bytes) -> np.ndarray:
        with tempfile.NamedTemporaryFile(suffix=".png" if photo[:1] == b"\x89" else ".jpg") as file:
            file.write(photo)
            file.flush()
            words = [w.replace("{photo}", file.name) for w in shlex.split(command)]
            out = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
        return np.frombuffer(out, "<f4")

    return prepare


def main() -> int:
    "Check, print a line for each photo, and say by the exit status whether all are within their tolerance."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", help="a program; {photo} stands for the path of a photo")
    asked = parser.parse_args()
    prepare = by_command(asked.command) if asked.command else InferencePreprocessor().prepare_for_model
    results = check_golden(prepare, Path(__file__).parent)
    for r in results:
        print(f"{r.file:20} {r.verdict:7} mean {r.mean:.3f}, largest {r.largest:.1f} of 255")
    return int(any(r.verdict == "fails" for r in results))


if __name__ == "__main__":
    sys.exit(main())
