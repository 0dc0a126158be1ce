"""Train a Hugging Face Decision Transformer on CartPole through the replay, offline and then online.

    python examples/rl_replay_gear_decision_transformer.py [--steps 600] [--out FOLDER]

The behaviour policy is a noisy controller. Offline, batches come once from a TrajectoryLoader and once from a
naive loop over a Python list that is given the same (trajectory, step) pairs: the two loss curves must be
equal. Online, the trained model acts, its episodes replace the oldest, and training goes on. Prints returns
and the share of time spent waiting for data; with --out writes the curves as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from rl_replay_gear import (
    ColumnSpec,
    ReturnsToGo,
    RunningMoments,
    TableSpec,
    TrajectoryLoader,
    TrajectoryTable,
    TrajectoryWriter,
    Uniform,
    Window,
)
from rl_replay_gear.integrations.transformers import decision_transformer_inputs

CONTEXT, SCALE, MAX_STEPS = 20, 100.0, 500
TARGET = 500.0  # the return asked for; CartPole-v1 gives no more
SPEC = TableSpec(
    (
        ColumnSpec("observations", (4,)),
        ColumnSpec("actions", (2,), fill=-10.0),  # one-hot; padded actions are -10 as in the paper's code
        ColumnSpec("rewards"),
    ),
    max_steps=20_000,
    max_trajectories=400,
    derived=(ReturnsToGo(),),
)
ONE_HOT = np.eye(2, dtype=np.float32)


def play(env: gymnasium.Env, writer: TrajectoryWriter, policy: Callable[..., int], seed: int) -> float:
    """One episode into the table; its return."""
    observation, _ = env.reset(seed=seed)
    total, done = 0.0, False
    history: list[tuple[np.ndarray, int]] = []
    while not done:
        action = policy(observation, history, total)
        history.append((observation, action))
        following, reward, terminated, truncated, _ = env.step(action)
        writer.append(observations=observation, actions=ONE_HOT[action], rewards=float(reward))
        observation, total, done = following, total + float(reward), terminated or truncated
    writer.commit()
    return total


def behaviour(random: np.random.Generator) -> Callable[..., int]:
    """A good controller that acts at random most of the time, how often varies by episode."""
    state = {"noise": 0.0}

    def policy(observation: np.ndarray, history: list[Any], _: float) -> int:
        if not history:
            state["noise"] = random.uniform(0.6, 1.0)
        if random.random() < state["noise"]:
            return int(random.integers(2))
        _, velocity, angle, spin = observation
        return int(angle + 0.4 * spin + 0.1 * velocity > 0)

    return policy


def small_model() -> DecisionTransformerModel:
    """One layer, 48 features; the same initial weights in every call."""
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        state_dim=4, act_dim=2, hidden_size=48, n_layer=1, n_head=2, max_ep_len=MAX_STEPS + 1,
        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, action_tanh=False,
    )  # fmt: skip
    return DecisionTransformerModel(config)


def train_step(model: DecisionTransformerModel, optimizer: Any, inputs: Mapping[str, Tensor]) -> float:
    """Cross entropy of the actions at real steps."""
    predicted = model(**inputs).action_preds
    real = inputs["attention_mask"].bool()
    loss = torch.nn.functional.cross_entropy(predicted[real], inputs["actions"][real].argmax(-1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def naive_inputs(
    episodes: Mapping[int, Mapping[str, Tensor]], handles: list[int], anchors: list[int],
    mean: Tensor, std: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """The same batch by a loop over a Python dict: the oracle of the replay."""
    batch = len(handles)
    out = {
        "states": torch.zeros(batch, CONTEXT, 4),
        "actions": torch.full((batch, CONTEXT, 2), -10.0),
        "rewards": torch.zeros(batch, CONTEXT, 1),
        "returns_to_go": torch.zeros(batch, CONTEXT, 1),
        "timesteps": torch.zeros(batch, CONTEXT, dtype=torch.int64),
        "attention_mask": torch.zeros(batch, CONTEXT, dtype=torch.int64),
    }
    for i, (handle, anchor) in enumerate(zip(handles, anchors, strict=True)):
        episode = episodes[handle]
        reward = episode["rewards"].double()
        steps = range(anchor, min(anchor + CONTEXT, len(reward)))
        for j, step in enumerate(steps, CONTEXT - len(steps)):
            out["states"][i, j] = (episode["observations"][step] - mean) / std
            out["actions"][i, j] = episode["actions"][step]
            out["rewards"][i, j, 0] = reward[step]
            out["returns_to_go"][i, j, 0] = reward[step:].sum().float() / SCALE
            out["timesteps"][i, j] = step
            out["attention_mask"][i, j] = 1
    return out


def acting(model: DecisionTransformerModel, mean: Tensor, std: Tensor, target: float) -> Callable[..., int]:
    """Greedy actions of the model for a wanted return."""

    def policy(observation: np.ndarray, history: list[tuple[np.ndarray, int]], gained: float) -> int:
        recent = history[-(CONTEXT - 1) :]
        first = len(history) - len(recent)
        states = torch.from_numpy(np.stack([*[o for o, _ in recent], observation]))
        actions = torch.from_numpy(np.stack([*[ONE_HOT[a] for _, a in recent], ONE_HOT[0]]))
        steps = torch.arange(first, first + len(states))
        with torch.no_grad():
            out = model(
                states=((states - mean) / std)[None],
                actions=actions[None],
                rewards=torch.ones(1, len(states), 1),
                returns_to_go=((target - steps.float()).clamp(min=1.0) / SCALE)[None, :, None],
                timesteps=steps[None],
                attention_mask=torch.ones(1, len(states), dtype=torch.int64),
            )
        return int(out.action_preds[0, -1].argmax())

    return policy


def train(
    model: DecisionTransformerModel,
    inputs: Callable[[], Mapping[str, Tensor]],
    steps: int,
    learning_rate: float = 2e-3,
) -> dict[str, Any]:
    """The loss curve and where the time went."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
    losses, waiting, begin = [], 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = inputs()
        waiting += time.perf_counter() - asked
        losses.append(train_step(model, optimizer, batch))
    share = waiting / (time.perf_counter() - begin)
    return {"losses": losses, "waiting_seconds": waiting, "waiting_share": share}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Loss with its oracle, returns against the behaviour policy, and the time spent waiting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, returns, waiting) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    loss.plot(result["offline_losses"], lw=2.5, color="tab:blue", label="TrajectoryLoader")
    loss.plot(result["oracle_losses"], lw=0.7, color="black", label="naive loop")
    loss.set(title="Offline loss", xlabel="step", ylabel="cross entropy")
    loss.legend()
    rounds = [result["offline_return"], *[entry["return"] for entry in result["online"][1:]]]
    rounds.append(result["online_return"])
    returns.axhline(result["behaviour_return"], color="tab:gray", ls=":", label="behaviour policy")
    returns.plot(range(len(rounds)), rounds, "o-", color="tab:blue", label="Decision Transformer")
    returns.set(
        title="Mean return", xlabel="0: offline; then after each round online", ylim=(0, MAX_STEPS * 1.05)
    )
    returns.legend(loc="upper left")
    shares = [100 * result["waiting_share"], 100 * result["oracle_waiting_share"]]
    bars = waiting.bar(["TrajectoryLoader", "naive loop"], shares, color=["tab:blue", "tab:gray"])
    waiting.bar_label(bars, fmt="%.1f %%")
    waiting.set(title="Share of training time spent waiting for data", ylabel="%", ylim=(0, 100))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Offline with its oracle, then online; returns what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="offline training steps")
    parser.add_argument("--oracle-steps", type=int, default=None, help="steps of the naive loop; all of them")
    parser.add_argument("--online-rounds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=10, help="evaluation episodes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=150, help="behaviour episodes")
    parser.add_argument("--out", type=Path, default=None, help="folder of the .json and .png")
    options = parser.parse_args(argv)
    env = gymnasium.make("CartPole-v1")
    table = TrajectoryTable(SPEC)
    writer = TrajectoryWriter(table)
    policy = behaviour(np.random.default_rng(0))
    returns = [play(env, writer, policy, seed) for seed in range(options.episodes)]
    moments = RunningMoments((4,))
    for handle in table.handles().tolist():
        moments.add(table.read(handle)["observations"])
    mean, std = moments.mean.float(), moments.std.float() + 1e-6
    result: dict[str, Any] = {"behaviour_return": float(np.mean(returns)), "behaviour_best": max(returns)}
    print(f"behaviour policy: mean return {result['behaviour_return']:.1f}, best {max(returns):.0f}")

    def loader(**more: Any) -> TrajectoryLoader:
        return TrajectoryLoader(
            table, Uniform(over="steps"), Window(CONTEXT, 0, "head"), options.batch_size, seed=1, **more
        )

    model, batches = small_model(), loader()
    replay = train(
        model,
        lambda: decision_transformer_inputs(
            next(batches), state_mean=mean, state_std=std, return_scale=SCALE, config=model.config
        ),
        options.steps,
    )
    episodes = {handle: table.read(handle) for handle in table.handles().tolist()}
    choices = loader()

    def from_list() -> dict[str, Tensor]:
        chosen = next(choices)
        return naive_inputs(episodes, chosen.handles.tolist(), chosen.anchors.tolist(), mean, std)

    same = options.steps if options.oracle_steps is None else min(options.oracle_steps, options.steps)
    oracle = train(small_model(), from_list, same)
    difference = float(np.abs(np.subtract(replay["losses"][:same], oracle["losses"])).max())
    evaluate = acting(model, mean, std, TARGET)
    offline = [
        play(env, TrajectoryWriter(TrajectoryTable(SPEC)), evaluate, 10_000 + i)
        for i in range(options.trials)
    ]
    print(
        f"offline: mean return {np.mean(offline):.1f} over {len(offline)} episodes, "
        f"waiting {replay['waiting_share']:.1%}"
    )
    print(
        f"the naive loop's losses differ by at most {difference:.1e}; it waits {oracle['waiting_share']:.1%}"
    )
    result |= {
        "offline_return": float(np.mean(offline)),
        "offline_returns": offline,
        "offline_losses": replay["losses"],
        "oracle_losses": oracle["losses"],
        "largest_loss_difference": difference,
        "waiting_seconds": replay["waiting_seconds"],
        "oracle_waiting_seconds": oracle["waiting_seconds"],
        "waiting_share": replay["waiting_share"],
        "oracle_waiting_share": oracle["waiting_share"],
        "online": [],
    }
    for turn in range(options.online_rounds):
        gained = [play(env, writer, evaluate, 20_000 + 100 * turn + i) for i in range(options.trials)]
        more = train(
            model,
            lambda: decision_transformer_inputs(
                next(batches), state_mean=mean, state_std=std, return_scale=SCALE
            ),
            max(options.steps // 10, 1),
            learning_rate=5e-4,
        )
        result["online"].append(
            {
                "return": float(np.mean(gained)),
                "losses": more["losses"],
                "waiting_share": more["waiting_share"],
            }
        )
        print(
            f"online {turn}: mean return {np.mean(gained):.1f}, table of {len(table)} trajectories, "
            f"waiting {more['waiting_share']:.1%}"
        )
    final = [
        play(env, TrajectoryWriter(TrajectoryTable(SPEC)), evaluate, 10_000 + i)
        for i in range(options.trials)
    ]
    result["online_return"] = float(np.mean(final))
    print(f"after online training: mean return {np.mean(final):.1f} over the same episodes as offline")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decision_transformer.json").write_text(json.dumps(result, indent=1))
        draw(result, options.out / "decision_transformer.png")
    return result


if __name__ == "__main__":
    main()
