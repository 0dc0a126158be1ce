"""Choose versions anew and write the lock files: ``python3 tools/lock.py``.

Resolves ``requirements/*.in`` in a scratch environment, the way that is known to give one environment for
every framework (torch first, then everything else with torch held), and pins what pip chose in
``requirements/full.txt``. ``quickstart.txt`` is the part of it that the quickstart needs. Takes minutes and
about 9 GB of disk; changes nothing but these two files.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
HEADER = (
    "# Written by tools/lock.py from requirements/*.in; installed with --no-deps by tools/environment.py.\n"
)
INSTALLERS = {"pip", "graft-plugins"}

# Prints the pinned closure of the given distributions, following only unconditional requirements.
_CLOSURE = """
import sys
from importlib.metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement
todo, pins = sys.argv[1:], {}
while todo:
    try:
        found = distribution(todo.pop())
    except PackageNotFoundError:
        continue
    name = found.metadata["Name"].lower().replace("_", "-").replace(".", "-")
    if name in pins:
        continue
    pins[name] = found.version.split("+")[0]
    for text in found.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            todo.append(requirement.name)
            for extra in requirement.extras:
                for nested in distribution(requirement.name).requires or ():
                    nested = Requirement(nested)
                    if nested.marker is not None and nested.marker.evaluate({"extra": extra}):
                        todo.append(nested.name)
print("\\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))
"""


def names(file: str) -> list[str]:
    """The requirements of one .in file, without comments."""
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / file).read_text().splitlines())
    return [line for line in lines if line]


def pinned(freeze: str) -> list[str]:
    """Pins from ``pip freeze``, without build suffixes (+cpu), installers and the project itself."""
    pins = []
    for line in freeze.splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line)
        if match and match[1].lower() not in INSTALLERS:
            pins.append(f"{match[1].lower().replace('_', '-').replace('.', '-')}=={match[2]}")
    return sorted(pins)


def resolve(python: Path) -> None:
    """Install everything into the scratch environment."""

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    torch = next(line for line in names("quickstart.in") if line.startswith("torch=="))
    pip("install", torch)
    pip("install", torch, *names("quickstart.in"), *names("full.in"))
    pip("install", "--no-deps", *names("no-deps.in"))
    pip("uninstall", "-y", *names("exclude.in"))


def main() -> int:
    """Resolve, then write both lock files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from-environment",
        type=Path,
        metavar="DIR",
        help="pin what this environment holds instead of resolving anew",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.from_environment or Path(scratch) / "venv"
        python = folder / "bin" / "python"
        if not options.from_environment:
            venv.create(folder, with_pip=True)
            resolve(python)
        freeze = subprocess.check_output([python, "-m", "pip", "freeze", "--all"], text=True)
        roots = [re.split(r"[=<>\[]", line)[0] for line in names("quickstart.in")]
        closure = subprocess.check_output([python, "-c", _CLOSURE, *roots], text=True)
    (REQUIREMENTS / "full.txt").write_text(HEADER + "\n".join(pinned(freeze)) + "\n")
    (REQUIREMENTS / "quickstart.txt").write_text(HEADER + closure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
