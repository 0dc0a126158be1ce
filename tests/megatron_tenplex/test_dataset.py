from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tenplex import DatasetProgress, ElasticBatchSampler


def global_batches(num_samples, batch, micro, history, seed):
    """Sample indices of each global batch when its data-parallel size changes as ``history`` says."""
    progress, batches = None, []
    for dp in history:
        ranks = [
            ElasticBatchSampler(
                num_samples,
                batch,
                micro_batch_size=micro,
                dp_rank=r,
                dp_size=dp,
                progress=progress,
                seed=seed,
            )
            for r in range(dp)
        ]
        count = batch // (micro * dp)
        parts = [list(islice(iter(sampler), count)) for sampler in ranks]
        batches.append([i for j in range(count) for rank in parts for i in rank[j]])
        assert len({sampler.progress for sampler in ranks}) == 1
        progress = ranks[0].progress
    return batches


@settings(max_examples=150, deadline=None)
@given(
    num_samples=st.integers(1, 40),
    micro=st.integers(1, 3),
    history=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=12),
    seed=st.integers(0, 5),
)
def test_tx15_every_sample_once_an_epoch_whatever_the_data_parallel_history(
    num_samples, micro, history, seed
):
    batch = 12 * micro
    elastic = global_batches(num_samples, batch, micro, history, seed)
    steady = global_batches(num_samples, batch, micro, [1] * len(history), seed)
    assert elastic == steady
    stream = [index for one in elastic for index in one]
    for start in range(0, len(stream) - num_samples + 1, num_samples):
        assert sorted(stream[start : start + num_samples]) == list(range(num_samples))
    rest = Counter(stream[len(stream) // num_samples * num_samples :])
    assert all(count == 1 for count in rest.values())


def test_tx15_progress_counts_a_batch_with_its_last_micro_batch():
    sampler = ElasticBatchSampler(10, 4, micro_batch_size=1, shuffle=False)
    batches = iter(sampler)
    handed = [next(batches) for _ in range(3)]
    assert (handed, sampler.progress.consumed_samples) == ([[0], [1], [2]], 0)
    assert (next(batches), sampler.progress.consumed_samples) == ([3], 4)
    again = ElasticBatchSampler(10, 4, shuffle=False, progress=sampler.progress)
    assert next(iter(again)) == [4]


def test_tx15_epochs_are_shuffled_differently_and_reproducibly():
    first, second = (
        [i for one in islice(iter(ElasticBatchSampler(8, 8, seed=3)), 16) for i in one] for _ in range(2)
    )
    assert first == second
    assert first[:8] != first[8:]


def test_tx15_bad_input():
    with pytest.raises(
        ValueError, match="global batch 10 is not divisible by micro batch 2 x data parallel size 3"
    ):
        ElasticBatchSampler(10, 10, micro_batch_size=2, dp_size=3)
    with pytest.raises(ValueError, match="progress is of 5 samples"):
        ElasticBatchSampler(10, 10, progress=DatasetProgress(0, 0, 5))
    with pytest.raises(ValueError, match=r"dp_rank must be in 0\.\.1"):
        ElasticBatchSampler(10, 10, dp_rank=2, dp_size=2)
