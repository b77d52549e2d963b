"""The packages of npm that clients here need, installed below target/ as the lock file says."""

import pathlib
import shutil
import subprocess

from served import ROOT

SOURCES = pathlib.Path(__file__).resolve().parent / "node"
FOLDER = ROOT / "target" / "node-clients"


def install():
    """The folder that they, and the scripts beside their lock file, are in."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in SOURCES.iterdir():
        shutil.copy(file, FOLDER)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=FOLDER, check=True)
    return FOLDER
