"""Traces and a simulator that runs the very policies of the cluster."""
