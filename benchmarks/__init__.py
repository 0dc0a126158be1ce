"""Benchmarks: one script a question, results in results/, RESULTS.md made from them."""
