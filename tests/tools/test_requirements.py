"""What `make quickstart` installs is enough for the packages it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Distributions outside the lock file are hidden; the packages' own modules are then imported one by one.
_IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.metadata import packages_distributions

locked = set(sys.argv[1].split(","))
canonical = lambda name: name.lower().replace("_", "-").replace(".", "-")
hidden = {
    module
    for module, owners in packages_distributions().items()
    if not locked & {canonical(owner) for owner in owners} and module.isidentifier()
}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
for package in sys.argv[2:]:
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
        print(module.name)
"""


def test_every_module_of_the_quickstart_imports_with_its_lock_file_alone():
    lines = (ROOT / "requirements/quickstart.txt").read_text().splitlines()
    locked = {line.split("==")[0] for line in lines if not line.startswith("#")}
    own = {"graft-plugins", "pip", "setuptools"}
    packages = ["tiered_memory", "vllm_moe_offload", "moecap_eval"]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, ",".join(locked | own), *packages],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "vllm_moe_offload.disk_store" in done.stdout
