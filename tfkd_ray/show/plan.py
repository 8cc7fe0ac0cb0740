"""The cost of a sweep before it starts: trials at each rung, epochs, hours, GPU-hours, money, disk.

How many trials pass a rung is an expectation (see `receipt`); `at most` is never exceeded.
A comparison has a plan, too: runs of each arm, and epochs, none of which is saved.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.objectives import CrossEntropy
from tfkd_ray.settings.columns import in_columns, wrapped
from tfkd_ray.show.receipt import expected_epochs, reaching, shares
from tfkd_ray.show.status import counted
from tfkd_ray.space.arms import Arms, runs_of
from tfkd_ray.space.search_config import Finalists, Pausing
from tfkd_ray.space.space import Branch, Space

OF_MANY = 100
"""Trials of each objective of which a plan is made if a budget alone ends the search."""
PROBE_STEPS = 8
"""Steps of a probe, after one for warming up."""


@dataclass(frozen=True)
class Part:
    """The trials of one objective, or the runs of one arm."""

    objective: str
    """Its name, or that of the arm."""
    trials: int
    reaching: tuple[tuple[int, float], ...]
    """(epoch, expected number of trials that reach it), for each rung and the last epoch."""
    epochs: float
    """Expected epochs of all its trials."""
    most: int
    """Epochs if no trial were stopped."""
    epoch_s: float | None
    """Seconds of an epoch on this machine; None if it was not probed."""
    share: float | None = None
    """Share of a GPU's memory that a one-worker trial takes here, with its process's own; None
    without a GPU."""
    least: int | None = None
    """Epochs if trials pause, and none fails; None if they do not pause."""


@dataclass(frozen=True)
class SweepPlan:
    """The expected cost of a sweep, or the cost of a comparison."""

    parts: tuple[Part, ...]
    budgets: dict[str, float] | None
    """The budgets that end the search, if no number of trials does: the parts are then of `OF_MANY`."""
    cpus: int
    """CPUs of one trial, over its workers."""
    teacher_epochs: int
    teacher_s: float | None
    """Seconds for all teachers, one after the other, with the soft labels that they then cache."""
    workers: int
    gpus: float
    """GPUs of one trial, over its workers."""
    disk: int
    """Bytes of weights and checkpoints, those of teachers included."""
    unlabelled: tuple[float, ...]
    """Unlabelled images for each labelled one, in steps and soft labels: the ends of a range;
    none without any."""
    bank: int
    """Most bytes of soft labels in each node's cache."""
    compares: bool = False
    """True for a comparison: its parts are arms, and nothing is stopped early."""
    finalists: Finalists | None = None
    """Trials of each objective that get further seeds, and how many."""

    @property
    def epochs(self) -> float:
        """Expected epochs of all trials, without those of further seeds."""
        return sum(part.epochs for part in self.parts)

    @property
    def further(self) -> int:
        """Runs with further seeds, at most."""
        return sum(map(self.further_of, self.parts))

    def further_of(self, part: Part) -> int:
        """Return the runs with further seeds of an objective, at most: few of its trials may end."""
        if self.finalists is None:
            return 0
        return min(self.finalists.k, part.trials) * self.finalists.seeds

    @property
    def seconds(self) -> float | None:
        """Seconds of training, teachers included, one trial at a time; None without a probe."""
        if self.teacher_s is None or any(part.epoch_s is None for part in self.parts):
            return None
        seconds = self.teacher_s
        for part in self.parts:
            again = self.further_of(part) * part.reaching[-1][0]
            seconds += (part.epochs + again) * (part.epoch_s or 0)
        return seconds


def plan(space: Space, *, probe: bool = False) -> SweepPlan:
    """Plan a sweep.

    Args:
        probe: train some steps of each objective here to measure the seconds of an epoch; needs the
            data.
    """
    parts = []
    dealt = shares(space, OF_MANY * len(space.branches))
    for branch, trials in zip(space.branches, dealt.values(), strict=True):
        config = _with_usual_ratio(branch)
        seconds = _epoch_seconds(config) if probe else None
        memory = (
            _gpu_share(config) if probe and config.gpus_per_worker and config.workers == 1 else None
        )
        come, epochs = reaching(space, trials), expected_epochs(space, trials)
        least = round(epochs) if isinstance(space.stopping, Pausing) else None
        most = trials * space.epochs
        parts.append(Part(branch.objective, trials, come, epochs, most, seconds, memory, least))
    runs = [run for run in space.teacher_runs() if run.weights is None]
    teachers = {run.fingerprint(): _teacher_epochs(run) for run in runs}
    banked = any(any(branch.example.banks) for branch in space.branches)
    teacher_s = None
    if probe:
        teacher_s = sum(_epoch_seconds(run) * _teacher_epochs(run) for run in runs)
        # trials share views, up to the largest ratio
        labelling = 1 + max(ratio for branch in space.branches for ratio in ratios_of(branch))
        teacher_s += sum(
            _view_seconds(run) * labelling * _views_of(space, run.augment)
            for run in space.teacher_runs()
            if banked
        )
    config = space.example
    # a teacher keeps its weights
    finalists = space.search.finalists
    count = sum(dealt.values())
    if finalists is not None:
        count += sum(min(finalists.k, trials) * finalists.seeds for trials in dealt.values())
    disk = _weights(config) * _copies(space) * count
    disk += sum(_weights(run) for run in space.teacher_runs())
    bank = 0
    if banked:
        from tfkd_ray.learn.soft_labels import limit

        bank = int(limit())
    gpus = config.workers * config.gpus_per_worker
    ratios = [ratio for branch in space.branches for ratio in ratios_of(branch)]
    return SweepPlan(
        tuple(parts),
        space.search.budgets if space.search.num_samples is None else None,
        config.workers * config.cpus_per_worker,
        sum(teachers.values()),
        teacher_s,
        config.workers,
        gpus,
        disk,
        tuple(sorted({*ratios} - {0.0})),
        bank,
        finalists=finalists,
    )


def ratios_of(branch: Branch) -> list[float]:
    """Return how many unlabelled images a step takes for each labelled one: all ends and choices."""
    if branch.example.data.unlabelled is None:
        return [0.0]
    for p in branch.parameters:
        if p.path == ("data", "unlabelled_ratio"):
            return [float(value) for value in p.domain.probes]
    return [branch.example.data.unlabelled_ratio]


def _with_usual_ratio(branch: Branch) -> TrainConfig:
    """Return a configuration with the mean of a searched `data.unlabelled_ratio`."""
    config, ratios = branch.example, ratios_of(branch)
    if config.data.unlabelled is None:
        return config
    update = {"unlabelled_ratio": sum(ratios) / len(ratios)}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def unlabelled_ratio(config: TrainConfig) -> float:
    """Return how many unlabelled images a step takes for each labelled one."""
    return 0.0 if config.data.unlabelled is None else config.data.unlabelled_ratio


def plan_comparison(
    compared: Arms,
    seeds: Sequence[int],
    *,
    teacher_per_seed: bool = False,
    hold_out: bool = False,
    probe: bool = False,
) -> SweepPlan:
    """Plan a comparison with these seeds; `runs_of` explains its options.

    Args:
        probe: train some steps of each arm, and of each kind of teacher, here; needs the data.
    """
    runs = runs_of(compared, seeds, teacher_per_seed=teacher_per_seed, hold_out=hold_out)
    parts = []
    for arm in compared.arms:
        mine = [run.config for run in runs if run.arm == arm.name]
        config, epochs = mine[0], sum(one.epochs for one in mine)
        seconds = _epoch_seconds(config) if probe else None
        whole = ((config.epochs, float(len(mine))),)
        parts.append(Part(arm.name, len(mine), whole, epochs, epochs, seconds))
    made: dict[str, TeacherRun] = {}
    views: dict[tuple[str, str], tuple[TeacherRun, int]] = {}
    for config in (run.config for run in runs):
        for number, teacher in enumerate(config.teacher_runs()):
            name = teacher.fingerprint()
            if teacher.weights is None:
                made[name] = teacher
            if number < len(config.banks) and config.banks[number]:
                # arms with the same images share the views of their epochs
                first = json.dumps(config.augment.key(config.seed, 1), sort_keys=True)
                _, most = views.get((name, first), (teacher, 0))
                count = _views(config.augment, config.epochs) * (1 + unlabelled_ratio(config))
                views[name, first] = teacher, max(most, math.ceil(count))
    config = compared.example
    disk = sum(_weights(run.config) for run in runs) + sum(map(_weights, made.values()))
    ratios = {unlabelled_ratio(run.config) for run in runs} - {0.0}
    bank = 0
    if views:
        from tfkd_ray.learn.soft_labels import limit

        bank = int(limit())
    return SweepPlan(
        tuple(parts),
        None,
        config.workers * config.cpus_per_worker,
        sum(map(_teacher_epochs, made.values())),
        _seconds_of_teachers(made.values(), views.values()) if probe else None,
        config.workers,
        config.workers * config.gpus_per_worker,
        disk,
        tuple(sorted(ratios)),
        bank,
        compares=True,
    )


def _seconds_of_teachers(
    made: Iterable[TeacherRun], views: Iterable[tuple[TeacherRun, int]]
) -> float:
    """Return the seconds to train teachers, and to label views; one of each kind is probed.

    Args:
        made: the teachers to train.
        views: teachers, each with its number of views.
    """
    seconds, of_epoch, of_view = 0.0, dict[str, float](), dict[str, float]()
    for run in made:
        kind = _without_seed(run)
        if kind not in of_epoch:
            of_epoch[kind] = _epoch_seconds(run)
        seconds += of_epoch[kind] * _teacher_epochs(run)
    for run, count in views:
        kind = _without_seed(run)
        if kind not in of_view:
            of_view[kind] = _view_seconds(run)
        seconds += of_view[kind] * count
    return seconds


def _without_seed(run: TeacherRun) -> str:
    return run.model_copy(update={"seed": 0}).fingerprint()


def _teacher_epochs(run: TeacherRun) -> int:
    return run.stop_epoch or run.epochs


def _views(augment: Augment, epochs: int) -> int:
    """Return how many views of the images so many epochs have: one without random augmentation."""
    return epochs if augment.key(0, 1) != augment.key(0, 2) else 1


def _views_of(space: Space, augment: Augment) -> int:
    """Return how many views of the images a sweep has: those of each seed, where they vary."""
    views, finalists = _views(augment, space.epochs), space.search.finalists
    if views == 1 or finalists is None:
        return views
    return views * (1 + finalists.seeds)


def slots_here(space: Space) -> int:
    """Return how many trials a sweep runs at a time on this machine: one for each CPU or GPU share.

    At least one.
    """
    most = space.search.max_concurrent or space.search.most_trials
    return run_slots_here(space.example, min(most, space.search.most_trials))


def run_slots_here(config: TrainConfig, most: int) -> int:
    """Return how many of so many runs fit on this machine at a time; at least one."""
    have, take = float(os.cpu_count() or 1), config.workers * config.cpus_per_worker
    fit = have / take
    if config.gpus_per_worker:
        import torch

        fit = min(fit, torch.cuda.device_count() / (config.workers * config.gpus_per_worker))
    return max(1, min(int(fit), most))


def _copies(space: Space) -> int:
    """Return how many numbers a trial keeps for each weight, at most.

    The weights once, and two run states with weights, their average, and what the optimizer keeps.
    """
    found = []
    for branch in space.branches:
        first = {p.name: p.domain.probes[0] for p in branch.parameters}
        options = [first]
        for p in branch.parameters:
            if p.path in (("optim",), ("ema",)):
                options += [{**first, p.name: value} for value in p.domain.probes]
        for config in map(branch.config, options):
            averaged = config.ema is not None
            found.append(1 + 2 * (1 + averaged + config.optim.moments))
    return max(found)


def _weights(config: TrainConfig) -> int:
    """Return the bytes of a network's weights, in float32."""
    size = config.student.weights(config.data.shape, config.data.num_classes)
    if size is None:
        size = sum(p.numel() for p in config.build_student().state_dict().values())
    return 4 * size


def lines(
    found: SweepPlan, *, slots: int = 1, gpu_hour_price: float | None = None
) -> Iterator[str]:
    """Return a plan as lines of at most 80 columns.

    Args:
        slots: number of trials at a time.
        gpu_hour_price: price of an hour of one GPU.
    """
    if found.budgets is not None:
        ends = ", ".join(f"{value:g} {name}" for name, value in found.budgets.items())
        yield f"trials until a budget is spent: {ends}"
        yield f"the figures below are for {OF_MANY} trials of each objective"
    if not found.compares:
        yield from in_words(found)
    yield from in_columns(_table_of_arms(found) if found.compares else _table_of_trials(found), 80)
    most = sum(part.most for part in found.parts)
    if found.compares:
        yield f"{most} epochs in all, in {sum(part.trials for part in found.parts)} runs"
    else:
        least = sum(part.least for part in found.parts if part.least is not None)
        span = f"{found.epochs:.0f} epochs expected, at most {most}"
        if least:
            span = f"from {least} epochs (one trial at a time, none failed) to {most}"
        yield f"in all {span}; without early stopping always {most}"
        yield from _further_lines(found)
    if found.teacher_epochs:
        yield f"teachers, if not trained yet: {found.teacher_epochs} epochs, once"
    yield f"disk: at most {_bytes_per_epoch(found.disk)} of weights and checkpoints"
    if found.unlabelled:
        ends = f"{found.unlabelled[0]:g}"
        if len(found.unlabelled) > 1:
            ends += f" to {found.unlabelled[-1]:g}"
        yield f"unlabelled images: {ends} for each labelled one, in steps and soft labels"
    if found.bank:
        yield f"soft labels: the limit of each node's cache is {_bytes_per_epoch(found.bank)} (TFKD_BANK_GB)"
    yield from _hours(found, slots, gpu_hour_price)


def _further_lines(found: SweepPlan) -> Iterator[str]:
    """Yield what the further seeds of the finalists cost."""
    if found.finalists is None:
        return
    k, seeds = found.finalists.k, found.finalists.seeds
    epochs = found.further * found.parts[0].reaching[-1][0]
    share = 100 * epochs / max(1, found.epochs)
    each = "" if len(found.parts) == 1 else " of each objective"
    yield from wrapped(
        f"then {counted(seeds, 'further seed')} of the best {k}{each}: at most {found.further} runs, {epochs} epochs "
        f"({share:.0f} % more)"
    )


def _table_of_trials(found: SweepPlan) -> list[str]:
    table = ["objective\ttrials\texpected to reach epoch\tepochs\tat most"]
    for part in found.parts:
        reaching = ", ".join(f"{epoch}: {count:.0f}" for epoch, count in part.reaching)
        table.append(f"{part.objective}\t{part.trials}\t{reaching}\t{part.epochs:.0f}\t{part.most}")
    return table


def _table_of_arms(found: SweepPlan) -> list[str]:
    table = ["arm\truns\tepochs each\tepochs"]
    for part in found.parts:
        table.append(f"{part.objective}\t{part.trials}\t{part.most // part.trials}\t{part.most}")
    return table


def _hours(found: SweepPlan, slots: int, gpu_hour_price: float | None) -> Iterator[str]:
    """Return the lines of a plan on time, memory and money."""
    if found.seconds is None:
        each = "arm" if found.compares else "objective"
        yield f"hours: unknown; --probe measures a few steps of each {each} on this machine"
        return
    for part in found.parts:
        yield f"an epoch of {part.objective}: {part.epoch_s:.3g} s on this machine"
    if measured := [part.share for part in found.parts if part.share is not None]:
        fit = max(1, int(1 / max(measured)))
        setting = f"gpus_per_worker={1000 // fit / 1000:g}"
        yield f"GPU memory: a trial takes {max(measured):.0%} of a GPU; {fit} fit on one: {setting}"
    hours = found.seconds / 3600
    one = "run" if found.compares else "trial"
    yield f"training: {_time(found.seconds)} with one {one} at a time, {_time(found.seconds / slots)} with {slots}"
    yield from _budget_lines(found, slots)
    if found.gpus:
        money = (
            ""
            if gpu_hour_price is None
            else f", {hours * found.gpus * gpu_hour_price:,.2f} in money"
        )
        yield from wrapped(
            f"GPU-hours: {hours * found.gpus:.2f}{money}, if the GPUs are as fast as this machine"
        )


def _budget_lines(found: SweepPlan, slots: int) -> Iterator[str]:
    """Yield how many trials each budget is expected to be enough for, if they alone end the search."""
    trials = sum(part.trials for part in found.parts)
    seconds = sum(part.epochs * (part.epoch_s or 0) for part in found.parts) / trials
    held = {"time_budget_s": seconds / slots, "gpu_hours": found.gpus * seconds / 3600}
    held["cpu_hours"] = found.cpus * seconds / 3600
    for name, limit in (found.budgets or {}).items():
        if held.get(name):
            yield f"{limit:g} {name}: about {limit / held[name]:.0f} trials"


def in_words(found: SweepPlan) -> Iterator[str]:
    """Yield what a sweep is expected to do, in sentences: its trials, and what early stopping leaves."""
    parts = found.parts
    trials = sum(part.trials for part in parts)
    epochs = parts[0].reaching[-1][0]
    shares = {part.trials for part in parts}
    dealt = f"{min(shares)} each" if len(shares) == 1 else f"{min(shares)} or {max(shares)} each"
    whose = parts[0].objective if len(parts) == 1 else f"{dealt} of {_and_listed(parts)}"
    yield from wrapped(f"{trials} trials of {epochs} epochs: {whose}.", rest="")
    rungs = [epoch for epoch, _ in parts[0].reaching[:-1]]
    if not rungs:
        yield "None is stopped early."
        return
    ends = sum(part.reaching[-1][1] for part in parts)
    where = " and ".join(map(str, rungs)) if len(rungs) < 4 else f"{rungs[0]} to {rungs[-1]}"
    saved = 1 - found.epochs / max(1, sum(part.most for part in parts))
    yield from wrapped(
        f"Trials that are behind are stopped after epoch {where}, so that about {ends:.0f} of {trials} run to the "
        f"end. That saves {saved * 100:.0f} % of the epochs.",
        rest="",
    )
    yield ""


def _and_listed(parts: tuple[Part, ...]) -> str:
    *some, last = [part.objective for part in parts]
    return f"{', '.join(some)} and {last}"


def _epoch_seconds(config: TrainConfig) -> float:
    """Measure the seconds of an epoch from a few steps on a part of the data.

    A teacher that runs in every step is replaced by an untrained one. If its soft labels are
    cached, the step is one of plain training, and `_view_seconds` measures the labels. An
    unlabelled image takes as long as a labelled one.
    """
    from tfkd_ray.learn.loop import train
    from tfkd_ray.learn.teacher_input import untrained

    data = config.data.labelled.model_copy(
        update={"subset": config.optim.batch_size * PROBE_STEPS, "val_fraction": 0.0}
    )
    changes: dict[str, Any] = {
        "data": data,
        "epochs": 2,
        "workers": 1,
        "gpus_per_worker": min(config.gpus_per_worker, 1),
    }
    changes |= {"stop_epoch": None, "stop_accuracy": None} if isinstance(config, TeacherRun) else {}
    if config.banked:
        changes |= {"objective": CrossEntropy(), "teacher": None, "teachers": {}}
    short = config.model_copy(update=changes)
    *_, last = train(short, teacher=[untrained(run) for run in short.teacher_runs()] or None)
    train_set, val_set = config.data.load()
    # validation takes about a third of training, and with an average there are two
    share = 1 / 3 if config.ema is None else 2 / 3
    images = len(train_set) * (1 + unlabelled_ratio(config))
    images += (len(val_set) if val_set is not None else 0) * share
    return images / last.metrics["images_per_s"] / config.workers


def _view_seconds(run: TeacherRun) -> float:
    """Measure the seconds in which an untrained teacher labels one view of the train images."""
    import torch

    from tfkd_ray.learn.evaluate import images_at_once, predictions
    from tfkd_ray.learn.teacher_input import untrained

    device = (
        torch.device("cuda", torch.cuda.current_device())
        if run.gpus_per_worker
        else torch.device("cpu")
    )
    train_set, _ = run.data.load()
    count = max(run.optim.batch_size * PROBE_STEPS, images_at_once(run.data, device))
    some = train_set.part(torch.arange(min(len(train_set), count))).on(device)
    network = untrained(run).to(device)
    network = network.to(memory_format=run.student.memory_format)
    for images in (some.part(torch.arange(1, device=device)), some):  # the first one warms up
        start = time.perf_counter()
        torch.cat(
            [
                guess.cpu()
                for guess, _ in predictions(network, images, run.data, bf16=run.precision == "bf16")
            ]
        )
    return (time.perf_counter() - start) / len(some) * len(train_set)


GPU_CONTEXT = 2**29
"""Bytes of a GPU that a process takes beside its tensors, roughly."""


def _gpu_share(config: TrainConfig) -> float | None:
    """Return the share of the GPU's memory that a run needs, with all of its data.

    It is computed from the largest run of this process so far. The trial that is first to need a
    view of cached soft labels has the teacher beside the student while it fills it.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    taken = torch.cuda.max_memory_reserved() + GPU_CONTEXT + resident_bytes(config)
    banked = zip(config.teacher_runs(), config.banks, strict=False)
    taken += max((_labelling_bytes(run) for run, kept in banked if kept), default=0)
    return min(1.0, taken / (0.95 * total))


def _labelling_bytes(run: TeacherRun) -> int:
    """Return the most bytes of the GPU that are in use while a teacher labels a view."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _view_seconds(run)
    return torch.cuda.max_memory_reserved()


def resident_bytes(config: TrainConfig) -> int:
    """Return the bytes of images and soft labels that a run keeps on its device.

    Images that are read batch by batch do not count.
    """
    from tfkd_ray.learn.features import numbers_of
    from tfkd_ray.learn.soft_labels import fits
    from tfkd_ray.learn.top_labels import COLUMNS

    sets = [found for found in config.data.load() if found is not None]
    labelled = sum(map(len, sets))
    shown = labelled + (len(config.data.load_unlabelled()) if config.data.unlabelled else 0)
    images = 0 if config.data.streams else shown * math.prod(config.data.shape)
    if not any(config.banks):
        return images
    count = labelled + len(sets[0]) * unlabelled_ratio(config)
    widths = {"online": 0, "bank": config.data.num_classes, "top50": COLUMNS}
    labels = 2 * round(count) * sum(widths[kind] for kind in config.label_kinds)
    layers = numbers_of(config.ready_objective().teacher_layers)
    return images + labels + (2 * len(sets[0]) * layers if fits(len(sets[0]), layers) else 0)


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def _bytes_per_epoch(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count > 2**30 else f"{count / 2**20:.1f} MiB"
