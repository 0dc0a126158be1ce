"""Workloads that come with the harness."""
