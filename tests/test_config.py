"""The configuration tree: schedules, fingerprints, teachers' runs."""

import math
from pathlib import Path

import pytest

from tfkd_ray.config import RUN_ONLY, Constant, Cosine, Step, TeacherConfig, TrainConfig
from tfkd_ray.data import Mnist
from tfkd_ray.models import Cnn, Mlp
from tfkd_ray.objectives import CrossEntropy, KnowledgeDistillation, TfkdSelf


def test_the_papers_step_schedule() -> None:
    step = Step(warmup_epochs=1)
    factors = {e: step.factor(e, 200) for e in (0.5, 1, 59.9, 60, 120, 160, 199)}
    assert factors == pytest.approx({0.5: 0.5, 1: 1, 59.9: 1, 60: 0.2, 120: 0.04, 160: 0.008, 199: 0.008})


@pytest.mark.parametrize("epochs", [3, 27, 200])
def test_cosine_spans_the_whole_run(epochs: int) -> None:
    cosine = Cosine(warmup_epochs=1)
    assert cosine.factor(1, epochs) == pytest.approx(1)
    assert cosine.factor(epochs, epochs) == pytest.approx(0, abs=1e-12)
    assert cosine.factor((epochs + 1) / 2, epochs) == pytest.approx(0.5)
    assert Cosine(final=0.1).factor(epochs, epochs) == pytest.approx(0.1)


def test_warm_up_takes_at_most_half_of_a_short_run() -> None:
    assert Constant(warmup_epochs=5).factor(0.5, 2) == pytest.approx(0.5)
    assert Constant(warmup_epochs=5).factor(1, 2) == 1


def test_cosine_is_smooth_where_warm_up_ends() -> None:
    cosine = Cosine(warmup_epochs=2)
    assert math.isclose(cosine.factor(2 - 1e-9, 30), cosine.factor(2 + 1e-9, 30), abs_tol=1e-6)


def test_the_fingerprint_names_what_makes_the_numbers() -> None:
    base = TrainConfig(objective=CrossEntropy())
    changed = base.model_copy(update={"seed": 1}).fingerprint()
    moved = base.model_copy(update={"workers": 2, "cpus_per_worker": 3, "checkpoint_every_s": 0.0}).fingerprint()
    assert moved == base.fingerprint() != changed
    here, there = (base.model_copy(update={"data": Mnist(root=Path(root))}) for root in ("/a", "/b"))
    assert here.fingerprint() == there.fingerprint() != base.fingerprint()
    assert base.fingerprint(1) != base.fingerprint(2)
    assert set(TrainConfig.model_fields) > RUN_ONLY


def test_a_self_teacher_is_the_student_under_the_teachers_recipe() -> None:
    config = TrainConfig(objective=TfkdSelf(), student=Cnn(), teacher=TeacherConfig(epochs=3), seed=7)
    run = config.teacher_run()
    assert run is not None
    assert (run.student, run.epochs, run.seed, run.objective) == (Cnn(), 3, 0, CrossEntropy())
    assert run.teacher_run() is None


def test_every_trial_of_a_sweep_has_the_same_teacher_whatever_its_own_hyperparameters() -> None:
    a = TrainConfig(objective=KnowledgeDistillation(alpha=0.1), teacher=TeacherConfig(model=Mlp()))
    b = TrainConfig(objective=KnowledgeDistillation(alpha=0.9), teacher=TeacherConfig(model=Mlp()), seed=3)
    assert a.teacher_run() == b.teacher_run()
