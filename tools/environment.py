"""Make the environment of a checkout, or find that it is there already.

    python3 tools/environment.py quickstart        what `make quickstart` needs (about 3.6 GB)
    python3 tools/environment.py full              every framework and the test tools (about 5.2 GB)

The virtual environment lies in ``.venv`` (or ``--venv DIR``). It is trusted only if its stamp says that an
earlier run finished with the same lock file, and every file the installed packages recorded is still
there; otherwise it is rebuilt. The lock files in ``requirements/`` pin every package, so pip resolves
nothing: it only fetches and unpacks. Standard library only, since it runs before anything is installed.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the message is for those who run it with an older one
    sys.exit(
        f"Graft needs Python 3.11 or newer, this is {sys.version.split()[0]} ({sys.executable}). "
        "Name another one: make PYTHON=python3.11 ..."
    )

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
SHIM = ROOT / "tools" / "torchvision_on_cpu_torch.py"
STAMP = "graft-environment.json"
LOG = "graft-install.log"

# Run by the environment's own interpreter: prints the first recorded file that is missing, or a package
# whose version differs from the lock. Existence only: hashing 5 GB would take longer than a rebuild.
_VERIFY = """
import csv, os, sys
from importlib.metadata import PackageNotFoundError, distribution
present = {}
def exists(path):
    folder, name = os.path.split(path)
    if folder not in present:
        try:
            present[folder] = set(os.listdir(folder))
        except OSError:
            present[folder] = set()
    return name in present[folder]
for line in open(sys.argv[1]):
    line = line.split("#")[0].strip()
    if not line:
        continue
    name, version = line.split("==")
    try:
        found = distribution(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is missing")
    if found.version.split("+")[0] != version.split("+")[0]:
        sys.exit(f"{name} is {found.version}, the lock says {version}")
    site = str(found.locate_file(""))
    for row in csv.reader((found.read_text("RECORD") or "").splitlines()):
        if not row[0].endswith(".pyc") and not exists(os.path.normpath(os.path.join(site, row[0]))):
            sys.exit(f"{name} has lost {row[0]}")
"""


@dataclass(frozen=True)
class Profile:
    """A lock file, and the free space that installing it needs (packages, plus pip's downloads)."""

    name: str
    disk_gib: float
    includes: tuple[str, ...] = ()

    @property
    def lock(self) -> Path:
        """The file that pins every package of this profile."""
        return REQUIREMENTS / f"{self.name}.txt"


PROFILES = {
    "quickstart": Profile("quickstart", disk_gib=6.0),
    "full": Profile("full", disk_gib=9.0, includes=("quickstart",)),
}


class SetupError(Exception):
    """Something the user can mend; the message says what to do."""


def digest(*paths: Path) -> str:
    """SHA-256 over the contents of the files."""
    state = hashlib.sha256()
    for path in paths:
        state.update(path.read_bytes())
    return state.hexdigest()


def project_digest() -> str:
    """Changes whenever the project itself must be installed again (entry points, console scripts)."""
    return digest(ROOT / "pyproject.toml", SHIM)


def requirements_of(profile: Profile) -> list[str]:
    """The pinned requirements, without comments."""
    lines = (line.split("#")[0].strip() for line in profile.lock.read_text().splitlines())
    return [line for line in lines if line]


class Environment:
    """The virtual environment in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / LOG

    def stamp(self) -> dict[str, str]:
        """What the last finished run installed; empty if none finished."""
        try:
            return dict(json.loads((self.folder / STAMP).read_text()))
        except (OSError, ValueError):
            return {}

    def write_stamp(self, profile: Profile) -> None:
        """Say that the profile is completely installed. Written last, and atomically."""
        content = {
            "profile": profile.name,
            "lock": digest(profile.lock),
            "project": project_digest(),
            "python": sys.version.split()[0],
            "root": str(ROOT),
        }
        temporary = self.folder / (STAMP + ".new")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.folder / STAMP)

    def remove_stamp(self) -> None:
        """From here on the environment counts as half-made until `write_stamp`."""
        (self.folder / STAMP).unlink(missing_ok=True)

    def fault(self, profile: Profile) -> str | None:
        """Why the packages of the profile cannot be trusted to be there, or None."""
        stamp = self.stamp()
        if not stamp:
            return "no earlier installation finished" if self.folder.exists() else "it does not exist yet"
        installed = PROFILES.get(stamp.get("profile", ""))
        if installed is None or not (installed is profile or profile.name in installed.includes):
            return f"it holds the profile {stamp.get('profile')!r} only"
        if stamp.get("lock") != digest(installed.lock):
            return f"{installed.lock.relative_to(ROOT)} has changed"
        if stamp.get("root") != str(ROOT):
            return "it was made for another checkout"
        return self.damage(installed)

    def damage(self, profile: Profile) -> str | None:
        """The first package that is missing, of another version, or incomplete."""
        try:
            result = subprocess.run(
                [self.python, "-c", _VERIFY, profile.lock], capture_output=True, text=True, check=False
            )
        except OSError as error:
            return f"its Python does not start ({error.strerror})"
        if result.returncode == 0:
            return None
        lines = result.stderr.strip().splitlines()
        return lines[-1] if lines else "its Python does not run"

    def create(self) -> None:
        """An empty virtual environment in place of whatever is there."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        result = subprocess.run(
            [sys.executable, "-m", "venv", self.folder], capture_output=True, text=True, check=False
        )
        if result.returncode:
            reason = (result.stdout + result.stderr).strip()
            raise SetupError(f"python -m venv failed (Debian and Ubuntu: install python3-venv):\n{reason}")

    def pip_install(self, what: str, arguments: list[str], total: int) -> None:
        """Run pip, show how far it is, and turn its failure into one message."""
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        started, seen, tail = time.monotonic(), 0, []
        live = sys.stdout.isatty()
        say(f"  {what} ...", end="" if live else "\n")
        with self.log.open("a") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail.append(line.rstrip())
                if line.startswith(("Collecting ", "Processing ", "Requirement already")):
                    seen += 1
                    if live:
                        say(f"\r\033[K  {what}: {min(seen, total)}/{total} {line.split()[1]}", end="")
                elif line.startswith("Installing collected") and live:
                    say(f"\r\033[K  {what}: unpacking {total} packages", end="")
            code = process.wait()
        if code:
            errors = [line for line in tail if line.startswith("ERROR")] or tail[-5:]
            raise SetupError(
                f"pip could not install {what}:\n    "
                + "\n    ".join(errors[-3:])
                + f"\n  Whole log: {self.log}\n  Is the package index reachable, and does it have this "
                "version for this Python and platform? The next run starts afresh."
            )
        say(
            f"\r\033[K  {what}: done in {time.monotonic() - started:.0f} s"
            if live
            else f"  {what}: done in {time.monotonic() - started:.0f} s"
        )

    def install_packages(self, profile: Profile) -> None:
        """Everything in the lock file."""
        pinned = requirements_of(profile)
        # torch first and alone: where an index serves a CUDA build, that one needs its own dependencies.
        torch = [line for line in pinned if line.startswith("torch==")]
        self.pip_install(torch[0], [*torch, "-c", str(profile.lock)], total=12)
        arguments = ["--no-deps", "-r", str(profile.lock)]
        self.pip_install(f"{len(pinned)} packages", arguments, total=len(pinned))

    def install_project(self) -> None:
        """The checkout itself, editable, and the torchvision shim of the development environment."""
        self.pip_install("graft-plugins", ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], total=1)
        site = Path(
            subprocess.check_output(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            ).strip()
        )
        shutil.copy(SHIM, site / SHIM.name)
        (site / f"{SHIM.stem}.pth").write_text(f"import {SHIM.stem}\n")


def say(text: str, end: str = "\n") -> None:
    """Print at once, so that progress is seen through a pipe."""
    print(text, end=end, flush=True)


def check_disk(folder: Path, needed_gib: float) -> None:
    """Refuse to begin what cannot end."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < needed_gib:
        raise SetupError(f"{folder} has {free_gib:.1f} GiB free, the environment needs {needed_gib:.1f} GiB")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two runs in one checkout wait for each other."""
    lock_path = folder.with_name(folder.name + ".lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another run that is making {folder.name} ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(profile: Profile, folder: Path) -> None:
    """Bring the environment in ``folder`` to at least the profile."""
    environment = Environment(folder)
    stamp = environment.stamp()
    fault = environment.fault(profile)
    if fault is None and stamp["project"] == project_digest():
        return
    holds = profile if fault else PROFILES[stamp["profile"]]
    if fault:
        say(f"Making the {profile.name} environment in {folder} ({fault}); this takes minutes, once.")
        check_disk(folder.parent, profile.disk_gib)
        if all(environment.fault(PROFILES[name]) for name in profile.includes):
            environment.create()
        environment.remove_stamp()
        environment.install_packages(profile)
        damage = environment.damage(profile)
        if damage:
            raise SetupError(f"the environment is not what {profile.lock.name} says: {damage}")
    environment.remove_stamp()
    environment.install_project()
    environment.write_stamp(holds)
    say(f"Environment ready: {folder}")


def main() -> int:
    """Parse the arguments, make the environment, print failures as one message."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", choices=sorted(PROFILES))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    options = parser.parse_args()
    folder = options.venv.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            make(PROFILES[options.profile], folder)
    except SetupError as error:
        say(f"\nenvironment: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nenvironment: interrupted; the next run starts afresh")
        return 130
    return 0


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
