"""Importing the package costs nothing, and what it promises is there."""

from __future__ import annotations

import subprocess
import sys

import moecap_eval


def test_every_export_resolves_and_is_listed():
    assert sorted(moecap_eval.__all__) == sorted(moecap_eval._MODULE_OF)
    for name in moecap_eval.__all__:
        assert getattr(moecap_eval, name) is not None
    assert set(moecap_eval.__all__) <= set(dir(moecap_eval))


def test_import_is_cheap():
    code = (
        "import sys, threading; before = set(sys.modules); import moecap_eval, moecap_eval.cli; "
        "heavy = {'torch', 'vllm', 'lm_eval', 'matplotlib', 'scipy', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
