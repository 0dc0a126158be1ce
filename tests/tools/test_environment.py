"""tools/environment.py against real pip, with a lock file of tiny wheels made here."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "environment.py"


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    record = f"{name}/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", record)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, its project and lock files replaced by tiny ones in tmp_path."""
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "environment", module)
    spec.loader.exec_module(module)

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("torch", "alpha", "beta"):
        write_wheel(wheels, name, "1.0")
    locks = tmp_path / "requirements"
    locks.mkdir()
    (locks / "quickstart.txt").write_text("# pins\ntorch==1.0\nalpha==1.0\n")
    (locks / "full.txt").write_text("torch==1.0\nalpha==1.0\nbeta==1.0\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "REQUIREMENTS", locks)
    # Installing the project itself needs its build backend; the wheels stand for the packages.
    monkeypatch.setattr(module.Environment, "install_project", lambda self: None)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return module


def installed(folder: Path) -> set[str]:
    site = next(folder.glob("lib/python*/site-packages"))
    return {path.name.split("-")[0] for path in site.glob("*.dist-info")}


def test_makes_trusts_and_extends(environment, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "venv"
    environment.make(environment.PROFILES["quickstart"], folder)
    assert {"torch", "alpha"} <= installed(folder)
    assert "beta" not in installed(folder)

    with monkeypatch.context() as patch:  # a second run must not start pip
        patch.setattr(environment.Environment, "pip_install", lambda *a, **k: pytest.fail("pip was run"))
        capsys.readouterr()
        environment.make(environment.PROFILES["quickstart"], folder)
        assert capsys.readouterr().out == ""

    marker = folder / "kept"
    marker.touch()
    environment.make(environment.PROFILES["full"], folder)
    assert "beta" in installed(folder)
    assert marker.exists(), "extending a sound environment must not rebuild it"
    assert environment.Environment(folder).fault(environment.PROFILES["quickstart"]) is None


HARMS = {
    "lost file": lambda folder: shutil.rmtree(next(folder.glob("lib/python*/site-packages/alpha"))),
    "lost package": lambda folder: shutil.rmtree(next(folder.glob("lib/python*/site-packages/alpha-*"))),
    "never finished": lambda folder: (folder / "graft-environment.json").unlink(),
    "torn stamp": lambda folder: (folder / "graft-environment.json").write_text("{"),
    "no interpreter": lambda folder: (folder / "bin" / "python").unlink(),
}


def test_broken_environment_is_noticed_and_rebuilt(environment, tmp_path):
    folder, sound, profile = tmp_path / "venv", tmp_path / "sound", environment.PROFILES["quickstart"]
    environment.make(profile, folder)
    folder.rename(sound)
    for name, harm in HARMS.items():
        shutil.copytree(sound, folder, symlinks=True)
        assert environment.Environment(folder).fault(profile) is None
        harm(folder)
        assert environment.Environment(folder).fault(profile), name
        if name == "lost file":
            (folder / "left over").touch()
            environment.make(profile, folder)
            assert environment.Environment(folder).fault(profile) is None
            assert not (folder / "left over").exists()
        shutil.rmtree(folder)


def test_changed_lock_is_noticed(environment, tmp_path):
    folder, profile = tmp_path / "venv", environment.PROFILES["quickstart"]
    environment.make(profile, folder)
    write_wheel(tmp_path / "wheels", "alpha", "2.0")
    profile_lock = environment.REQUIREMENTS / "quickstart.txt"
    profile_lock.write_text(profile_lock.read_text().replace("alpha==1.0", "alpha==2.0"))
    assert "has changed" in environment.Environment(folder).fault(profile)
    environment.make(profile, folder)
    assert (
        subprocess.check_output(
            [folder / "bin" / "python", "-c", "import alpha; print(alpha.version)"], text=True
        ).strip()
        == "2.0"
    )


def test_missing_package_is_named_and_nothing_is_trusted(environment, tmp_path):
    folder, profile = tmp_path / "venv", environment.PROFILES["quickstart"]
    (environment.REQUIREMENTS / "quickstart.txt").write_text("torch==1.0\nalpha==9.9\n")
    with pytest.raises(environment.SetupError, match=r"could not install(.|\n)*alpha==9\.9"):
        environment.make(profile, folder)
    assert environment.Environment(folder).stamp() == {}


def test_short_disk_is_refused_before_anything_is_made(environment, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.5 * 2**30))
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(environment.SetupError, match=r"1\.5 GiB free, the environment needs 6\.0 GiB"):
        environment.make(environment.PROFILES["quickstart"], tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_old_python_is_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"Graft needs Python 3\.11 or newer"):
        runpy.run_path(str(SCRIPT))


def test_locks_pin_every_line_and_quickstart_is_a_part_of_full():
    lines = {
        name: [
            line
            for line in (SCRIPT.parents[1] / "requirements" / f"{name}.txt").read_text().splitlines()
            if line and not line.startswith("#")
        ]
        for name in ("quickstart", "full")
    }
    assert all(line.count("==") == 1 for line in lines["full"])
    assert set(lines["quickstart"]) <= set(lines["full"])
