#!/usr/bin/env python
"""Write the server's OpenAPI document to tests/golden/openapi.json, which a test compares with the code.

usage: openapi.py [--out FILE]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from pillsnap.deployment.server import create_app
from pillsnap.deployment.serversettings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]


class NoWorkers:
    "Stands in for the workers: a document needs none."

    size, alive, lost, users, retired, facts = 0, 0, 0, 0, False, {}

    def ready(self) -> "NoWorkers":
        return self


def document() -> dict[str, Any]:
    "The document, as /openapi.json gives it."
    with tempfile.TemporaryDirectory() as folder:
        env = Path(folder) / ".env"
        env.touch(mode=0o600)
        env.write_text(f"API_KEY={'k' * 32}\nMODEL_PATH=none\n")
        return create_app(ServerSettings(env_file=env), NoWorkers()).openapi()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "openapi.json")
    out = parser.parse_args().out
    out.write_text(json.dumps(document(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
