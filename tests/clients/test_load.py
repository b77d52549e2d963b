"""Load, made by autocannon of npm, against the real binary and its demo model.

Run:  python3 tests/clients/test_load.py PATH/TO/visor [SECONDS]
For so many seconds each: answers of a few tokens whole and streamed, all of them different, and more clients than are
let in. Nothing may fail, hang or be answered otherwise than the status says, and the server has to be as it was.
"""

import json
import re
import subprocess
import sys
import urllib.request

import node_packages
from served import Served, main

SECONDS = 5
IN_FLIGHT_MAX = 48
# The text differs from request to request, so that no cache answers.
CHAT = {"max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "Hello, I am [<id>]."}]}


class Load(Served):
    config = f"[server]\nrequests_in_flight_max = {IN_FLIGHT_MAX}\n"

    @classmethod
    def setUpClass(cls):
        cls.packages = node_packages.install()
        super().setUpClass()

    def load(self, connections, **changes):
        """What autocannon saw of so many clients at once, each with one request after the other."""
        command = [
            "npx", "autocannon", "--json", "--no-progress", "--idReplacement", "--method", "POST",
            "--connections", str(connections), "--duration", str(SECONDS), "--timeout", "60",
            "--headers", "content-type=application/json", "--body", json.dumps(CHAT | changes),
            self.base + "/v1/chat/completions",
        ]
        ran = subprocess.run(command, cwd=self.packages, capture_output=True, text=True, check=True)
        seen = json.loads(ran.stdout)
        statuses = {status: told["count"] for status, told in seen["statusCodeStats"].items()}
        print(f"{connections} clients, {changes}: {statuses} in {seen['duration']} s, ms {seen['latency']['p50']} in the middle, {seen['latency']['max']} at most")
        # Of requests that are under way at the end, autocannon says nothing.
        self.assertEqual((seen["errors"], seen["timeouts"], seen["mismatches"]), (0, 0, 0), seen)
        return statuses

    def figure(self, name):
        with urllib.request.urlopen(self.base + "/metrics") as reply:
            text = reply.read().decode()
        return float(re.search(rf"^{name}(?:{{.*}})? (.*)$", text, re.MULTILINE)[1])

    def test_as_many_clients_as_are_let_in_are_all_answered(self):
        for changes in ({}, {"stream": True}):
            statuses = self.load(IN_FLIGHT_MAX, **changes)
            self.assertEqual(list(statuses), ["200"], statuses)
            self.assertGreater(statuses["200"], IN_FLIGHT_MAX)

    def test_of_more_clients_some_are_told_to_come_back_and_nobody_else_notices(self):
        statuses = self.load(4 * IN_FLIGHT_MAX)
        self.assertEqual(sorted(statuses), ["200", "503"], statuses)
        self.assertGreater(statuses["200"], IN_FLIGHT_MAX)
        before = self.figure("process_resident_memory_bytes")
        self.load(4 * IN_FLIGHT_MAX)
        after = self.figure("process_resident_memory_bytes")
        self.assertLess(after, 1.15 * before, "memory grows under load")
        statuses = self.load(1)
        self.assertEqual(list(statuses), ["200"], "it is as it was")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        SECONDS = int(sys.argv.pop(2))
    main()
