"""The worlds of forked workers that the other tests use."""

from __future__ import annotations

import torch

from megatron_tenplex.testing import run_world


def threads(store, worker, num_workers):
    return torch.get_num_threads()


def test_workers_have_one_thread_where_setting_it_was_replaced_in_the_parent(monkeypatch):
    # As vLLM's engine for CPUs leaves a process; a worker with more would wait for threads it does not have.
    before = torch.get_num_threads()
    torch._C.set_num_threads(2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    try:
        assert run_world(2, threads) == [1, 1]
    finally:
        torch._C.set_num_threads(before)
