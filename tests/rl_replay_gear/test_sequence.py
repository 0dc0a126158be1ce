"""What each family of sequence models asks of a replay, from the write to the tensors it trains on."""

from __future__ import annotations

import pytest
import torch

from rl_replay_gear import (
    ColumnSpec,
    Discretizer,
    GeneralizedAdvantage,
    Mixture,
    ReturnsToGo,
    TableSpec,
    TokenStream,
    TopShare,
    TrajectoryLoader,
    TrajectoryTable,
    Uniform,
    Window,
    agents_as_sequence,
    merge_streams,
    prepend_prompt,
    sequence_priority,
    split_burn_in,
    tokenize,
)
from rl_replay_gear.randomness import CounterGenerator


def table_of(*columns, derived=(), trajectories=10, **options):
    return TrajectoryTable(TableSpec(tuple(columns), 1000, trajectories, derived), **options)


def test_online_decision_transformer_replaces_whole_trajectories_and_relabels_them():
    table = table_of(ColumnSpec("rewards"), derived=(ReturnsToGo(scale=0.1),), trajectories=3)
    handles = [table.write({"rewards": torch.full((n,), float(n))}) for n in (2, 3, 4, 5)]
    assert table.handles().tolist() == handles[1:]
    with pytest.raises(KeyError, match="stale handle"):
        table.read(handles[0])
    # Returns-to-go are those achieved, whatever return the episode was asked for.
    assert table.read(handles[3])["returns_to_go"].tolist() == pytest.approx([2.5, 2.0, 1.5, 1.0, 0.5])
    table.relabel(handles[2], {"rewards": torch.tensor([0.0, 0.0, 0.0, 1.0])})
    loader = TrajectoryLoader(table, Uniform(over="steps"), Window(3, 0, "head"), 200)
    batch = next(loader)
    of_relabelled = batch.handles == handles[2]
    assert of_relabelled.any()
    returns = batch["returns_to_go"][of_relabelled][batch.mask["returns_to_go"][of_relabelled]]
    assert torch.allclose(returns, torch.tensor(0.1))


def test_prompts_come_from_the_best_trajectories_of_the_same_task():
    table = table_of(ColumnSpec("x"), ColumnSpec("a", (2,), fill=-10.0), trajectories=20)
    for number in range(20):
        n = 3 + number % 4
        table.write({"x": torch.full((n,), float(number)), "a": torch.ones(n, 2)}, priority=float(number))
    best = TopShare(0.15)
    prompt = table.collect(table.select(best, 64, generator=CounterGenerator(0)), Window(4, 0, "head"))
    batch = table.collect(table.select(Uniform(), 64, generator=CounterGenerator(1)), Window(5, -4, "head"))
    joined = prepend_prompt(prompt, batch)
    assert joined["x"].shape == (64, 9)
    assert joined["a"].shape == (64, 9, 2)
    assert joined["is_prompt"].sum(1).tolist() == [4] * 64
    of_prompt = joined["is_prompt"] & joined["mask"]
    assert set(joined["x"][of_prompt].tolist()) == {17.0, 18.0, 19.0}
    assert torch.equal(joined["x"][:, 4:], batch["x"])
    assert torch.equal(joined["timesteps"][:, 4:], batch.timesteps["x"])
    assert bool((joined["a"][~joined["mask"]] == -10).all())
    with pytest.raises(ValueError, match=r"a prompt of 64 x \(x, a\) does not fit a batch of 3 x \(x\)"):
        prepend_prompt(prompt, table.collect(table.select(Uniform(), 3), {"x": Window(2)}))


@pytest.mark.parametrize(("share", "largest", "members"), [(0.2, True, [8, 9]), (0.01, False, [0])])
def test_top_share_draws_alike_among_the_best(share, largest, members):
    table = table_of(ColumnSpec("x"))
    handles = [table.write({"x": torch.zeros(2)}, priority=float(n)) for n in range(10)]
    chosen = table.select(TopShare(share, largest=largest), 4000, generator=CounterGenerator(2))
    counts = [int((chosen.handles == handles[n]).sum()) for n in range(10)]
    assert sum(counts[n] for n in members) == 4000
    expected = 4000 / len(members)
    assert all(abs(counts[n] - expected) < 4.5 * expected**0.5 for n in members)
    assert bool((chosen.probability == 1 / len(members)).all())
    with pytest.raises(ValueError, match="share must be above 0"):
        TopShare(0.0)


def test_generalist_batches_mix_tasks_of_different_columns_in_one_token_stream():
    tables = {
        "pole": table_of(ColumnSpec("state", (2,)), ColumnSpec("action", (), torch.int64)),
        "arm": table_of(ColumnSpec("joints", (3,)), ColumnSpec("torque", (1,))),
    }
    for n in (4, 6):
        tables["pole"].write({"state": torch.randn(n, 2), "action": torch.arange(n) % 3})
        tables["arm"].write({"joints": torch.randn(n, 3), "torque": torch.randn(n, 1)})
    mixture = Mixture(tables, {name: Uniform() for name in tables}, {"pole": 1.0, "arm": 3.0})
    batches = mixture.sample(
        40, {name: Window(5, 0, "tail") for name in tables}, generator=CounterGenerator(4)
    )
    mu_law = {size: Discretizer.mu_law(size, 64) for size in (1, 2, 3)}
    streams = {
        "pole": [TokenStream("state", mu_law[2], 100), TokenStream("action", None, 0, loss=True)],
        "arm": [TokenStream("joints", mu_law[3], 100), TokenStream("torque", mu_law[1], 200, loss=True)],
    }
    first_column = {"pole": "state", "arm": "joints"}
    parts = [
        tokenize(batches[name], batches[name].mask[first_column[name]], streams[name]) for name in batches
    ]
    merged = merge_streams(parts)
    steps = [int(batches[name].mask[first_column[name]].sum()) for name in batches]
    widths = {"pole": 3, "arm": 4}
    assert len(merged["tokens"]) == sum(s * widths[name] for s, name in zip(steps, batches, strict=True))
    assert int(merged["loss_mask"].sum()) == sum(steps)  # one action token a step in either task
    assert len(merged["cu_seqlens"]) == 41
    starts = merged["cu_seqlens"][:-1].long()
    assert merged["position"][starts].eq(0).all()


def test_multi_agent_transformer_uses_each_trajectory_once():
    agents = 3
    table = table_of(
        ColumnSpec("obs", (agents, 2)),
        ColumnSpec("available", (agents, 4), torch.bool),
        ColumnSpec("rewards", (agents,)),
        ColumnSpec("values", (agents,), final=True),
        derived=(GeneralizedAdvantage(gamma=0.9, lam=0.8),),
        max_times_sampled=1,
    )
    given = []
    for n in (4, 4):
        given.append(
            {
                "obs": torch.randn(n, agents, 2),
                "available": torch.rand(n, agents, 4) < 0.5,
                "rewards": torch.randn(n, agents),
                "values": torch.randn(n + 1, agents),
            }
        )
        table.write(given[-1])
    selection = table.select(Uniform(replacement=False), 2, anchor="start")
    batch = table.collect(selection, Window(4))
    with pytest.raises(RuntimeError, match="table is empty"):
        table.select(Uniform(), 1)
    order = [table.handles().tolist().index(handle) for handle in selection.handles.tolist()]
    tokens = agents_as_sequence(batch["obs"])
    assert torch.equal(tokens, torch.cat([given[i]["obs"] for i in order]))
    assert agents_as_sequence(batch["available"]).shape == (8, agents, 4)
    for row, i in enumerate(order):
        reward, value = given[i]["rewards"].double(), given[i]["values"].double()
        delta = reward + 0.9 * value[1:] - value[:-1]
        exact = torch.stack([sum(0.72**k * delta[t + k] for k in range(4 - t)) for t in range(4)])
        assert torch.allclose(batch["advantage"][row].double(), exact, atol=1e-6)


def test_recurrent_agents_get_burn_in_their_stored_state_and_sequence_priorities():
    table = table_of(ColumnSpec("obs"), ColumnSpec("state", (2,)))
    handle = table.write({"obs": torch.arange(20.0), "state": torch.arange(40.0).view(20, 2)})
    burn_in, length = 4, 5
    selection = table.select(Uniform(), 64, generator=CounterGenerator(6))
    windows = {"obs": Window(burn_in + length, -burn_in, "around"), "state": Window(1, -burn_in)}
    batch = table.collect(selection, windows)
    burn, train = split_burn_in(batch["obs"], burn_in)
    for i, anchor in enumerate(selection.anchors.tolist()):
        assert train[i, 0] == anchor
        first = anchor - burn_in
        if first >= 0:
            assert burn[i, 0] == first
            assert batch["state"][i, 0].tolist() == [2.0 * first, 2.0 * first + 1]
    _, mask = split_burn_in(batch.mask["obs"], burn_in)
    table.update_priorities(selection.handles, sequence_priority(train, mask))
    largest = max(0.9 * min(a + 4, 19) + 0.1 * (a + min(a + 4, 19)) / 2 for a in selection.anchors.tolist())
    assert table.priorities().tolist() == pytest.approx([largest])
    assert table.handles().tolist() == [handle]


def test_trajectory_transformer_tokens_hold_a_discounted_return():
    table = table_of(ColumnSpec("rewards"), derived=(ReturnsToGo("value", gamma=0.5),))
    table.write({"rewards": torch.tensor([1.0, 2.0, 4.0])})
    batch = table.collect(table.select(Uniform(), 1, anchor="start"), Window(3))
    assert batch["value"][0].tolist() == [3.0, 4.0, 4.0]
    bins = Discretizer.uniform(torch.tensor([0.0]), torch.tensor([8.0]), 8)
    tokens = tokenize(
        batch, batch.mask["value"], [TokenStream("rewards", bins), TokenStream("value", bins, 8)]
    )
    assert tokens["tokens"].tolist() == [1, 8 + 3, 2, 8 + 4, 4, 8 + 4]
