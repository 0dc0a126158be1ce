"""transformers and DeepSpeed (GR-17): batches in the model's form, equal curves, a real engine."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rl_replay_gear import ColumnSpec, ReturnsToGo, TableSpec, TrajectoryTable, Uniform, Window
from rl_replay_gear.integrations.transformers import decision_transformer_inputs

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_replay_gear_decision_transformer.py"


def batch_of(size=6, context=5):
    spec = TableSpec(
        (ColumnSpec("observations", (3,)), ColumnSpec("actions", (2,), fill=-10.0), ColumnSpec("rewards")),
        100,
        10,
        (ReturnsToGo(),),
    )
    table = TrajectoryTable(spec)
    for n in (2, 9):
        table.write(
            {"observations": torch.randn(n, 3), "actions": torch.randn(n, 2), "rewards": torch.ones(n)}
        )
    return table.collect(table.select(Uniform(over="steps"), size), Window(context, 0, "head"))


def test_gr17_inputs_have_the_models_names_shapes_and_padding():
    batch = batch_of()
    inputs = decision_transformer_inputs(
        batch, state_mean=torch.ones(3), state_std=torch.full((3,), 2.0), return_scale=4.0
    )
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    assert shapes == {
        "states": (6, 5, 3), "actions": (6, 5, 2), "rewards": (6, 5, 1), "returns_to_go": (6, 5, 1),
        "timesteps": (6, 5), "attention_mask": (6, 5),
    }  # fmt: skip
    mask = inputs["attention_mask"].bool()
    assert torch.equal(mask, batch.mask["observations"])
    assert bool(mask[:, -1].all())  # left padding
    assert bool((inputs["states"][~mask] == 0).all())
    assert bool((inputs["actions"][~mask] == -10).all())
    assert torch.allclose(inputs["states"][mask], (batch["observations"][mask] - 1) / 2)
    assert torch.equal(inputs["returns_to_go"][..., 0] * 4, batch["returns_to_go"])


def test_gr17_the_config_is_checked():
    from types import SimpleNamespace

    batch = batch_of(64)
    good = SimpleNamespace(state_dim=3, act_dim=2, max_ep_len=9)
    decision_transformer_inputs(batch, config=good)
    with pytest.raises(ValueError, match="not below the model's max_ep_len=4"):
        decision_transformer_inputs(batch, config=SimpleNamespace(state_dim=3, act_dim=2, max_ep_len=4))
    with pytest.raises(ValueError, match="states have 3 features, the model expects 7"):
        decision_transformer_inputs(batch, config=SimpleNamespace(state_dim=7, act_dim=2, max_ep_len=9))
    with pytest.raises(KeyError, match="the batch lacks states"):
        decision_transformer_inputs(batch, names={"states": "states"})


@pytest.mark.rl
def test_gr17_the_example_has_the_naive_loops_curve_and_beats_the_behaviour_policy():
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    main = runpy.run_path(str(EXAMPLE))["main"]
    options = "--steps 200 --oracle-steps 10 --online-rounds 1 --episodes 60 --trials 3"
    found = main(options.split())
    assert found["largest_loss_difference"] == 0.0
    assert found["offline_return"] > 1.2 * found["behaviour_return"]
    assert 0 < found["waiting_share"] < found["oracle_waiting_share"]
    assert len(found["online"]) == 1


ENGINE = """
import runpy, sys
import numpy as np, torch, deepspeed
# A C++ build of minutes, of which one process makes no use (deepspeed.comm.torch names torch itself).
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
from rl_replay_gear import ParallelLayout, TrajectoryLoader, TrajectoryTable, Uniform, Window
from rl_replay_gear.integrations.deepspeed import gear_dataloader
from rl_replay_gear.integrations.transformers import decision_transformer_inputs
ns = runpy.run_path(sys.argv[1])
table = TrajectoryTable(ns["SPEC"])
random = np.random.default_rng(0)
for n in (5, 30, 80):
    table.write({"observations": torch.from_numpy(random.normal(size=(n, 4)).astype(np.float32)),
                 "actions": torch.eye(2)[torch.from_numpy(random.integers(0, 2, n))],
                 "rewards": torch.ones(n)})
window = Window(20, 0, "head")
def loss_of(model, inputs):
    real = inputs["attention_mask"].bool()
    return torch.nn.functional.cross_entropy(
        model(**inputs).action_preds[real], inputs["actions"][real].argmax(-1))
def through_engine(**more):
    model = ns["small_model"]()
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, **more}
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.05), config=config)[0]
    layout = ParallelLayout.from_deepspeed(engine)
    assert (layout.dp_rank, layout.dp_size, layout.pp_size, layout.tp_size) == (0, 1, 1, 1)
    loader = gear_dataloader(engine, table, Uniform(over="steps"), window, seed=2, steps_per_epoch=8)
    assert len(loader) == 8 and loader.batch_size == 8
    losses = []
    for batch in loader:
        loss = loss_of(engine, decision_transformer_inputs(batch, return_scale=ns["SCALE"]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
episodes = {h: table.read(h) for h in table.handles().tolist()}
def naive_loop(clip):
    model = ns["small_model"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    choices = TrajectoryLoader(table, Uniform(over="steps"), window, 8, seed=2)
    zero, one, losses = torch.zeros(4), torch.ones(4), []
    for _ in range(8):
        chosen = next(choices)
        inputs = ns["naive_inputs"](episodes, chosen.handles.tolist(), chosen.anchors.tolist(), zero, one)
        loss = loss_of(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses
ours, naive = through_engine(gradient_clipping=0.0), naive_loop(None)
assert ours != [ours[0]] * 8
assert ours == naive, (ours, naive)
clipped = naive_loop(1.0)
assert clipped != naive
# Unless told otherwise, DeepSpeed clips the gradient to norm 1.
assert np.allclose(through_engine(), clipped, rtol=1e-6, atol=0), clipped
print("equal", ours)
"""


@pytest.mark.rl
def test_gr17_a_deepspeed_engine_trains_with_the_losses_of_a_naive_loop(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", ENGINE, str(EXAMPLE)],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout
    from rl_replay_gear.integrations.deepspeed import gear_dataloader

    with pytest.raises(TypeError, match="expected a DeepSpeed engine"):
        gear_dataloader(object(), None, Uniform(), Window(2))  # type: ignore[arg-type]


PIPELINE = """
import json, os, sys
import torch, deepspeed
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
from deepspeed.pipe import PipelineModule
from rl_replay_gear import (
    ColumnSpec, ParallelLayout, ShardedTable, TableSpec, TrajectoryTable, Uniform, Window)
from rl_replay_gear.randomness import CounterGenerator
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
net = PipelineModule(
    [torch.nn.Linear(4, 4) for _ in range(4)], num_stages=2, loss_fn=torch.nn.functional.mse_loss)
engine = deepspeed.initialize(
    model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1),
    config={"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2})[0]
layout = ParallelLayout.from_deepspeed(engine, columns_by_stage={0: ["x"], 1: ["y"]})
table = TrajectoryTable(TableSpec((ColumnSpec("x"), ColumnSpec("y")), 100, 10))
table.write({"x": torch.ones(5), "y": torch.zeros(5)})
sharded = ShardedTable(table, layout)
batch = sharded.collect(sharded.select(Uniform(), 6, generator=CounterGenerator(1)), Window(2))
place = [layout.dp_rank, layout.dp_size, layout.pp_stage, layout.pp_size, layout.tp_rank, layout.tp_size]
print("RESULT", json.dumps([place, list(batch.columns), batch.handles.tolist()]), flush=True)
os._exit(0)
"""


@pytest.mark.rl
def test_gr19_stages_of_a_deepspeed_pipeline_get_their_columns_of_the_same_items(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29572", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PIPELINE], env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    found = []
    for process in processes:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error[-3000:]
        found.append(json.loads(out.split("RESULT ", 1)[1].splitlines()[0]))
    (first, first_columns, first_items), (second, second_columns, second_items) = found
    assert first == [0, 1, 0, 2, 0, 1]
    assert second == [0, 1, 1, 2, 0, 1]
    assert (first_columns, second_columns) == (["x"], ["y"])
    assert first_items == second_items
