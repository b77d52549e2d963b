"""A server for a class of tests: the real binary on a free port, ended by Ctrl-C."""

import base64
import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PHOTOS = ROOT / "tests" / "photos"
QUESTION = "What do you see in this image?"
# Bans the tokens that end an answer of the demo, so that there is something left to abort.
ENDLESS = {"2": -100, "1307": -100, "1314": -100}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def photo(name):
    """A photo in base64."""
    return base64.b64encode((PHOTOS / name).read_bytes()).decode()


class Served(unittest.TestCase):
    binary = None
    # What differs from the shipped configuration.
    config = ""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.port = free_port()
        cls.base = f"http://127.0.0.1:{cls.port}"
        (pathlib.Path(cls.folder.name) / "visor.toml").write_text(cls.config)
        cls.log = open(pathlib.Path(cls.folder.name) / "log", "w+")
        cls.server = subprocess.Popen(
            [Served.binary, "serve", "--listen", f"127.0.0.1:{cls.port}"],
            cwd=cls.folder.name, stdout=cls.log, stderr=cls.log,
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(cls.base + "/ready", timeout=2) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                pass
            if cls.server.poll() is not None or time.monotonic() > deadline:
                cls.log.seek(0)
                raise RuntimeError("the server did not become ready:\n" + cls.log.read())
            time.sleep(0.1)

    @classmethod
    def tearDownClass(cls):
        cls.server.send_signal(signal.SIGINT)
        code = cls.server.wait(timeout=30)
        cls.log.close()
        cls.folder.cleanup()
        assert code == 0, f"the server ended with {code} after Ctrl-C"

    def aborts(self):
        """How many answers the server stopped because nobody was left to read them."""
        with urllib.request.urlopen(self.base + "/stats") as reply:
            return json.load(reply)["engine"]["aborted"]

    def wait_aborted(self, before):
        deadline = time.monotonic() + 20
        while self.aborts() == before:
            self.assertLess(time.monotonic(), deadline, "the abort was not noticed")
            time.sleep(0.05)


def main():
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PATH/TO/visor")
    Served.binary = str(pathlib.Path(sys.argv.pop(1)).resolve())
    unittest.main(module="__main__", verbosity=2)
