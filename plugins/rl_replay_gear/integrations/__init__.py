"""Adapters, one framework a module; each holds every reference to its framework."""
