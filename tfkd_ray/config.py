"""The configuration of one training run: every default, range and unit, once.

`TrainConfig` is the whole tree. A search space (`space.py`) is the same tree with ranges in it.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tfkd_ray.augment import Augment
from tfkd_ray.data import Data, Digits
from tfkd_ray.models import Mlp, Model
from tfkd_ray.objectives import CrossEntropy, LabelSmoothing, Objective, TfkdSelf
from tfkd_ray.schema import Settings, named

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class OptimConfig(Settings):
    """SGD with momentum; weight decay on all parameters, as in the paper's code."""

    lr: Positive = 0.1
    """Peak learning rate, for the whole (all-worker) batch."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    """Nesterov's momentum; the paper's recipe is without."""
    batch_size: Count = 128
    """Images a step, over all workers."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Schedule(Settings):
    """Learning rate as a function of the epoch, a real number: linear warm-up, then the rest of the schedule."""

    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs of linear warm-up from 0 to the peak; at most half of the run."""

    def factor(self, epoch: float, epochs: int) -> float:
        """Factor on the peak learning rate at a point in [0, epochs) of a run; a step's point is its middle."""
        warmup = min(self.warmup_epochs, epochs / 2)
        if epoch < warmup:
            return epoch / warmup
        return self._after_warmup((epoch - warmup) / (epochs - warmup), epoch / epochs)

    def _after_warmup(self, progress: float, fraction: float) -> float:
        raise TypeError(f"{type(self).__name__} does not say how it goes on")


class Constant(Schedule):
    """The peak learning rate throughout."""

    name: Literal["constant"] = "constant"

    def _after_warmup(self, progress: float, fraction: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the peak to `final` of it. (Loshchilov and Hutter 2017, arXiv:1608.03983.)"""

    name: Literal["cosine"] = "cosine"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a fraction of the peak."""

    def _after_warmup(self, progress: float, fraction: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Step(Schedule):
    """Multiplied by `gamma` at each milestone. The paper's: by 0.2 at epochs 60, 120 and 160 of 200."""

    name: Literal["step"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.3, 0.6, 0.8)
    """Fractions of the run, so that a shorter run decays at the same points."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.2

    def _after_warmup(self, progress: float, fraction: float) -> float:
        return self.gamma ** sum(fraction >= m for m in self.milestones)


AnySchedule = Annotated[Cosine | Step | Constant, Field(discriminator="name"), BeforeValidator(named)]


class TeacherConfig(Settings):
    """How the teacher is trained: on the student's train split, with hard labels."""

    model: Model | None = None
    """Its network. None: the student's own, which is what makes `tfkd_self`."""
    objective: Annotated[CrossEntropy | LabelSmoothing, Field(discriminator="name"), BeforeValidator(named)] = (
        CrossEntropy()
    )
    epochs: Count | None = None
    """None: as many as the student's."""
    optim: OptimConfig = OptimConfig()
    schedule: AnySchedule = Cosine()
    seed: Annotated[int, Field(ge=0)] = 0


class TrainConfig(Settings):
    """One training run, complete: what is trained, on what, how, and with which seed."""

    data: Data = Digits()
    augment: Augment = Augment()
    """How train images are varied; none by default."""
    student: Model = Mlp()
    objective: Objective
    teacher: TeacherConfig | None = None
    """Needed by `kd` and its kin; `tfkd_self` has a default: the student's network under the default recipe."""
    epochs: Count = 27
    optim: OptimConfig = OptimConfig()
    schedule: AnySchedule = Cosine()
    seed: Annotated[int, Field(ge=0)] = 0
    """Initialisation, data order, augmentation and dropout are pure functions of it."""
    workers: Annotated[int, Field(ge=1, le=4096)] = 1
    """Ray Train workers of one trial; each gets its part of every batch."""
    cpus_per_worker: Count = 1
    """CPUs, and torch threads, of a worker."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs of a worker; a fraction lets one-worker trials share a GPU. 0: the CPU, also where there are GPUs."""
    batch_norm: Literal["local", "sync"] = "local"
    """Batch statistics of each worker's own part, or over all workers (GPU only)."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds between checkpoints of the whole run state, written at the end of an epoch; 0: every epoch."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        try:
            self.objective.check_classes(self.data.num_classes)
        except ValueError as error:
            problems.append(str(error))
        model = self.teacher.model if self.teacher else None
        for path, network in (("student", self.student), ("teacher.model", model)):
            try:
                if network is not None:
                    network.check(self.data.shape)
            except ValueError as error:
                problems.append(f"{path}.{error}")
        if self.objective.needs_teacher and not isinstance(self.objective, TfkdSelf) and model is None:
            problems.append(
                f"teacher.model: objective {self.objective.name} needs a teacher's network, and none is given; add "
                "teacher: {model: ...}, or use tfkd_self, whose teacher is the student itself"
            )
        if isinstance(self.objective, TfkdSelf) and model not in (None, self.student):
            problems.append(
                "teacher.model: objective tfkd_self learns from a copy of the student; leave it out, or use kd"
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            problems.append(f"gpus_per_worker: above 1 it must be a whole number, got {self.gpus_per_worker:g}")
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            problems.append(f"gpus_per_worker: {self.workers} workers need whole GPUs, got {self.gpus_per_worker:g}")
        if self.batch_norm == "sync" and self.gpus_per_worker == 0:
            problems.append("batch_norm: sync needs GPUs (torch's SyncBatchNorm has no CPU form); set gpus_per_worker")
        if self.workers > self.optim.batch_size:
            problems.append(f"optim.batch_size: {self.workers} workers cannot share {self.optim.batch_size} images")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def teacher_run(self) -> "TrainConfig | None":
        """The training run that makes this run's teacher; None where the objective needs none."""
        if not self.objective.needs_teacher:
            return None
        teacher = self.teacher or TeacherConfig()
        return TrainConfig(
            data=self.data,
            augment=self.augment,
            student=teacher.model or self.student,
            objective=teacher.objective,
            epochs=teacher.epochs or self.epochs,
            optim=teacher.optim,
            schedule=teacher.schedule,
            seed=teacher.seed,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=min(self.gpus_per_worker, 1),
        )

    def fingerprint(self, *more: Any) -> str:
        """16 hex digits that name everything that makes this run's numbers; where it runs is left out."""
        tree = self.model_dump(mode="json", exclude={**dict.fromkeys(RUN_ONLY, True), "data": {"root"}})
        text = json.dumps([tree, *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


RUN_ONLY = {"workers", "cpus_per_worker", "gpus_per_worker", "checkpoint_every_s"}
"""Settings of TrainConfig that say where and how safely it runs. They are one for a whole sweep: never searched."""
