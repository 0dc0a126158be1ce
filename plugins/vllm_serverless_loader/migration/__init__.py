"""Live migration of running requests by tokens."""
