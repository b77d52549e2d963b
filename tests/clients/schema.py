"""schemathesis against the real binary: requests made from `/openapi.json`, valid and not, and
every check that it has on the answers.

Run:  python3 tests/clients/schema.py PATH/TO/visor [--max-examples N] [further flags of schemathesis]

Answers are a few tokens long, and pictures are tiny: it is the server's manners that are looked at.
"""

import os
import pathlib
import subprocess
import sys

from served import ROOT, Served

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = """
[server]
generations_per_request_max = 4
[generation]
max_tokens = 2
max_tokens_limit = 2
"""


class Schema(Served):
    config = CONFIG


def main():
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PATH/TO/visor [--max-examples N]")
    Served.binary = str(pathlib.Path(sys.argv[1]).resolve())
    flags = sys.argv[2:] or ["--max-examples", "10", "--generation-deterministic"]
    Schema.setUpClass()
    try:
        command = [
            str(pathlib.Path(sys.executable).parent / "schemathesis"), "--config-file", str(HERE / "schemathesis.toml"),
            "run", "--continue-on-failure", "--request-timeout", "60", *flags, Schema.base + "/openapi.json",
        ]
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": str(HERE)}
        # What hypothesis remembers is no part of the repository.
        return subprocess.run(command, cwd=ROOT / "target", env=environment, check=False).returncode
    finally:
        Schema.tearDownClass()


if __name__ == "__main__":
    sys.exit(main())
