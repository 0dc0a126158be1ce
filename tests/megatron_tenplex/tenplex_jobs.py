"""What workers of the Megatron tests do; imported before the workers are forked."""

from __future__ import annotations

import os
import signal
import time
import warnings

import torch

from megatron_tenplex import (
    ParallelConfig,
    Reconfigurator,
    TensorStore,
    Topology,
    World,
    gpt_layout,
    lower_bound,
)
from megatron_tenplex.arguments import Schedule
from megatron_tenplex.testing import install_cpu_compat

install_cpu_compat()

import megatron_tenplex.megatron_adapter  # noqa: E402, F401 - imported once, before the fork
from megatron_tenplex.testing.gpt import GPTJob  # noqa: E402, F401


def quiet():
    warnings.filterwarnings("ignore")


def tour(store, worker, workers, job, layouts, steps, last_steps=None, **options):
    """Losses and norms of a run through ``layouts`` and of the uninterrupted run of the first one."""
    quiet()
    world = World(store, worker, workers)
    found = {"bytes": [], "idle": []}
    total = steps * (len(layouts) - 1) + (last_steps or steps)
    for name, visited in (("steady", layouts[:1]), ("elastic", layouts)):
        elastic = Reconfigurator(job, world=world, verify=True, **options)
        state = elastic.start(ParallelConfig.parse(visited[0]))
        curve = []
        for number, text in enumerate(visited):
            if number:
                source = elastic.gather(elastic.describe())
                state = elastic.reconfigure(ParallelConfig.parse(text))
                target = elastic.target_layout()
                least = lower_bound(source, target, placement=world.members)
                moved = sum(world.all_gather_json(elastic.report.received_bytes))
                found["bytes"].append((moved, least, lower_bound(source, target)))
            found["idle"].append(state is None)
            more = total - len(curve) if number == len(visited) - 1 else steps
            for _ in range(more):
                curve.append(job.step(state, elastic.parallel) if state is not None else None)
        found[name] = curve
    return found


def differences(results):
    """Largest difference of losses and norms between the two curves of :func:`tour`."""
    steady, elastic = (
        [next(r[name][i] for r in results if r[name][i] is not None) for i in range(len(results[0][name]))]
        for name in ("steady", "elastic")
    )
    return tuple(max(abs(a[k] - b[k]) for a, b in zip(steady, elastic, strict=True)) for k in (0, 1))


def there_and_back(store, worker, workers, job, layouts, **options):
    """Whether state is the same after a tour that ends in the first layout, without a step between."""
    quiet()
    world = World(store, worker, workers)
    elastic = Reconfigurator(job, world=world, verify=True, placement="identity", **options)
    state = elastic.start(ParallelConfig.parse(layouts[0]))
    for _ in range(2):
        job.step(state, elastic.parallel)
    state.extra = {"note": 3}
    before = {s: t.clone() for s, t in elastic.describe().shards.items()}
    small = elastic.gather_small()
    del state
    for text in [*layouts[1:], layouts[0]]:
        elastic.reconfigure(ParallelConfig.parse(text))
    after = dict(elastic.describe().shards)
    again = elastic.gather_small()
    same = before.keys() == after.keys() and all(
        torch.equal(before[s].view(torch.uint8), after[s].view(torch.uint8)) for s in before if before[s].ndim
    )
    keep = ("common", "iteration", "progress", "extra")
    return (
        same,
        {k: small[k] for k in keep} == {k: again[k] for k in keep},
        small["common"]["groups"][0]["step"],
    )


def padded(store, worker, workers, job, layouts, vocab_size):
    """Rows of the embedding on each role, real ones and padding, in each layout."""
    quiet()
    world = World(store, worker, workers)
    elastic = Reconfigurator(job, world=world, verify=True, vocab_size=vocab_size)
    found = []
    for number, text in enumerate(layouts):
        parallel = ParallelConfig.parse(text)
        state = elastic.reconfigure(parallel) if number else elastic.start(parallel)
        if not number:
            job.step(state, elastic.parallel)
        weights = elastic.describe()
        rows = {
            s.box.offset[0]: t.clone().numpy()
            for s, t in weights.shards.items()
            if s.key == "model.embedding.word_embeddings.weight"
        }
        found.append((rows, [float(p.abs().max()) for p in weights.padding if p.numel()]))
    return found


def random_streams(store, worker, workers, job, layouts):
    """The next random numbers of every stream, before and after each change."""
    quiet()
    from megatron.core import tensor_parallel

    world = World(store, worker, workers)
    elastic = Reconfigurator(job, world=world, placement="identity")
    elastic.start(ParallelConfig.parse(layouts[0]))
    job.step(elastic.state, elastic.parallel)

    def drawn():
        kept = elastic._megatron.capture_rng()
        numbers = [torch.rand(2).tolist()]
        with tensor_parallel.get_cuda_rng_tracker().fork():
            numbers.append(torch.rand(2).tolist())
        elastic._megatron.restore_rng(kept)
        return numbers

    found = [drawn()]
    for text in layouts[1:]:
        elastic.reconfigure(ParallelConfig.parse(text))
        found.append(drawn())
    return found


def failing(store, worker, workers, job, layout, other, how):
    """A change that fails without a dead worker; then two more steps in the old layout."""
    quiet()
    world = World(store, worker, workers, timeout=6)
    builds = []

    def build(parallel):
        builds.append(parallel)
        if how == "build" and worker == 1 and len(builds) == 2:
            raise ValueError("no such model")
        return job(parallel)

    elastic = Reconfigurator(build, world=world, verify=True)
    state = elastic.start(ParallelConfig.parse(layout))
    curve = [job.step(state, elastic.parallel) for _ in range(2)]
    before = {s: t.clone() for s, t in elastic.describe().shards.items()}
    del state
    if how == "transport":
        spoil(elastic.transport, worker)
    if how == "memory":
        elastic.staging_bytes = 1 << 55
    try:
        elastic.reconfigure(ParallelConfig.parse(other))
        said = "no error"
    except Exception as error:
        said = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    after = elastic.describe().shards
    kept = all(torch.equal(before[s], after[s]) for s in before)
    curve += [job.step(elastic.state, elastic.parallel) for _ in range(2)]
    return said, kept, str(elastic.parallel), curve, len(builds)


def spoil(transport, worker):
    """Flip a bit of the first message that worker 1 receives."""
    exchange = transport.exchange

    def wrong(sends, receives):
        pending = exchange(sends, receives)
        wait = pending.wait

        def spoiled():
            wait()
            if worker == 1 and receives:
                receives[0][1].view(torch.uint8)[5] ^= 1

        pending.wait = spoiled
        return pending

    transport.exchange = wrong


def killed(store, worker, workers, job, layout, other, phase, root, steps):
    """Steps, a snapshot, and a change during which worker 1 is killed; how long the others took to notice."""
    quiet()
    world = World(store, worker, workers, timeout=15)
    replicas = TensorStore(root, host=f"host{worker}")
    elastic = Reconfigurator(
        job, world=world, store=replicas, topology=Topology(ranks_per_host=1), placement="identity"
    )
    state = elastic.start(ParallelConfig.parse(layout))
    for _ in range(steps):
        job.step(state, elastic.parallel)
    elastic.snapshot()
    del state
    if worker == 1:
        owner, name = {
            "gather": (elastic, "gather"),
            "plan": (elastic, "_agree_on"),
            "groups": (world, "form"),
            "build": (elastic, "_build"),
            "move": (elastic.transport, "exchange"),
            "commit": (elastic, "apply_small"),
        }[phase]
        setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    started = time.monotonic()
    try:
        elastic.reconfigure(ParallelConfig.parse(other))
        said = "no error"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - started


def resumed(store, worker, workers, job, layout, root, steps, hosts):
    """Start from replicas in ``layout`` and go on."""
    quiet()
    world = World(store, worker, workers)
    elastic = Reconfigurator(
        job,
        world=world,
        store=TensorStore(root, host=hosts[worker]),
        topology=Topology(ranks_per_host=1),
    )
    state = elastic.start(ParallelConfig.parse(layout))
    return state.iteration, [job.step(state, elastic.parallel) for _ in range(steps)]


def analytic_layouts(store, worker, workers, cases):
    """(layout, keys that differ, differing shards of rank 0) of ``gpt_layout`` against the real model."""
    quiet()
    world = World(store, worker, workers)
    wrong = []
    for job, texts in cases:
        for text in texts:
            elastic = Reconfigurator(job, world=world, vocab_size=job.shape.vocab_size)
            parallel = ParallelConfig.parse(text).resolve(workers)
            elastic.start(parallel)
            real = elastic.target_layout()
            guess = gpt_layout(job.shape, parallel, precision=job.precision, bucket_size=job.bucket_size)
            keys = set(real.tensors) ^ set(guess.tensors)
            keys |= {
                k for k in real.tensors.keys() & guess.tensors.keys() if real.tensors[k] != guess.tensors[k]
            }
            elements = [
                (rank, sorted(map(repr, pieces(a) ^ pieces(b)))[:4])
                for rank, (a, b) in enumerate(zip(real.shards, guess.shards, strict=True))
                if pieces(a) != pieces(b)
            ]
            if keys or elements:
                wrong.append((str(job.shape), text, sorted(keys), elements[:1]))
    return wrong


def pieces(shards):
    """Boxes by key: two ways to write one range are the same."""
    return {(s.key, box) for s in shards for box in s.boxes()}


def scheduled(store, worker, workers, job, layout, changes, iterations):
    """The loop of a script with a schedule; workers without a role take part in its boundaries."""
    quiet()
    world = World(store, worker, workers)
    elastic = Reconfigurator(job, world=world)
    state = elastic.start(ParallelConfig.parse(layout))
    schedule = Schedule({at: ParallelConfig.parse(text) for at, text in changes.items()})
    curve = []
    for _ in range(iterations):
        curve.append(job.step(state, elastic.parallel) if state is not None else None)
        state = schedule.at_boundary(elastic)
    return curve


def prepared(store, worker, workers, job, before, after, shadow):
    """A change that was prepared two steps ahead, and the steady run; what was timed, what was computed."""
    quiet()
    world = World(store, worker, workers)
    found = {}
    for name in ("steady", "elastic"):
        elastic = Reconfigurator(job, world=world, verify=True)
        state = elastic.start(ParallelConfig.parse(before))
        curve = [job.step(state, elastic.parallel) for _ in range(2)]
        if name == "elastic":
            elastic.prepare(ParallelConfig.parse(after), shadow=shadow)
            curve += [job.step(state, elastic.parallel) for _ in range(2)]
            elastic.planning.wait()
            found["computed"] = [elastic.planning.computed]
            state = elastic.reconfigure(ParallelConfig.parse(after))
            found["spans"] = [(s.name, s.began, s.ended) for s in elastic.trace.spans]
            elastic.prepare(ParallelConfig.parse(before))
            elastic.prepare(ParallelConfig.parse(before))  # the same layouts: nothing to compute
            elastic.planning.wait()
            found["computed"].append(elastic.planning.computed)
        curve += [job.step(state, elastic.parallel) for _ in range(6 - len(curve))]
        found[name] = curve
    return found


def badly_prepared(store, worker, workers, job, before, after):
    """A preparation in which one worker fails to build, then a step, then a change that works."""
    quiet()
    world = World(store, worker, workers, timeout=6)
    builds = []

    def build(parallel):
        builds.append(parallel)
        if worker == 1 and len(builds) == 2:
            raise ValueError("no such model")
        return job(parallel)

    elastic = Reconfigurator(build, world=world, verify=True)
    state = elastic.start(ParallelConfig.parse(before))
    curve = [job.step(state, elastic.parallel) for _ in range(2)]
    try:
        elastic.prepare(ParallelConfig.parse(after))
        said = "no error"
    except Exception as error:
        said = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    curve.append(job.step(state, elastic.parallel))
    state = elastic.reconfigure(ParallelConfig.parse(after))
    curve.append(job.step(state, elastic.parallel))
    return said, curve


def threads_after_changes(store, worker, workers, job, layouts, kept):
    """Number of threads of this process after each layout."""
    quiet()
    elastic = Reconfigurator(job, world=World(store, worker, workers, kept_groups=kept))
    counts = []
    for number, text in enumerate(layouts):
        parallel = ParallelConfig.parse(text)
        state = elastic.reconfigure(parallel) if number else elastic.start(parallel)
        job.step(state, elastic.parallel)
        counts.append(len(os.listdir("/proc/self/task")))
    return counts
