"""Adapters, one module a framework. Importing one needs its framework; importing this package does not."""
