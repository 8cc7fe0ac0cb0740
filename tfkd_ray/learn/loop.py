"""The loop: plain PyTorch, read from top to bottom, one yield per epoch. It does not know Ray.

`train` is a generator: `list(train(config))` is a whole run, `next()` trains an epoch, `close()`
stops it. `train_in` is the same run in a directory, where it writes checkpoints and from which it
resumes. With torch.distributed initialised, every worker runs `train` with the same configuration
and processes its share of every batch.

Shapes: B = images of a batch on this worker, K = classes.
"""

import copy
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tfkd_ray.learn.augment import View
from tfkd_ray.learn.checkpoint import WEIGHTS, State, load_state, save_state, save_weights
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import (
    asked_beside,
    metric_sums,
    metrics_at_once,
    metrics_from,
    predictions,
)
from tfkd_ray.learn.images import Images, address, generator, random_states, seed_all
from tfkd_ray.learn.models import (
    OwnNetwork,
    Timm,
    check_learns,
    check_lone_image,
    may_lack_gradients,
)
from tfkd_ray.learn.objectives import Canonical, Terms
from tfkd_ray.learn.soft_labels import Bank, fits
from tfkd_ray.settings.errors import ConfigError, check_kind
from tfkd_ray.settings.files import DISK_ERRORS, remove_partial

LOOP_VERSION = 3
"""Increased by hand when the loop's numbers change; part of the fingerprint of every run and
teacher."""


class Epoch(NamedTuple):
    """The result of one epoch, as `train` yields it."""

    metrics: dict[str, float]
    """`epoch` (from 1), `train_loss`, its unweighted parts `train_ce` and `train_kd`,
    `train_kd_ratio` (see `gradient_ratio`; from the first worker's share of the first batch),
    `val_...` (see `evaluate`), `lr` of the last step, `parameters` (number of the student's),
    `seconds` (of this epoch, with validation), `images_per_s` (without validation)."""
    state: Callable[[], State]
    """Function that copies the whole run state to the CPU: `epoch`, `model`, `optimizer`, `history`
    (the metrics of all epochs) and `run`. The state has no schedule and no generator: the learning
    rate is a function of the step, and randomness is a function of (seed, purpose, epoch, step,
    worker)."""


EXPLODED = 100
"""Multiple of the loss of guessing, log K, above which a run counts as exploded although its loss
is finite."""


class Diverged(ArithmeticError):
    """Raised if the training or validation loss is no longer finite."""


def train(  # noqa: C901  # to be split
    config: TrainConfig,
    state: State | None = None,
    *,
    teacher: nn.Module | Bank | None = None,
    more_metrics: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Generator[Epoch, None, None]:
    """Train one student; yield after every epoch, from the one after `state` to the last.

    Args:
        state: the run state to resume; the result is bit-identical to an uninterrupted run (same
            processor type, threads, torch).
        teacher: required by some objectives; see `teachers.find_or_train`. A bare module is run in
            every step.
        more_metrics: metrics to compute on validation besides the usual ones, such as `val_auroc`;
            see `scores.SCORES`.
        say: called with a sentence if the loss explodes but stays finite. None: standard error.
    """
    check_kind(config, TrainConfig, "config")
    others = asked_beside(more_metrics)
    # 1. Where it runs
    workers, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if config.gpus_per_worker and not torch.cuda.is_available():
        raise RuntimeError(
            f"gpus_per_worker is {config.gpus_per_worker:g}, and torch sees no GPU here"
        )
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if config.gpus_per_worker
        else torch.device("cpu")
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.cpus_per_worker)
    put_back: Callable[[], None] | None = (
        None  # global generators of numpy and Python, from which external code may draw
    )
    told = False
    tf32_before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        if device.type == "cuda":
            allow_tf32(config.precision == "bf16")
        # 2. Data, resident on the device
        train_set, val_set = config.data.load()
        train_set, val_set = train_set.on(device), val_set and val_set.on(device)
        mean, std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in config.data.statistics()
        )

        def pixels(images: Tensor) -> Tensor:
            return (images.float() - mean) / std

        def seen(shares: list[Tensor], view: View) -> Iterator[Tensor]:
            """Yield the images [B, C, H, W] of each share of the train set, as an epoch's view."""
            reading, there = train_set.read(shares, view.crop), view.on(device)
            for mine, images in zip(shares, reading, strict=True):
                yield pixels(config.augment(images.to(device, non_blocking=True), there.of(mine)))

        bf16 = config.precision == "bf16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

        # 3. Student, teacher, optimizer
        classes = config.data.num_classes
        student = config.build_student()
        check_learns(config.student.called, student)
        smallest = min(
            map(len, split_batches(torch.arange(len(train_set)), config.optim.batch_size, workers))
        )
        if smallest < 2 * workers and config.batch_norm != "sync":
            check_lone_image(config.student.called, student, config.data.shape)
        student = student.to(device).to(memory_format=config.student.memory_format)
        unused = workers > 1 and _unused(student, config)
        if config.batch_norm == "sync" and workers > 1:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        if config.needs_teacher and teacher is None:
            raise ValueError(
                f"objective {config.objective.name}: needs a teacher; pass teachers.find_or_train(config)"
            )
        if config.init == "trained" and teacher is not None:
            student.load_state_dict(
                (teacher.network() if isinstance(teacher, Bank) else teacher).state_dict()
            )
        made = config.teacher_run() if config.objective.needs_teacher else None
        elsewhere = any(
            isinstance(run.student, OwnNetwork | Timm) for run in (config, made) if run is not None
        )

        def placed(network: nn.Module) -> nn.Module:
            """Return the teacher on this device, ready for inference."""
            assert made is not None
            return (
                network.to(device)
                .to(memory_format=made.student.memory_format)
                .eval()
                .requires_grad_(False)
            )

        bank = None
        if made is None:
            teacher = None
        elif isinstance(teacher, Bank):
            small = fits(len(train_set), classes)
            bank, teacher = (
                (teacher, None) if config.banked and small else (None, placed(teacher.network()))
            )
        elif teacher is not None:
            teacher = placed(teacher)
        optim = config.optim
        optimizer = torch.optim.SGD(
            student.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
            fused=True,
        )
        # torch's fused SGD fails if a parameter's first gradient comes after the others'
        if optim.momentum:
            for parameter in student.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

        # 4. Resume
        run = config.fingerprint(LOOP_VERSION)
        history: list[dict[str, float]] = []
        if state is not None:
            _check_run(state, config)
            student.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = list(state["history"])
        model = _data_parallel(student, unused=unused) if workers > 1 else student
        forward = compiled(model, config, len(train_set)) if config.compile == "on" else model

        def snapshot() -> State:
            parts = {"model": student.state_dict(), "optimizer": optimizer.state_dict()}
            return {
                **_copy_to_cpu(parts),
                "run": run,
                "epoch": len(history),
                "history": list(history),
            }

        teacher_val: Tensor | None = None

        def ask_on_train(view: View, network: nn.Module, index: Tensor) -> Tensor:
            """Return the teacher's logits [n, K] of augmented train images, to fill the bank."""
            network = placed(network)
            with torch.no_grad(), autocast:
                batches = list(index.to(device).split(optim.batch_size))
                return torch.cat([network(images).float() for images in seen(batches, view)])

        def ask_on_val(network: nn.Module, index: Tensor) -> Tensor:
            """Return the teacher's logits [n, K] of validation images."""
            assert val_set is not None
            found = predictions(
                placed(network), val_set.part(index.to(device)), config.data, bf16=bf16
            )
            return torch.cat([soft for soft, _ in found])

        # 5. Epochs
        for epoch in range(len(history), config.epochs):
            if history and config.is_last(history[-1]):
                return
            start = time.perf_counter()
            order = epoch_order(train_set, config.seed, epoch).to(device)
            batches = split_batches(order, optim.batch_size, workers)
            view = config.augment.view(config.seed, epoch, train_set.official_size).of(
                train_set.positions.cpu()
            )
            shares = [batch.tensor_split(workers)[rank] for batch in batches]
            soft_labels = None
            if bank is not None:
                key = config.augment.key(config.seed, epoch)
                soft_labels = bank.logits(
                    key, len(train_set), classes, functools.partial(ask_on_train, view)
                ).to(device)
            # sums of loss, CE and KD, each weighted by images
            sums = torch.zeros(3, dtype=torch.float64, device=device)

            # 6. Steps
            put_back = random_states() if elsewhere else None
            seed_step = seed_all if elsewhere else torch.manual_seed
            model.train()
            for step, (batch, mine, images) in enumerate(
                zip(batches, shares, seen(shares, view), strict=True)
            ):
                lr = optim.lr * config.schedule.factor(
                    epoch + (step + 0.5) / len(batches), config.epochs
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                seed_step(address(config.seed, "step", epoch, step, rank))  # dropout
                labels = train_set.labels[mine]
                soft = None if soft_labels is None else soft_labels[mine].float()
                if teacher is not None:
                    with torch.no_grad(), autocast:
                        soft = teacher(images).float()
                with autocast:
                    logits = forward(images)
                if not logits.requires_grad:
                    raise ConfigError(
                        f"model {config.student.called}: its logits depend on no parameter that learns; is there a "
                        "no_grad or a detach in its forward?"
                    )
                logits = logits.float()
                terms = config.objective.terms(logits, labels, soft)
                loss = config.objective.combine(terms)
                if step == 0:
                    ratio = gradient_ratio(config.objective, terms, logits)
                optimizer.zero_grad()
                # DDP takes the mean over workers: weigh each by its images
                (loss * (len(mine) * workers / len(batch))).backward()
                optimizer.step()
                parts = torch.stack(
                    [loss, terms.ce, loss.new_zeros(()) if terms.kd is None else terms.kd]
                )
                sums += parts.detach() * len(mine)
            train_seconds = time.perf_counter() - start

            # 7. Validation: each worker takes its share, without padding
            if workers > 1:
                for buffer in student.buffers():  # all workers use the same batch statistics
                    dist.broadcast(buffer, src=0)
            val_sums, val_logits = torch.zeros(1, device=device), []
            if val_set is not None:
                if made is not None and teacher_val is None:  # the same in every epoch
                    if bank is not None:
                        teacher_val = bank.logits(
                            {"split": "val"}, len(val_set), classes, ask_on_val
                        )[rank::workers]
                    elif teacher is not None:
                        teacher_val = ask_on_val(teacher, torch.arange(len(val_set))[rank::workers])
                judged, at = (
                    predictions(
                        student, val_set, config.data, rank=rank, workers=workers, bf16=bf16
                    ),
                    0,
                )
                for guess, labels in judged:
                    soft = (
                        None
                        if teacher_val is None
                        else teacher_val[at : (at := at + len(guess))].to(device)
                    )
                    val_sums = val_sums + metric_sums(guess, labels, soft)
                    if others:
                        val_logits.append(guess)
            if workers > 1:
                dist.all_reduce(sums)
                dist.all_reduce(val_sums)

            # 8. Metrics
            train_loss, train_ce, train_kd = (sums / len(train_set)).tolist()
            metrics = {"epoch": float(epoch + 1), "train_loss": train_loss, "train_ce": train_ce}
            if terms.kd is not None:
                metrics |= {"train_kd": train_kd, "train_kd_ratio": float(ratio)}
            metrics |= metrics_from(val_sums) if val_set is not None else {}
            metrics |= {"lr": lr, "parameters": float(sum(p.numel() for p in student.parameters()))}
            for name in ("train_loss", "val_nll"):
                if not abs(metrics.get(name, 0.0)) < float("inf"):
                    advice = "a smaller optim.lr may help"
                    if soft is not None and not soft.isfinite().all():
                        advice = "the teacher's logits are not finite numbers; look at its weights and its images"
                    raise Diverged(f"{name} is {metrics[name]} at epoch {epoch + 1}; {advice}")
            if val_set is not None and others:
                labels = val_set.labels
                metrics |= metrics_at_once(
                    others, val_logits, labels, classes, rank=rank, workers=workers
                )
            if not told and rank == 0 and (sentence := exploded(metrics, classes)):
                told = True
                (say or _to_standard_error)(sentence)
            if put_back is not None:
                put_back()
                put_back = None
            metrics["seconds"] = time.perf_counter() - start
            metrics["images_per_s"] = len(train_set) / train_seconds
            history.append(metrics)
            yield Epoch(metrics, snapshot)
    finally:
        if put_back is not None:
            put_back()
        torch.set_num_threads(threads_before)
        if device.type == "cuda":
            torch.set_float32_matmul_precision(tf32_before[0])
            torch.backends.cudnn.allow_tf32 = tf32_before[1]


def train_in(  # noqa: C901  # to be split
    directory: Path,
    config: TrainConfig,
    *,
    teacher: nn.Module | Bank | None = None,
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
    _check_same_epoch(state["epoch"] if state else 0)
    yield from list(state["history"]) if state else []
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        remove_partial(directory)
    if isinstance(teacher, Bank):
        teacher.say = say
    saved_at, saved_epoch, every = (
        time.monotonic(),
        state["epoch"] if state else 0,
        config.checkpoint_every_s,
    )
    troubled = False
    pending: Future[None] | None = None
    last: Epoch | None = None
    run = train(config, state, teacher=teacher, more_metrics=more_metrics, say=say)

    def save(state: State, *, final: bool) -> None:
        nonlocal saved_epoch
        save_state(directory, state)
        if on_saved:
            on_saved(final)
        saved_epoch = state["epoch"]

    def writing(job: Future[None] | None) -> bool:
        return job is not None and not job.done()  # a slow disk delays checkpoints, not training

    def tell(job: Future[None]) -> None:
        """Report a failed intermediate checkpoint; training continues without it."""
        nonlocal troubled
        error = job.exception()
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            if say and not troubled:
                say(
                    f"no checkpoint: {error}; training goes on, and the next one is tried in {every:g} s"
                )
            troubled = True
        elif error is not None:
            raise error

    with ThreadPoolExecutor(1) as writer:
        try:
            for last in run:
                if writes and config.is_last(last.metrics):
                    final = last.state()
                    save_weights(
                        directory / WEIGHTS, final["model"], {"run": final["run"], **(about or {})}
                    )
                    writer.submit(
                        save, final, final=True
                    ).result()  # written last: its presence marks the run as complete
                elif writes and time.monotonic() - saved_at >= every and not writing(pending):
                    if pending is not None:
                        tell(pending)
                    pending, saved_at = (
                        writer.submit(save, last.state(), final=False),
                        time.monotonic(),
                    )
                yield last.metrics
        except GeneratorExit:
            if pending is not None:
                pending.exception()  # the last checkpoint may still be in progress
            if writes and last is not None and last.metrics["epoch"] > saved_epoch:
                writer.submit(save, last.state(), final=False).result()
            raise
        finally:
            run.close()
            if pending is not None:
                tell(pending)


def exploded(metrics: dict[str, float], num_classes: int) -> str | None:
    """Return a sentence if cross-entropy is finite but far above that of guessing, else None."""
    guessing = math.log(num_classes)
    for name in ("train_ce", "val_nll"):
        if metrics.get(name, 0.0) > EXPLODED * guessing:
            return (
                f"warning: training has exploded: {name} is {metrics[name]:.3g} nats an image at epoch "
                f"{metrics['epoch']:.0f}, where guessing has {guessing:.2g}; a smaller optim.lr or "
                "objective.loss_scale may help"
            )
    return None


def _to_standard_error(text: str) -> None:
    print(f"tfkd: {text}", file=sys.stderr, flush=True)


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


def _data_parallel(student: nn.Module, *, unused: bool) -> nn.Module:
    """Return the student, wrapped for several workers.

    Args:
        unused: True if some parameters may have no gradient in a step, such as a head that only
            some steps use.
    """
    if unused:
        warnings.filterwarnings("ignore", ".*did not find any unused parameters")
    return DistributedDataParallel(student, find_unused_parameters=unused)


def allow_tf32(on: bool) -> None:
    """Allow or forbid TF32 (10 bits) in CUDA's float32; torch's default: convolutions only."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


_COMPILED: set[tuple[Any, ...]] = set()
"""Kinds of run that this process has compiled since torch's cache was last reset."""


def compiled(model: nn.Module, config: TrainConfig, images: int) -> Callable[[Tensor], Tensor]:
    """Return a student compiled by torch.compile, independent of what this process compiled before.

    torch keeps 8 graphs over all networks and batch shapes together; from the ninth on it silently
    trains uncompiled, so a trial's numbers would depend on the trials before it. A run needs two
    graphs, because its last batch may be smaller (more if your own network has code that torch
    cannot trace). Graphs of the last four kinds of run are kept in memory; torch's disk cache has
    the others.

    Raises:
        RuntimeError: at the first batch, if torch cannot compile the network.
    """
    where = config.workers, config.cpus_per_worker, config.gpus_per_worker, config.precision
    shapes = images, config.optim.batch_size, config.data.shape, config.data.num_classes
    kind = (config.student.model_dump_json(), *shapes, *where)
    if kind not in _COMPILED and len(_COMPILED) == 4:
        torch.compiler.reset()
        _COMPILED.clear()
    _COMPILED.add(kind)
    mode = "reduce-overhead" if config.gpus_per_worker else None  # CUDA graphs
    network = torch.compile(model, dynamic=False, mode=mode)

    def forward(batch: Tensor) -> Tensor:
        try:
            return network(batch)  # type: ignore[no-any-return]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            what = next(
                iter(f"{error.inner_exception}".strip().splitlines()),
                type(error.inner_exception).__name__,
            )
            raise RuntimeError(
                f"compile: torch cannot compile {config.student.name} here: {what}; if it is for want of g++ or "
                "Python's headers, install them on every node; or set compile=off"
            ) from error

    return forward


def gradient_ratio(objective: Canonical, terms: Terms, logits: Tensor) -> Tensor:
    """Return |gradient of the soft part| / |gradient of CE| by the logits, both weighted.

    It is 0 if one of them has no weight.
    """
    if terms.kd is None or not objective.kd_weight * objective.ce_weight:
        return torch.zeros(())
    ce, kd = (
        torch.autograd.grad(part, logits, retain_graph=True)[0].norm()
        for part in (terms.ce, terms.kd)
    )
    ratio: Tensor = objective.kd_weight * kd / (objective.ce_weight * ce)
    return ratio


def epoch_order(images: Images, seed: int, epoch: int) -> Tensor:
    """Return the indices of a split in the order of an epoch, int64 [N].

    The order is drawn for the whole official set, so the relative order of two images does not
    depend on the rest of the split.
    """
    priority = torch.randperm(images.official_size, generator=generator(seed, "order", epoch))
    return priority[images.positions.cpu()].argsort()


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
