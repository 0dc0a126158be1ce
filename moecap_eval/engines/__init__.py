"""Inference engines under measurement: the only package of the harness that imports one."""
