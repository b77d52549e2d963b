"""The real `openai` package of npm against the real binary.

Run:  python3 tests/clients/test_openai_node.py PATH/TO/visor
What is checked is in node/openai.js; the packages are installed below target/.
"""

import json
import os
import subprocess

import node_packages
from served import ENDLESS, PHOTOS, Served, main


class OpenAINodeClient(Served):
    @classmethod
    def setUpClass(cls):
        cls.packages = node_packages.install()
        super().setUpClass()

    def test_what_the_script_checks(self):
        environment = os.environ | {"VISOR_BASE": self.base, "VISOR_PHOTOS": str(PHOTOS), "VISOR_ENDLESS": json.dumps(ENDLESS)}
        ran = subprocess.run(["node", "--test", "openai.js"], cwd=self.packages, env=environment, capture_output=True, text=True)
        self.assertEqual(ran.returncode, 0, ran.stdout + ran.stderr)


if __name__ == "__main__":
    main()
