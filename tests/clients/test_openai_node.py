"""The real `openai` package of npm against the real binary.

Run:  python3 tests/clients/test_openai_node.py PATH/TO/visor
What is checked is in node/openai.js; the packages are installed below target/.
"""

import json
import os
import pathlib
import shutil
import subprocess

from served import ENDLESS, PHOTOS, ROOT, Served, main

SOURCES = pathlib.Path(__file__).resolve().parent / "node"
FOLDER = ROOT / "target" / "node-clients"


class OpenAINodeClient(Served):
    @classmethod
    def setUpClass(cls):
        FOLDER.mkdir(parents=True, exist_ok=True)
        for file in SOURCES.iterdir():
            shutil.copy(file, FOLDER)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=FOLDER, check=True)
        super().setUpClass()

    def test_what_the_script_checks(self):
        environment = os.environ | {"VISOR_BASE": self.base, "VISOR_PHOTOS": str(PHOTOS), "VISOR_ENDLESS": json.dumps(ENDLESS)}
        ran = subprocess.run(["node", "--test", "openai.js"], cwd=FOLDER, env=environment, capture_output=True, text=True)
        self.assertEqual(ran.returncode, 0, ran.stdout + ran.stderr)


if __name__ == "__main__":
    main()
