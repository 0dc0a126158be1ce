"""A small trained mixture-of-experts language model and everything that made it."""
