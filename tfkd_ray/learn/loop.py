"""The loop: plain PyTorch, read from top to bottom, one yield per epoch. It does not know Ray.

`train` is a generator: `list(train(config))` is a whole run, `next()` trains an epoch, `close()`
stops it. `train_in` is the same run in a directory, where it writes checkpoints and from which it
resumes. With torch.distributed initialised, every worker runs `train` with the same configuration
and processes its share of every batch.

Shapes: B = images of a batch on this worker, K = classes.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tfkd_ray.learn.augment import Augment, EpochView, View
from tfkd_ray.learn.average import Average
from tfkd_ray.learn.checkpoint import WEIGHTS, State, load_state, save_state, save_weights
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.dataset import load_unlabelled
from tfkd_ray.learn.evaluate import (
    asked_beside,
    metric_sums,
    metrics_at_once,
    metrics_from,
    predictions,
    tf32,
)
from tfkd_ray.learn.features import (
    Caught,
    Tapped,
    caught,
    from_rows,
    in_rows,
    numbers_of,
    outputs_of,
    tapped_student,
)
from tfkd_ray.learn.gpu import architecture_trouble, why_no_gpu
from tfkd_ray.learn.images import (
    Images,
    ImageSet,
    address,
    generator,
    random_states,
    seed_all,
)
from tfkd_ray.learn.initial import factors_by_depth, set_training
from tfkd_ray.learn.mixing import Mixed
from tfkd_ray.learn.models import (
    OwnNetwork,
    Timm,
    check_learns,
    check_lone_image,
    may_lack_gradients,
)
from tfkd_ray.learn.objectives import Canonical, OwnObjective, Terms
from tfkd_ray.learn.optimizers import Updates, new_optimizer
from tfkd_ray.learn.own_loop import Diverged as Diverged
from tfkd_ray.learn.own_loop import OwnLoop
from tfkd_ray.learn.several import Teacher, Teachers, banks_in, combined, each_of
from tfkd_ray.learn.soft_labels import Bank, fits
from tfkd_ray.learn.stopwatch import Stopwatch
from tfkd_ray.learn.top_labels import COLUMNS, MOST_LOST, share_lost, unpacked
from tfkd_ray.learn.unlabelled import REST, UnlabelledPart, UnlabelledStream, number_beside
from tfkd_ray.settings.columns import to_stderr
from tfkd_ray.settings.errors import ConfigError, Say, check_kind
from tfkd_ray.settings.files import DISK_ERRORS, remove_partial

LOOP_VERSION = 3
"""Increased by hand when the loop's numbers change; part of the fingerprint of every run and
teacher."""


class Epoch(NamedTuple):
    """The result of one epoch, as `train` yields it."""

    metrics: dict[str, float]
    """`epoch` (from 1), `train_loss`, its unweighted parts `train_ce` and `train_kd` (none of a
    function of the user's own, which gives the whole loss), with unlabelled images
    `train_kd_unlabelled`, their soft part,
    `train_kd_ratio` (see `gradient_ratio`; from the first worker's share of the first batch; none of
    an objective that asks for layers, whose soft part may not depend on the logits),
    `val_...` (see `evaluate`), `lr` of the last step, `parameters` (number of the student's),
    `seconds` (of this epoch, with validation), `images_per_s` (labelled ones, without validation)."""
    state: Callable[[], State]
    """Function that copies the whole run state to the CPU: `epoch`, `model`, `optimizer`, `history`
    (the metrics of all epochs), `run`, and `objective` (what an objective that asks for layers
    owns). The state has no schedule and no generator: the learning
    rate is a function of the step, and randomness is a function of (seed, purpose, epoch, step,
    worker)."""


_Seen = Callable[[list[Tensor]], Iterator[Tensor]]
"""Yields the images of each batch of indices, augmented and normalised."""
_BankedView = tuple[UnlabelledPart, _Seen]
"""Unlabelled images that a bank holds as one view, and what yields them."""
_Norms = tuple[int, Tensor] | None
"""Images of a piece of a batch, and the norms of its gradients; see `gradient_norms`."""

EXPLODED = 100
"""Multiple of the loss of guessing, log K, above which a run counts as exploded although its loss
is finite."""


def train(
    config: TrainConfig,
    state: State | None = None,
    *,
    teacher: Teachers = None,
    more_metrics: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Generator[Epoch, None, None]:
    """Train one student; yield after every epoch, from the one after `state` to the last.

    Args:
        state: the run state to resume; the result is bit-identical to an uninterrupted run (same
            processor type, threads, torch).
        teacher: required by some objectives; see `teachers.find_or_train`. A bare module is run in
            every step. Several teachers are a list, in the order of `config.teacher_runs()`.
        more_metrics: metrics to compute on validation besides the usual ones, such as `val_auroc`;
            see `scores.SCORES`.
        say: called with a sentence if the loss explodes but stays finite. None: standard error.
    """
    check_kind(config, TrainConfig, "config")
    if config.loop is not None:
        yield from _own_epochs(config, config.loop.ready(), state, teacher, say)
        return
    others = asked_beside(more_metrics)
    # 1. Where it runs
    workers, rank = _workers_and_rank()
    with _set_up(config) as device:
        # 2. Data, resident on the device
        train_set, val_set = config.data.load()
        train_set, val_set = train_set.on(device), val_set and val_set.on(device)
        scale = _mean_and_std(config, device)
        seen = functools.partial(_seen, train_set, config, scale)
        count, classes, optim = len(train_set), config.data.num_classes, config.optim

        # 3. Student, objective, teacher, optimizer
        objective = config.ready_objective()
        student, unused = _new_student(config, teacher, count, device, state is None, say)
        lessons = _Lessons(config, teacher, count, device, objective, say)
        beside = _Beside(config, scale, lessons) if config.data.unlabelled else None
        tapped = tapped_student(student, objective, lessons.autocast)
        trained = student if tapped is None else tapped.to(device)
        rates = factors_by_depth(trained, student, config.lr_decay)
        optimizer = new_optimizer(trained, optim, rates)
        average = _average_of(student, config)
        kept = _kept_by_state(student, optimizer, tapped, average)

        # 4. Resume
        run = config.fingerprint(LOOP_VERSION)
        history = [] if state is None else _resumed(state, config, kept)
        learner = compiled(trained, config, count) if config.compile == "on" else trained
        model = learner
        if workers > 1:
            own = isinstance(config.student, OwnNetwork)
            model = _data_parallel(learner, shared_buffers=own, unused=unused)
        forward = _telling_of_compilers(model, config) if config.compile == "on" else model
        learn = functools.partial(_learn, forward, config, objective, lessons)

        def snapshot() -> State:
            parts = {name: part.state_dict() for name, part in kept.items()}
            done = {"run": run, "epoch": len(history), "history": list(history)}
            return _copy_to_cpu(parts) | done

        # 5. Epochs
        external, told = _runs_external_code(config), False
        left = range(len(history), config.epochs)
        drawn = _drawn_ahead(functools.partial(_draw_epoch, config, train_set), left, device)
        for epoch in left:
            if history and config.is_last(history[-1]):
                return
            start, watch = time.perf_counter(), Stopwatch(device)
            order, view = next(drawn)
            batches = split_batches(order.to(device), optim.batch_size, workers)
            shares = [batch.tensor_split(workers)[rank] for batch in batches]
            labels_of = view.labels_of(train_set.labels)
            lessons.begin_epoch(epoch, functools.partial(seen, view))
            more = (
                _none_beside(batches) if beside is None else beside.of_epoch(epoch, batches, shares)
            )
            # sums of loss, CE, KD and that of unlabelled images, each weighted by the labelled ones;
            # gradients of the first batch
            sums, norms = torch.zeros(4, dtype=torch.float64, device=device), list[_Norms]()

            # 6. Steps
            with _seeding(external, device) as seed_step:
                set_training(model, student, config.freeze)
                parts = zip(batches, shares, seen(view, shares), more, strict=True)
                for step, (batch, mine, images, extra) in enumerate(parts):
                    progress = epoch + (step + 0.5) / len(batches)
                    lr = optimizer.set_rate(config.schedule.factor(progress, config.epochs))
                    optimizer.zero_grad()
                    pieces = _pieces(mine, images, config)
                    every = zip(pieces, extra, strict=False)
                    for piece, ((some, shown), added) in enumerate(every):
                        seed_step(_of_dropout(config.seed, epoch, step, rank, piece))
                        with _synchronised(model, last=piece == len(pieces) - 1):
                            soft, taught = lessons.of_batch(some, shown)
                            logits, terms, other = learn(
                                shown, labels_of(some), soft, taught, added
                            )
                            loss = objective.combine(terms, other)
                            if step == 0:
                                norms.append(gradient_norms(objective, terms, logits))
                            # DDP takes the mean over workers: weigh each by its images
                            (loss * (len(some) * workers / len(batch))).backward()
                        sums += _losses(loss, terms, other) * len(some)
                    optimizer.step()
                    if average is not None:
                        average.update(epoch * len(batches) + step + 1)
                watch.stop()

                # 7. Validation: each worker takes its share, without padding
                val_sums, guesses = _validate(student, val_set, lessons, config, keep=bool(others))
                average_sums = _average_sums(average, val_set, lessons, config)
            if workers > 1:
                for part in filter(len, (sums, val_sums, average_sums)):
                    dist.all_reduce(part)
            # the one wait of an epoch for the device
            sums, val_sums, average_sums, norms = _on_host(sums, val_sums, average_sums, norms)

            # 8. Metrics
            metrics = {"epoch": float(epoch + 1)}
            metrics |= _loss_metrics(config, objective, terms, sums / count, norms)
            metrics |= {} if val_set is None else metrics_from(val_sums)
            metrics |= {} if not len(average_sums) else _average_metrics(average_sums)
            metrics |= {"lr": lr, "parameters": float(sum(p.numel() for p in student.parameters()))}
            _check_finite(metrics, soft, objective)
            if val_set is not None and others:
                metrics |= metrics_at_once(
                    others, guesses, val_set.labels, classes, rank=rank, workers=workers
                )
            if not told and rank == 0 and (sentence := exploded(metrics, classes)):
                told = True
                (say or _to_standard_error)(sentence)
            metrics["seconds"] = time.perf_counter() - start
            metrics["images_per_s"] = count / watch.seconds()
            history.append(metrics)
            yield Epoch(metrics, snapshot)


def _own_epochs(
    config: TrainConfig,
    loop: OwnLoop,
    state: State | None,
    teacher: Teachers,
    say: Callable[[str], None] | None,
) -> Generator[Epoch, None, None]:
    """Yield the epochs of a user's own loop, as `train` yields its own.

    A run state holds what the loop's own state does: its `model`, and the rest as `loop`.
    """
    run = config.fingerprint(LOOP_VERSION)
    history: list[dict[str, float]] = []
    given: State | None = None
    if state is not None:
        _check_run(state, config)
        history = list(state["history"])
        given = {**state["loop"], "model": state["model"], "epoch": len(history)}
    if history and config.is_last(history[-1]):
        return
    taught = config.objective.needs_teacher
    if taught and teacher is None:
        raise ValueError(_teacher_is_missing(config))
    told = parameters = 0
    with _set_up(config) as device:
        network = None
        if taught:
            network = _network_of(_only(teacher, config)).to(device).eval().requires_grad_(False)
        count = len(config.data.load()[0])
        epochs = loop.epochs(config, given, network, len(history))
        try:
            start = time.perf_counter()
            for metrics, content in epochs:
                seconds = time.perf_counter() - start
                if not parameters:
                    parameters = _parameters_of(config, content()["model"])
                if getattr(config, "stop_accuracy", None) and "val_accuracy" not in metrics:
                    raise ConfigError(
                        f"teacher.stop_accuracy: needs val_accuracy, which {loop.path} does not yield"
                    )
                found = {"parameters": float(parameters), "seconds": seconds}
                history.append({**metrics, **found, "images_per_s": count / seconds})

                def snapshot(content: Callable[[], State] = content) -> State:
                    kept = _copy_to_cpu(dict(content()))
                    model = kept.pop("model")
                    done = {"run": run, "epoch": len(history), "history": list(history)}
                    return {"model": model, "loop": kept} | done

                sentence = exploded(metrics, config.data.num_classes)
                if sentence and not told:
                    told = 1
                    (say or _to_standard_error)(sentence)
                yield Epoch(history[-1], snapshot)
                if config.is_last(history[-1]):
                    return
                start = time.perf_counter()
        finally:
            epochs.close()


def _parameters_of(config: TrainConfig, weights: Mapping[str, Tensor]) -> int:
    """Return the number of the student's parameters; raise if these are not its weights."""
    student = config.build_student()
    try:
        student.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"loop.path: {config.loop and config.loop.path} yields a state whose 'model' does not fit the student "
            f"{config.student.called}: {problem}; train config.build_student(), and give its state_dict()"
        ) from None
    return sum(p.numel() for p in student.parameters())


def _teacher_is_missing(config: TrainConfig) -> str:
    return (
        f"objective {config.objective.called}: needs a teacher; pass teachers.find_or_train(config)"
    )


def _only(teacher: Teachers, config: TrainConfig) -> Teacher:
    """Return the single teacher of a run."""
    given = each_of(teacher)
    if len(given) != 1:
        raise ValueError(
            f"objective {config.objective.called}: needs one teacher, got {len(given)}"
        )
    return given[0]


class _Lessons:
    """What a student in training gets of its teachers; None if the objective needs no teacher.

    The logits of several teachers are `combined` to those of one.

    Args:
        teacher: those of `config.teacher_runs()`; see `_Lesson`.
        count: number of train images.
        objective: a `ready` one.
        say: called with a sentence if layers do not fit in the bank. None: standard error.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: Teachers,
        count: int,
        device: torch.device,
        objective: Canonical,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.device = device
        bf16 = config.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        """The precision in which student and teachers run."""
        self._of_val: Tensor | None = None
        self._parts: list[_Lesson] = []
        if not config.objective.needs_teacher:
            return
        runs, given = config.teacher_runs(), each_of(teacher)
        if len(given) != len(runs):
            raise ValueError(
                f"teacher: {len(runs)} are needed, and {len(given)} given; pass teachers.find_or_train(config)"
            )
        for run, labels, one in zip(runs, config.label_kinds, given, strict=True):
            kind = run.student.memory_format, labels
            self._parts.append(
                _Lesson(config, *kind, one, count, device, objective, self.autocast, say)
            )
        self._shares, self._temperature = config.shares, 1.0
        if len(self._parts) > 1:
            self._temperature = objective.teacher_temperature

    def begin_epoch(self, epoch: int, seen: _Seen) -> None:
        """Get the logits of all train images, as the epoch's view, from the banks.

        Args:
            seen: yields the images of each batch of indices, augmented.
        """
        for part in self._parts:
            part.begin_epoch(epoch, seen)

    def of_batch(self, mine: Tensor, images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the logits [B, K] of train images with the indices `mine`, and their layers."""
        found = [part.of_batch(mine, images) for part in self._parts]
        if len(found) < 2:
            return found[0] if found else (None, {})
        return self._combined([logits for logits, _ in found]), {}

    @property
    def banked(self) -> bool:
        """Return whether the logits of some teacher come from its bank."""
        return any(part.banked for part in self._parts)

    def begin_unlabelled(self, views: Sequence[_BankedView], chosen: Tensor) -> None:
        """Get the logits of an epoch's unlabelled images from the banks.

        Args:
            views: those that hold them.
            chosen: int64 [n], their places in all of the views together.
        """
        for part in self._parts:
            part.begin_unlabelled(views, chosen)

    def of_unlabelled(self, mine: Tensor, images: Tensor) -> Tensor:
        """Return the logits [U, K] of unlabelled images with the indices `mine` in the epoch."""
        found = [part.of_unlabelled(mine, images) for part in self._parts]
        return found[0] if len(found) == 1 else self._combined(found)

    def of_validation(self, images: Images, rank: int, workers: int) -> Tensor | None:
        """Return the logits of a worker's validation images; they are the same in every epoch."""
        if self._of_val is None and self._parts:
            found = [part.of_validation(images, rank, workers) for part in self._parts]
            self._of_val = found[0].to(self.device)
            if len(found) > 1:
                self._of_val = self._combined([z.to(self.device).float() for z in found])
        return self._of_val

    def _combined(self, logits: list[Tensor]) -> Tensor:
        return combined(logits, self._shares, self._temperature)


TOP_SAMPLE = 512
"""Train images by which a bank of the largest logits is judged."""


class _Lesson:
    """One teacher's logits for a student in training: from its bank, or from the teacher itself.

    With them come the outputs of the layers that the objective asks for.

    Args:
        layout: memory format of the teacher's network.
        labels: how the configuration wants the logits kept: bank, top50 or online.
        teacher: a bank that is too large, or that the configuration does not want, is not used.
        count: number of train images.
        objective: a `ready` one.
        autocast: the precision in which it runs.
        say: called with a sentence if the layers do not fit in the bank. None: standard error.
    """

    def __init__(
        self,
        config: TrainConfig,
        layout: torch.memory_format,
        labels: str,
        teacher: Teacher,
        count: int,
        device: torch.device,
        objective: Canonical,
        autocast: torch.autocast,
        say: Callable[[str], None] | None,
    ) -> None:
        self._config, self._count, self.device = config, count, device
        self._layers, self._called = objective.teacher_layers, objective.called
        self._layout, self.autocast, self._say = layout, autocast, say
        self._top, self._temperature = labels == "top50", objective.teacher_temperature
        self._top_checked = False
        self._bank: Bank | None = None
        self._online: nn.Module | None = None
        self._of_train: Tensor | None = None
        self._of_unlabelled: Tensor | None = None
        self._unlabelled_views: Tensor | None = None
        self._unlabelled_keys: list[dict[str, Any]] = []
        self._rows: Tensor | None = None
        self._rows_of: dict[str, Any] = {}
        wanted = isinstance(teacher, Bank) and labels != "online"
        small, numbers = self._fits(count), numbers_of(self._layers)
        if wanted and small and fits(count, numbers):
            assert isinstance(teacher, Bank), f"{teacher=}"
            self._bank = teacher
            return
        self._online = self._placed(_network_of(teacher))
        if wanted and not small:
            _tell_once(
                f"the teacher's logits, {count:,} images x {config.data.num_classes:,} classes, are too large for the "
                "bank of soft labels: the teacher runs in every step; teacher.labels: top50 keeps fewer",
                say,
            )
        elif wanted:
            _tell_once(
                f"the outputs of the teacher's {' and '.join(self._layers)}, {numbers:,} numbers an image, are too "
                "large for the bank of soft labels: the teacher runs in every step",
                say,
            )

    def begin_epoch(self, epoch: int, seen: _Seen) -> None:
        """Get the logits of all train images, as the epoch's view, from the bank.

        Args:
            seen: yields the images of each batch of indices, augmented.
        """
        if self._bank is None:
            return

        def ask_layers(network: nn.Module, index: Tensor) -> Tensor:
            rows = []
            with caught(network, self._layers) as found:
                for logits in self._passes(seen, network, index):
                    rows.append(in_rows(self._outputs(found, len(logits))))
            return torch.cat(rows)

        key = self._config.augment.key(self._config.seed, epoch)
        if self._top and not self._top_checked:
            self._check_top(key, seen)
        self._of_train = self._banked_labels(key, self._count, seen).to(self.device)
        self._rest()
        self._read_ahead(key, epoch + 1)
        if self._layers and key != self._rows_of:
            numbers = numbers_of(self._layers)
            rows = self._bank.features(key, self._count, list(self._layers), numbers, ask_layers)
            self._rows, self._rows_of = rows.to(self.device), key
            self._rest()

    def _read_ahead(self, key: dict[str, Any], following: int) -> None:
        """Read the logits of the next epoch's view while a GPU trains, if a file has them."""
        config = self._config
        if self.device.type == "cpu" or following >= config.epochs:
            return
        soon = config.augment.key(config.seed, following)
        if soon != key and self._bank is not None:
            self._bank.read_ahead(soon, self._count, config.data.num_classes, top=self._top)

    def _fits(self, count: int) -> bool:
        """Return whether the logits of as many images fit in the bank."""
        return fits(count, COLUMNS if self._top else self._config.data.num_classes)

    def _banked_labels(self, key: dict[str, Any], count: int, seen: _Seen) -> Tensor:
        """Return a view's logits as the bank keeps them: whole rows [N, K], or `packed` ones."""
        assert self._bank is not None, f"{key=}"
        kept = self._bank.top_logits if self._top else self._bank.logits
        return kept(key, count, self._config.data.num_classes, self._asking(seen))

    def _check_top(self, key: dict[str, Any], seen: _Seen) -> None:
        """Raise if the largest logits of some train images lose too much of their soft part."""
        self._top_checked = True
        assert self._bank is not None, f"{key=}"
        some = torch.arange(self._count)[:: max(1, self._count // TOP_SAMPLE)][:TOP_SAMPLE]
        ask = self._asking(seen)
        logits = self._bank.logits(
            {**key, "sample": len(some)},
            len(some),
            self._config.data.num_classes,
            lambda network, index: ask(network, some[index]),
        ).float()
        lost = share_lost(logits, self._temperature)
        others = ", ".join(f"{share_lost(logits, T):.2g} at {T}" for T in (1, 4, 20))
        text = (
            f"teacher.labels: top50 loses {lost:.2g} of the soft part at temperature {self._temperature:g} (shares, of "
            f"{len(some)} train images; {others})"
        )
        if lost > MOST_LOST:
            raise ConfigError(
                f"{text}: more than {MOST_LOST:g}; use bank or online, or a lower objective.temperature"
            )
        _tell_once(text, self._say)

    def _asking(self, seen: _Seen) -> Callable[[nn.Module, Tensor], Tensor]:
        """Return the function that gives a network's logits of the images at some indices."""

        def ask(network: nn.Module, index: Tensor) -> Tensor:
            return torch.cat(list(self._passes(seen, network, index)))

        return ask

    def _passes(self, seen: _Seen, network: nn.Module, index: Tensor) -> Iterator[Tensor]:
        """Yield the logits of each batch of the images at some indices."""
        network = self._placed(network)
        with torch.no_grad(), self.autocast:
            batches = list(index.to(self.device).split(self._config.optim.batch_size))
            for images in seen(batches):
                yield network(images).float()

    def _rest(self) -> None:
        """Give back the memory of a teacher that has filled the bank, and is not run in steps."""
        if self._bank is not None and self._online is None:
            self._bank.rest()

    @property
    def banked(self) -> bool:
        """Return whether the logits come from the bank."""
        return self._bank is not None

    def begin_unlabelled(self, views: Sequence[_BankedView], chosen: Tensor) -> None:
        """Get the logits of an epoch's unlabelled images from the bank; see `_Lessons`."""
        if self._bank is None:
            return
        if not all(self._fits(len(part.chosen)) for part, _ in views):
            self._online = self._online or self._placed(self._bank.network())
            return
        keys = [part.key for part, _ in views]
        if keys != self._unlabelled_keys:
            found = []
            for part, seen in views:
                found.append(self._banked_labels(part.key, len(part.chosen), seen))
            self._unlabelled_views = torch.cat(found).to(self.device)
            self._unlabelled_keys = keys
        assert self._unlabelled_views is not None, f"{keys=}"
        self._of_unlabelled = self._unlabelled_views[chosen]

    def of_unlabelled(self, mine: Tensor, images: Tensor) -> Tensor:
        """Return the logits [U, K] of unlabelled images with the indices `mine` in the epoch."""
        if self._of_unlabelled is not None:
            return self._whole(self._of_unlabelled[mine])
        assert self._online is not None, f"{self._bank=}"
        with torch.no_grad(), self.autocast:
            logits: Tensor = self._online(images).float()
        return logits

    def of_batch(self, mine: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits [B, K] of train images with the indices `mine`, and their layers."""
        if self._of_train is not None:
            layers = {} if self._rows is None else from_rows(self._rows[mine], self._layers)
            return self._whole(self._of_train[mine]), layers
        assert self._online is not None, f"{self._bank=}"
        with torch.no_grad(), self.autocast, caught(self._online, self._layers) as found:
            logits: Tensor = self._online(images).float()
        return logits, self._outputs(found, len(images))

    def _whole(self, rows: Tensor) -> Tensor:
        """Return the logits, float32 [B, K], of rows of the bank."""
        if not self._top:
            return rows.float()
        return unpacked(rows, self._config.data.num_classes, self._temperature)

    def of_validation(self, images: Images, rank: int, workers: int) -> Tensor:
        """Return the logits of a worker's validation images; they are the same in every epoch."""

        def ask(network: nn.Module, index: Tensor) -> Tensor:
            asked, bf16 = images.part(index), self._config.precision == "bf16"
            found = predictions(self._placed(network), asked, self._config.data, bf16=bf16)
            return torch.cat([logits for logits, _ in found])

        if self._bank is not None:
            view, classes = {"split": "val"}, self._config.data.num_classes
            found = self._bank.logits(view, len(images), classes, ask)
            self._rest()
            return found[rank::workers]
        assert self._online is not None, f"{self._bank=}"
        return ask(self._online, torch.arange(len(images))[rank::workers])

    def _outputs(self, found: Caught, count: int) -> dict[str, Tensor]:
        """Return the outputs of the teacher's layers for a batch of `count` images."""
        return outputs_of(found, self._layers, count, f"objective {self._called}: teacher")

    def _placed(self, network: nn.Module) -> nn.Module:
        """Return the teacher on this device, ready for inference."""
        network = network.to(self.device).to(memory_format=self._layout)
        return network.eval().requires_grad_(False)


class _Added(NamedTuple):
    """The unlabelled images in a piece of a worker's share of a batch."""

    places: Tensor
    """int64 [U]: where they are among those of the epoch."""
    images: Tensor
    """[U, C, H, W]."""
    share: float
    """Weight of their mean, so that the step has the mean over all its unlabelled images although
    the loss of a piece is weighted by its labelled ones; 1 for a whole batch."""


class _Beside:
    """The unlabelled images that each step takes beside the labelled ones.

    Args:
        scale: see `_mean_and_std`.
    """

    def __init__(self, config: TrainConfig, scale: list[Tensor], lessons: _Lessons) -> None:
        self._config, self._scale, self._lessons = config, scale, lessons
        data, device = config.data, lessons.device
        images = data.load_unlabelled().on(device)
        known_as = load_unlabelled(data).digest or REST
        self._stream = UnlabelledStream(
            images, known_as, config.augment, config.seed, data.shape[1:]
        )

    def of_epoch(
        self, epoch: int, batches: list[Tensor], shares: list[Tensor]
    ) -> Iterator[list[_Added | None]]:
        """Begin an epoch; return an iterator over its steps: the images of each piece of a share.

        Args:
            batches: indices of the labelled images of each step.
            shares: those of this worker.
        """
        workers, rank = _workers_and_rank()
        counts = [
            number_beside(len(batch), self._config.data.unlabelled_ratio) for batch in batches
        ]
        total, device = sum(counts), self._lessons.device
        start = epoch * total
        part = self._stream.part(start, total)
        if self._lessons.banked:
            self._ask_banks(start, part.chosen, sum(map(len, batches)))
        steps = torch.arange(total, device=device).split(counts)
        of_worker = [step.tensor_split(workers)[rank] for step in steps]
        images = self._seen(part)([index for index in of_worker if len(index)])
        return self._steps(images, of_worker, counts, batches, shares)

    def _ask_banks(self, start: int, chosen: Tensor, size: int) -> None:
        """Get the logits of an epoch's images from the banks.

        Without random augmentation one view of all images serves all epochs. Else a view holds
        `size` places of the sequence, whatever the ratio, so that trials of all ratios share it; so
        it does if a run does not come to all images.

        Args:
            start: place in the sequence of the first image.
            chosen: int64 [n], indices of the images.
            size: number of labelled images of an epoch.
        """
        stream, epochs, count = self._stream, self._config.epochs, len(chosen)
        if self._config.augment.is_fixed and len(stream.images) <= count * epochs:
            views, places = [stream.whole], chosen
        else:
            first, last = start // size, (start + count - 1) // size
            views = [stream.part(k * size, size) for k in range(first, last + 1)]
            places = torch.arange(count) + start - first * size
        banked = [(view, self._seen(view)) for view in views]
        self._lessons.begin_unlabelled(banked, places.to(self._lessons.device))

    def _seen(self, part: UnlabelledPart) -> _Seen:
        return functools.partial(_seen, part.images, self._config, self._scale, part.view)

    def _steps(
        self,
        images: Iterator[Tensor],
        of_worker: list[Tensor],
        counts: list[int],
        batches: list[Tensor],
        shares: list[Tensor],
    ) -> Iterator[list[_Added | None]]:
        for index, count, batch, mine in zip(of_worker, counts, batches, shares, strict=True):
            if not len(index):
                yield [None] * len(mine)
                continue
            number = self._config.optim.pieces(len(mine), self._config.workers)
            parts = (given.tensor_split(number) for given in (mine, index, next(images)))
            pieces: list[_Added | None] = []
            for labelled, some, shown in zip(*parts, strict=True):
                share = len(some) * len(batch) / (count * len(labelled))
                pieces.append(_Added(some, shown, share) if len(some) else None)
            yield pieces


def _none_beside(batches: list[Tensor]) -> Iterator[Iterator[None]]:
    """Yield for each step of an epoch that it has no unlabelled images."""
    return itertools.repeat(itertools.repeat(None), len(batches))


_told_once: set[str] = set()
"""Sentences that this process has said."""


def _tell_once(text: str, say: Callable[[str], None] | None) -> None:
    if text not in _told_once and _workers_and_rank()[1] == 0:
        _told_once.add(text)
        (say or _to_standard_error)(text)


def _network_of(teacher: Teacher) -> nn.Module:
    return teacher.network() if isinstance(teacher, Bank) else teacher


def _workers_and_rank() -> tuple[int, int]:
    """Return the number of workers of this run, and which of them this process is."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def device_of(config: TrainConfig) -> torch.device:
    """Return the device of this worker; raise a RuntimeError if it has none that torch can use."""
    if not config.gpus_per_worker:
        return torch.device("cpu")
    seen = torch.cuda.is_available()
    trouble = architecture_trouble() if seen else f"torch sees no GPU here: {why_no_gpu()}"
    if trouble is not None:
        raise RuntimeError(f"gpus_per_worker is {config.gpus_per_worker:g}, and {trouble}")
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _set_up(config: TrainConfig) -> Iterator[torch.device]:
    """Yield the device of this worker; torch's threads and TF32 are set for the run meanwhile."""
    device = device_of(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.cpus_per_worker)
    try:
        with tf32(device, config.precision == "bf16"):
            yield device
    finally:
        torch.set_num_threads(threads)
        if 0 < config.gpus_per_worker < 1:  # others on this GPU may need what torch keeps
            torch.cuda.empty_cache()


def _runs_external_code(config: TrainConfig) -> bool:
    """Return whether the student or its teacher is a network of your own or of timm."""
    made = config.teacher_runs() if config.objective.needs_teacher else ()
    networks = [config.student, *(run.student for run in made)]
    return any(isinstance(network, OwnNetwork | Timm) for network in networks)


@contextlib.contextmanager
def _seeding(external: bool, device: torch.device) -> Iterator[Callable[[int], Any]]:
    """Yield the function that seeds a step: torch's generators of the CPU and of a run's device.

    External code may draw from any generator: for it, those of numpy and Python are seeded, too,
    and put back afterwards.
    """
    if not external:
        yield functools.partial(_seed_generators, device)
        return
    put_back = random_states()
    try:
        yield seed_all
    finally:
        put_back()


def _seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators that a step draws from.

    `torch.manual_seed` gives the same numbers, but formats a stack for each kind of device that is
    not there: up to 0.6 ms a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _mean_and_std(config: TrainConfig, device: torch.device) -> list[Tensor]:
    """Return the mean and deviation of the channels, [1, C, 1, 1] each."""
    return [torch.tensor(x, device=device).view(1, -1, 1, 1) for x in config.data.statistics()]


def _seen(
    train_set: Images,
    config: TrainConfig,
    scale: list[Tensor],
    seen_so: EpochView,
    shares: list[Tensor],
) -> Iterator[Tensor]:
    """Yield the images [B, C, H, W] of each share of the train set, as an epoch's view.

    With mixup or cutmix the partners are read with them, wherever in the split they are.
    """
    device, (view, mix) = scale[0].device, seen_so
    groups = [[mine] for mine in shares]
    if isinstance(train_set, ImageSet):
        groups = _batches_together(
            shares, TOGETHER[device.type] // math.prod(config.data.shape[1:])
        )
    wholes = [torch.cat(group) if len(group) > 1 else group[0] for group in groups]
    read = wholes
    if mix is not None:
        mix = mix.on(device)
        read = [torch.cat([whole, mix.partner[whole]]) for whole in wholes]
    if ahead := _augments_ahead(train_set, config, shares, device):
        train_set = _augmented(train_set, config.augment, view, max(map(len, read)))
    found = train_set.read(read, view.crop), seen_so.of_each(read, device)
    for group, whole, images, drawn in zip(groups, wholes, *found, strict=True):
        if not ahead:
            images = config.augment(images.to(device, non_blocking=True), drawn)
        mixed = None if mix is None else mix.of(whole)
        normal = config.augment.normalised(images, drawn, scale, mixed)
        yield from normal.split([len(mine) for mine in group])


AUGMENTED_AHEAD = 2**28
"""Bytes of an epoch's images that are augmented ahead of its steps; those of CIFAR take 0.6 of it."""


def _augments_ahead(
    train_set: Images, config: TrainConfig, shares: list[Tensor], device: torch.device
) -> TypeGuard[ImageSet]:
    """Return whether all images are augmented before the first step, once for both of their uses.

    A mixed image is seen twice in an epoch, as itself and as a partner. On a GPU that costs little.
    """
    if device.type != "cpu" or not isinstance(train_set, ImageSet):
        return False
    every = sum(map(len, shares)) == len(train_set)
    size = len(train_set) * math.prod(config.data.shape)
    return config.augment.mixes and config.augment.varies and every and size <= AUGMENTED_AHEAD


def _augmented(train_set: ImageSet, augment: Augment, view: View, most: int) -> ImageSet:
    """Return the images as an epoch sees them, not yet normalised; at most `most` at a time."""
    stored = train_set.stored.new_empty(len(train_set), *train_set.stored.shape[1:])
    parts = torch.arange(len(train_set)).split(most)
    for part, images, into in zip(parts, train_set.read(parts), stored.split(most), strict=True):
        into.copy_(augment(images, view.of(part)))
    return dataclasses.replace(train_set, stored=stored, rows=None)


TOGETHER = {"cpu": 0, "cuda": 2**22}
"""Pixels of images in memory that are augmented at once, such as 4,096 images of 32x32: on a GPU the
launches are what takes time, and on a CPU fewer images stay in its cache."""


def _batches_together(shares: list[Tensor], most: int) -> list[list[Tensor]]:
    """Return batches of indices in groups of at most `most` images, or of one batch."""
    groups: list[list[Tensor]] = []
    room = 0
    for mine in shares:
        if not groups or len(mine) > room:
            groups.append([])
            room = most
        groups[-1].append(mine)
        room -= len(mine)
    return groups


_Drawn = tuple[Tensor, EpochView]
"""The order of an epoch's images, and how it sees them."""


def _drawn_ahead(
    draw: Callable[[int], _Drawn], epochs: range, device: torch.device
) -> Iterator[_Drawn]:
    """Yield what is drawn for each epoch; on a GPU, the next one is drawn while an epoch trains."""
    if device.type == "cpu":
        yield from map(draw, epochs)
        return
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(draw, epochs.start) if epochs else None
        for epoch in epochs:
            assert following is not None, f"{epochs=}"
            drawn = following.result()
            following = thread.submit(draw, epoch + 1) if epoch + 1 in epochs else None
            yield drawn


def _new_student(
    config: TrainConfig,
    teacher: Teachers,
    count: int,
    device: torch.device,
    new: bool,
    say: Say | None,
) -> tuple[nn.Module, bool]:
    """Return the untrained student, and whether a parameter may lack its gradient in a step.

    Args:
        new: False for a run that is resumed, whose state has the weights.
        say: called with a sentence if its head is new. None: standard error.
    """
    workers, _ = _workers_and_rank()
    called = config.student.called
    student = config.build_student()
    for note in config.begin(student, load=new):
        _tell_once(note, say)
    check_learns(called, student)
    batches = split_batches(torch.arange(count), config.optim.batch_size, workers)
    alone = min(map(len, batches)) < 2 * workers or config.optim.smallest_piece(workers) < 2
    if alone and config.batch_norm != "sync":
        check_lone_image(called, student, config.data.shape)
    student = student.to(device).to(memory_format=config.student.memory_format)
    unused = workers > 1 and _unused(student, config)
    if config.batch_norm == "sync" and workers > 1:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if config.needs_teacher and teacher is None:
        raise ValueError(_teacher_is_missing(config))
    if config.init == "trained":
        student.load_state_dict(_network_of(_only(teacher, config)).state_dict())
    return student, unused


def _average_of(student: nn.Module, config: TrainConfig) -> Average | None:
    """Return the average of the student's weights as they are now; None without `ema`."""
    if config.ema is None:
        return None
    network = config.build_student().to(next(student.parameters()).device)
    return Average(config.ema, network.to(memory_format=config.student.memory_format), student)


def _kept_by_state(
    student: nn.Module, optimizer: Updates, tapped: Tapped | None, average: Average | None
) -> dict[str, Any]:
    """Return what a run state holds the state of, by its names there: `model` is the student to keep."""
    kept: dict[str, Any] = {"model": student, "optimizer": optimizer}
    if average is not None:
        kept |= {"model": average, "trained": student}
    if tapped is not None:
        kept["objective"] = tapped.owned
    return kept


def _of_dropout(seed: int, epoch: int, step: int, rank: int, piece: int) -> int:
    """Return the address of the random numbers of a piece of a worker's share of a batch."""
    of_piece = (piece,) if piece else ()
    return address(seed, "step", epoch, step, rank, *of_piece)


def _pieces(mine: Tensor, images: Tensor, config: TrainConfig) -> list[tuple[Tensor, Tensor]]:
    """Return a worker's share of a batch, the indices and the images, in pieces; see `accumulate`."""
    count = config.optim.pieces(len(mine), config.workers)
    if count == 1:
        return [(mine, images)]
    return list(zip(mine.tensor_split(count), images.tensor_split(count), strict=True))


def _synchronised(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Add the gradients of several workers in the last piece of a step alone."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def _resumed(state: State, config: TrainConfig, kept: Mapping[str, Any]) -> list[dict[str, float]]:
    """Load what a run state holds; return the metrics of its epochs."""
    _check_run(state, config)
    for name, part in kept.items():
        part.load_state_dict(state[name])
    return list(state["history"])


def _learn(
    forward: Callable[..., Any],
    config: TrainConfig,
    objective: Canonical,
    lessons: _Lessons,
    images: Tensor,
    labels: Tensor | Mixed,
    soft: Tensor | None,
    taught: Mapping[str, Tensor],
    added: "_Added | None",
) -> tuple[Tensor, Terms, Tensor | None]:
    """Return a batch's logits, float32 [B, K], the terms of its loss, and KD of unlabelled images.

    Labelled and unlabelled images run in one forward pass: BatchNorm has the statistics of both.
    """
    if objective.asks_for_layers:  # `Tapped` computes both
        logits, *both = forward(images, labels, soft, taught)
        _check_learnable(logits, config)
        return logits, Terms(*both), None
    with lessons.autocast:
        logits = forward(images if added is None else torch.cat([images, added.images]))
    logits = logits.float()
    _check_learnable(logits, config)
    if added is None:
        return logits, objective.terms(logits, labels, soft), None
    logits, unlabelled = logits.split([len(images), len(added.images)])
    theirs = lessons.of_unlabelled(added.places, added.images)
    kd = added.share * objective.soft_part(unlabelled, theirs)
    return logits, objective.terms(logits, labels, soft), kd


def _check_learnable(logits: Tensor, config: TrainConfig) -> None:
    if not logits.requires_grad:
        raise ConfigError(
            f"model {config.student.called}: its logits do not depend on any trainable parameter; look for a no_grad "
            "or a detach in its forward"
        )


def _validate(
    student: nn.Module,
    val_set: Images | None,
    lessons: _Lessons,
    config: TrainConfig,
    *,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the sums of `metric_sums` over this worker's share, and its logits if `keep`."""
    workers, rank = _workers_and_rank()
    if workers > 1:
        for buffer in student.buffers():  # all workers use the same batch statistics
            dist.broadcast(buffer, src=0)
    sums = torch.zeros(1, device=lessons.device)
    kept: list[Tensor] = []
    if val_set is None:
        return sums, kept
    soft, at = lessons.of_validation(val_set, rank, workers), 0
    bf16 = config.precision == "bf16"
    judged = predictions(student, val_set, config.data, rank=rank, workers=workers, bf16=bf16)
    for guess, labels in judged:
        theirs = None if soft is None else soft[at : at + len(guess)]
        at += len(guess)
        sums = sums + metric_sums(guess, labels, theirs)
        if keep:
            kept.append(guess)
    return sums, kept


def _average_sums(
    average: Average | None, val_set: Images | None, lessons: _Lessons, config: TrainConfig
) -> Tensor:
    """Return the sums of `metric_sums` of the averaged weights over this worker's share; [0] if off."""
    if average is None or val_set is None:
        return torch.zeros(0, dtype=torch.float64, device=lessons.device)
    return _validate(average.network, val_set, lessons, config, keep=False)[0]


def _average_metrics(sums: Tensor) -> dict[str, float]:
    """Return the metrics of the averaged weights on validation, from their sums."""
    found = metrics_from(sums)
    return {f"val_ema_{name}": found[f"val_{name}"] for name in ("accuracy", "nll", "ece")}


def _on_host(
    sums: Tensor, val_sums: Tensor, average_sums: Tensor, norms: list[_Norms]
) -> tuple[Tensor, Tensor, Tensor, list[_Norms]]:
    """Return copies of an epoch's sums, float64, and norms, float32, on the CPU, by one transfer."""
    of_pieces = [found for found in norms if found is not None]
    values = [sums, val_sums, average_sums, *(both for _, both in of_pieces)]
    together = torch.cat([value.double() for value in values]).cpu()
    loss, val, average, *both = together.split([len(value) for value in values])
    counts = (count for count, _ in of_pieces)
    return loss, val, average, [*zip(counts, (x.float() for x in both), strict=True)]


def _check_finite(metrics: dict[str, float], soft: Tensor | None, objective: Canonical) -> None:
    """Raise Diverged if a loss is infinite or NaN; `soft`: the teacher's logits of a batch."""
    for name in ("train_loss", "val_nll"):
        if not abs(metrics.get(name, 0.0)) < float("inf"):
            advice = "a smaller optim.lr may help"
            if soft is not None and not soft.isfinite().all():
                advice = "the teacher's logits are not finite numbers; look at its weights and its images"
            elif isinstance(objective, OwnObjective):
                advice += f", or {objective.path} has a log(0), 0/0 or overflow"
            raise Diverged(f"{name} is {metrics[name]} at epoch {metrics['epoch']:.0f}; {advice}")


def train_in(
    directory: Path,
    config: TrainConfig,
    *,
    teacher: Teachers = None,
    more_metrics: Sequence[str] = (),
    about: dict[str, str] | None = None,
    say: Callable[[str], None] | None = None,
    on_saved: Callable[[bool], None] | None = None,
) -> Generator[dict[str, float], None, None]:
    """Train in a directory; yield the metrics of every epoch, those of earlier sessions first.

    It writes a checkpoint of the run state every `checkpoint_every_s`, while training continues,
    and when the generator is closed early. Before it yields the last epoch, it writes the final
    state and the weights (`student.safetensors`, with `about` in the header). Only the first worker
    writes.

    If the disk is too full for an intermediate checkpoint, training continues and retries at the
    next interval; for the final one, it raises an OSError. Non-fatal trouble (full disk, damaged
    checkpoint, unwritable soft labels, exploding loss) is reported through `say`. `on_saved` is
    called after each checkpoint on the writing worker, with whether it was the last.
    """
    state = load_state(directory, say)
    if state:
        _check_run(state, config)
    begun = state["epoch"] if state else 0
    _check_same_epoch(begun)
    yield from list(state["history"]) if state else []
    writes = _workers_and_rank()[1] == 0
    if writes:
        remove_partial(directory)
    for bank in banks_in(teacher):
        bank.say = say
    last: Epoch | None = None
    run = train(config, state, teacher=teacher, more_metrics=more_metrics, say=say)
    with ThreadPoolExecutor(1) as thread:
        saver = _Saver(directory, thread, config.checkpoint_every_s, begun, say, on_saved)
        try:
            for last in run:
                if writes and config.is_last(last.metrics):
                    saver.save_last(last.state(), about or {})
                elif writes and saver.is_due():
                    saver.begin(last.state())
                yield last.metrics
        except GeneratorExit:
            if writes and last is not None:
                saver.catch_up(last)
            raise
        finally:
            run.close()
            saver.end()


class _Saver:
    """Writes a run's checkpoints in a thread, while training continues.

    Args:
        thread: the one that writes.
        every_s: interval between intermediate checkpoints.
        epoch: the newest one that is already saved.
    """

    def __init__(
        self,
        directory: Path,
        thread: ThreadPoolExecutor,
        every_s: float,
        epoch: int,
        say: Callable[[str], None] | None,
        on_saved: Callable[[bool], None] | None,
    ) -> None:
        self._directory, self._thread, self._every_s = directory, thread, every_s
        self._say, self._on_saved = say, on_saved
        self._saved_at, self._saved_epoch = time.monotonic(), epoch
        self._pending: Future[None] | None = None
        self._troubled = False

    def is_due(self) -> bool:
        """Return whether to write; a slow disk delays checkpoints, not training."""
        idle = self._pending is None or self._pending.done()
        return idle and time.monotonic() - self._saved_at >= self._every_s

    def begin(self, state: State) -> None:
        """Begin to write an intermediate checkpoint."""
        self.end()
        self._pending = self._thread.submit(self._save, state, final=False)
        self._saved_at = time.monotonic()

    def end(self) -> None:
        """Wait for the intermediate checkpoint; report a full disk and raise any other error."""
        error = None if self._pending is None else self._pending.exception()
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            if self._say and not self._troubled:
                self._say(
                    f"no checkpoint: {error}; training continues, and the next checkpoint is tried in "
                    f"{self._every_s:g} s"
                )
            self._troubled = True
        elif error is not None:
            raise error

    def catch_up(self, last: Epoch) -> None:
        """Write the last epoch if it is not saved yet."""
        if self._pending is not None:
            self._pending.exception()  # the last checkpoint may still be in progress
        if last.metrics["epoch"] > self._saved_epoch:
            self._thread.submit(self._save, last.state(), final=False).result()

    def save_last(self, final: State, about: dict[str, str]) -> None:
        """Write the weights and the final state."""
        save_weights(self._directory / WEIGHTS, final["model"], {"run": final["run"], **about})
        # written last: its presence marks the run as complete
        self._thread.submit(self._save, final, final=True).result()

    def _save(self, state: State, *, final: bool) -> None:
        save_state(self._directory, state)
        if self._on_saved:
            self._on_saved(final)
        self._saved_epoch = state["epoch"]


def exploded(metrics: dict[str, float], num_classes: int) -> str | None:
    """Return a sentence if cross-entropy is finite but far above that of guessing, else None."""
    guessing = math.log(num_classes)
    for name in ("train_ce", "val_nll"):
        if metrics.get(name, 0.0) > EXPLODED * guessing:
            return (
                f"warning: training has exploded: {name} is {metrics[name]:.3g} nats an image at epoch "
                f"{metrics['epoch']:.0f}; guessing would reach {guessing:.2g}; a smaller optim.lr or "
                "objective.loss_scale may help"
            )
    return None


def _to_standard_error(text: str) -> None:
    to_stderr(f"tfkd: {text}")


def _unused(student: nn.Module, config: TrainConfig) -> bool:
    """Return whether a parameter may lack its gradient in a step; the same on all workers."""
    if not isinstance(config.student, OwnNetwork | Timm):
        return False
    found = torch.tensor(
        float(may_lack_gradients(student, config.data.shape)),
        device=next(student.parameters()).device,
    )
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def _data_parallel(student: nn.Module, *, shared_buffers: bool, unused: bool) -> nn.Module:
    """Return the student, wrapped for several workers.

    Args:
        shared_buffers: True if steps may read buffers, so that all workers need the first one's in
            each of them. Those of BatchNorm are read in validation alone; see `_validate`.
        unused: True if some parameters may have no gradient in a step, such as a head that only
            some steps use.
    """
    if unused:
        warnings.filterwarnings("ignore", ".*did not find any unused parameters")
    return DistributedDataParallel(
        student,
        forward_sync_buffers=shared_buffers,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
    )


_COMPILED: dict[tuple[Any, ...], int] = {}
"""Kinds of run that this process has compiled since torch's cache was last reset, with their graphs."""
MOST_GRAPHS = 8
"""Graphs that torch keeps over all networks."""


def _graphs_of_run(config: TrainConfig) -> int:
    """Return how many graphs a run needs: for its batches and a smaller last one.

    Pieces of a batch have two sizes.
    """
    return 4 if config.optim.accumulate > 1 else 2


def compiled(student: nn.Module, config: TrainConfig, images: int) -> nn.Module:
    """Return a student compiled by torch.compile, independent of what this process compiled before.

    torch keeps 8 graphs over all networks and batch shapes together; from the ninth on it silently
    trains uncompiled, so a trial's numbers would depend on the trials before it. A run needs two
    graphs, because its last batch may be smaller (more with `accumulate`, and if your own network has
    code that torch cannot trace). Graphs of the last four kinds of run are kept in memory; torch's
    disk cache has the others.

    It is compiled before DDP wraps it. On a GPU one worker replays CUDA graphs; of several, none
    does, because a recorded graph would hold gradients that DDP replaces.
    """
    where = config.workers, config.cpus_per_worker, config.gpus_per_worker, config.precision
    batch = config.optim.batch_size, config.optim.accumulate
    data = config.data
    shapes = images, *batch, data.shape, data.num_classes, data.unlabelled and data.unlabelled_ratio
    kind = (config.student.model_dump_json(), config.freeze, *shapes, *where)
    more = 0 if kind in _COMPILED else _graphs_of_run(config)
    if sum(_COMPILED.values()) + more > MOST_GRAPHS:
        torch.compiler.reset()
        _COMPILED.clear()
    _COMPILED[kind] = _graphs_of_run(config)
    graphs = config.gpus_per_worker and config.workers == 1
    mode = "reduce-overhead" if graphs else None
    return cast(nn.Module, torch.compile(student, dynamic=False, mode=mode))


def _telling_of_compilers(model: nn.Module, config: TrainConfig) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a compiled model.

    Raises:
        RuntimeError: at the first batch, if torch cannot compile the network.
    """

    def forward(batch: Tensor) -> Tensor:
        try:
            return model(batch)  # type: ignore[no-any-return]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            lines = str(error.inner_exception).strip().splitlines()
            what = lines[0] if lines else type(error.inner_exception).__name__
            raise RuntimeError(
                f"compile: torch cannot compile {config.student.name} here: {what}; if g++ or Python's headers are "
                "missing, install them on every node, or set compile=off"
            ) from error

    return forward


def _losses(loss: Tensor, terms: Terms, unlabelled: Tensor | None) -> Tensor:
    """Return the whole loss, CE, KD and that of unlabelled images, [4], without their graph.

    It is 0 for a missing one.
    """
    none = loss.new_zeros(())
    parts = [none if part is None else part for part in (terms.kd, unlabelled)]
    return torch.stack([loss, terms.ce, *parts]).detach()


def _loss_metrics(
    config: TrainConfig,
    objective: Canonical,
    terms: Terms,
    means: Tensor,
    norms: Sequence[_Norms],
) -> dict[str, float]:
    """Return the metrics of the loss over an epoch, from the means of `_losses`."""
    loss, ce, kd, unlabelled = means.tolist()
    found = {"train_loss": loss}
    if objective.has_parts:
        found["train_ce"] = ce
    if terms.kd is not None:
        found["train_kd"] = kd
        if not objective.asks_for_layers:
            found["train_kd_ratio"] = gradient_ratio(norms)
    if config.data.unlabelled is not None:
        found["train_kd_unlabelled"] = unlabelled
    return found


def gradient_norms(objective: Canonical, terms: Terms, logits: Tensor) -> _Norms:
    """Return the number of images, and |gradient| of the soft part and of CE by the logits, [2].

    Both are weighted. None if one of them has no weight, and for an objective that asks for layers,
    whose soft part need not depend on the logits.
    """
    if terms.kd is None or objective.asks_for_layers:
        return None
    if not objective.kd_weight * objective.ce_weight:
        return None
    ce, kd = (
        torch.autograd.grad(part, logits, retain_graph=True)[0].norm()
        for part in (terms.ce, terms.kd)
    )
    return len(logits), torch.stack([objective.kd_weight * kd, objective.ce_weight * ce])


def gradient_ratio(norms: Sequence[_Norms]) -> float:
    """Return |gradient of the soft part| / |gradient of CE| by the logits of a batch, both weighted.

    It is 0 if one of them has no weight.

    Args:
        norms: those of the pieces of the batch.
    """
    known = [found for found in norms if found is not None]
    if not known:
        return 0.0
    kd, ce = known[0][1]
    if len(known) > 1:  # the loss of a piece is the mean over its images
        kd, ce = torch.stack([count * both for count, both in known]).norm(dim=0)
    return float(kd / ce)


def epoch_order(images: Images, seed: int, epoch: int) -> Tensor:
    """Return the indices of a split in the order of an epoch, int64 [N].

    The order is drawn for the whole official set, so the relative order of two images does not
    depend on the rest of the split.
    """
    priority = torch.randperm(images.official_size, generator=generator(seed, "order", epoch))
    return priority[images.positions].argsort()


def _draw_epoch(config: TrainConfig, images: Images, epoch: int) -> _Drawn:
    view = config.augment.of_epoch(config.seed, epoch, images, config.data.shape[1:])
    return epoch_order(images, config.seed, epoch), view


def split_batches(order: Tensor, batch_size: int, workers: int) -> list[Tensor]:
    """Return the batches of an epoch; the last one has at least 2 images per worker.

    A smaller one is merged into the previous batch.
    """
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < 2 * workers:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _check_run(state: State, config: TrainConfig) -> None:
    run = config.fingerprint(LOOP_VERSION)
    if state["run"] != run:
        raise ValueError(
            f"the state is of another run: {state['run']}, not {run} (configuration, data or loop version)"
        )


def _check_same_epoch(epoch: int) -> None:
    """Raise, on every worker alike, if workers loaded checkpoints of different epochs."""
    if dist.is_initialized():
        epochs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(epochs, epoch)
        if len(set(epochs)) > 1:
            raise OSError(
                f"workers read checkpoints of different epochs, {epochs}: the storage is not the same for all"
            )


def _copy_to_cpu(tree: State) -> State:
    return copy.deepcopy(_moved(tree, torch.device("cpu")))


def _moved(tree: State, device: torch.device) -> State:
    found: State = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            found[key] = value.to(device)
        elif isinstance(value, dict):
            found[key] = _moved(value, device)
        else:
            found[key] = value
    return found
