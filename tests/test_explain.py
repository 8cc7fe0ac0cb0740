"""Explanations of objectives against exact results, and detection of settings without effect."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from conftest import OBJECTIVES, SHIPPED

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.images import generator
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.objectives import (
    Canonical,
    CrossEntropy,
    KnowledgeDistillation,
    LabelSmoothing,
    Terms,
    TfkdReg,
    TfkdRegCode,
    from_released,
)
from tfkd_ray.space.explain import (
    EXPLAIN_TOLERANCE,
    SCALES,
    Knob,
    _batch,
    _gradients,
    amounts_to,
    arm_line,
    explained,
    knobs,
    warnings_of,
)
from tfkd_ray.space.space import Space, build_space, load_space

IDS = [o.name for o in OBJECTIVES]
TAUGHT = [o.name for o in OBJECTIVES if o.needs_teacher]
SCALE = {"low": 0.05, "high": 1, "log": True}
SPACES = [p for p in SHIPPED if p.parent.name == "search_spaces"]  # below it are arms
DIGITS = next(p for p in SPACES if p.stem == "digits_tfkd")


def space(objective: Any, **tree: Any) -> Space:
    teacher = (
        {"teacher": {"model": "mlp"}}
        if objective["name"] in TAUGHT and objective["name"] != "tfkd_self"  # trains its own
        else {}
    )
    return build_space({"objective": objective, "student": "mlp", **teacher, **tree})


def knob(name: str, K: int = 10, **settings: Any) -> Knob:
    """Return the only searched setting of an objective."""
    (found,) = knobs(space({"name": name, **settings}).branches[0], K)
    return found


# --- gradients


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("K", [2, 10])
def test_the_gradient_is_that_of_the_loss(objective: Canonical, K: int) -> None:
    scaled = objective.model_copy(update={"loss_scale": 0.3})
    logits, labels, teacher = (
        torch.tensor(x.astype(x.dtype if x.ndim > 1 else int)) for x in _batch(K)
    )
    for z, found in zip(logits, _gradients(K)(scaled), strict=True):
        z = z.clone().requires_grad_()
        scaled(z, labels, teacher).backward()
        assert z.grad is not None and torch.allclose(
            torch.tensor(found), z.grad.flatten(), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("K", [2, 10, 200])  # 200: 163 images, whose numbers are no multiple of 16
def test_the_synthetic_batch_is_drawn_as_torch_draws_it(K: int) -> None:
    """The figures are those of releases that used torch."""
    g = generator(0, "explain", K)
    logits, labels, _ = _batch(K)
    B = len(labels)
    assert labels.tolist() == torch.randint(K, (B,), generator=g).tolist()
    normal, bump = (
        torch.randn(B, K, generator=g, dtype=torch.float64),
        torch.rand(B, generator=g, dtype=torch.float64),
    )
    normal[torch.arange(B), torch.tensor(labels.astype(int))] += 4 * bump
    assert torch.allclose(torch.tensor(logits[0]), normal, rtol=1e-14, atol=1e-14)


def test_the_same_numbers_each_time_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = list(explained(load_space(DIGITS)))
    _batch.cache_clear()
    assert list(explained(load_space(DIGITS))) == first
    assert torch.equal(torch.get_rng_state(), before)


# --- what an objective amounts to


@pytest.mark.parametrize(
    "model, alpha, T, m, eps, scale",
    [
        ("resnet18", 0.1, 20, 100, 0.1000, 1.0),
        ("mobilenetv2", 0.95, 40, 1, 0.1597, 0.0595),
        (
            "shufflenetv2",
            0.95,
            10,
            1,
            0.1595,
            0.0595,
        ),  # .1597 there, without (1 - p_c) K / (K - 1), which is .9990 here
        ("googlenet", 0.1, 40, 50, 0.0526, 0.95),
    ],
)
def test_the_released_settings_are_the_label_smoothings_of_the_fact_sheet(
    model: str, alpha: float, T: float, m: float, eps: float, scale: float
) -> None:
    amount = amounts_to(
        from_released("tfkd_reg", alpha=alpha, temperature=T, multiplier=m, num_classes=100), 100
    )
    assert (amount.lsr.alpha, amount.lsr.loss_scale) == (
        pytest.approx(eps, abs=1e-4),
        pytest.approx(scale, rel=1e-9),
    )
    assert amount.residual < 1e-12


@pytest.mark.parametrize("K", [2, 1000])
@pytest.mark.parametrize("T", [1.0, 20.0])
def test_tfkd_reg_code_is_what_it_says_it_is(K: int, T: float) -> None:
    code = TfkdRegCode(alpha=0.37, temperature=T, correct_prob=0.9, loss_scale=0.3)
    amount, exact = amounts_to(code, K), code.as_label_smoothing(K)
    assert amount.residual < 1e-12
    assert (amount.lsr.alpha, amount.lsr.loss_scale) == (
        pytest.approx(exact.alpha),
        pytest.approx(0.3),
    )


@pytest.mark.parametrize("K", [10, 1000])
@pytest.mark.parametrize("alpha, a", [(0.1, 0.99), (0.9, 0.9), (0.5, 0.5)])
def test_tfkd_reg_at_temperature_1_is_label_smoothing(K: int, alpha: float, a: float) -> None:
    """The target is flat off the label: alpha * (1 - a) is spread over K - 1 classes."""
    amount = amounts_to(TfkdReg(alpha=alpha, temperature=1, correct_prob=a), K)
    assert amount.residual < 1e-12
    assert amount.lsr.alpha == pytest.approx(alpha * (1 - a) * K / (K - 1))


def test_ce_and_lsr_amount_to_themselves() -> None:
    assert amounts_to(CrossEntropy(loss_scale=0.4), 10).lsr.alpha == pytest.approx(0, abs=1e-12)
    amount = amounts_to(LabelSmoothing(alpha=0.2, loss_scale=0.5), 10)
    assert (amount.lsr.alpha, amount.lsr.loss_scale) == (pytest.approx(0.2), pytest.approx(0.5))
    assert (amount.ce_weight, amount.soft_weight) == (pytest.approx(0.4), pytest.approx(0.1))


def test_weights_are_those_of_the_whole_loss() -> None:
    amount = amounts_to(KnowledgeDistillation(alpha=0.25, temperature=4, loss_scale=0.5), 10)
    assert (amount.ce_weight, amount.soft_weight) == (0.375, 2.0)
    assert len(amount.residuals) == len(SCALES) and amount.residual == max(amount.residuals)


def test_no_other_label_smoothing_is_nearer() -> None:
    objective = TfkdReg(alpha=0.5, temperature=4)
    amount, g = amounts_to(objective, 10), _gradients(10)

    def off(lsr: Canonical) -> float:
        gradient = g(objective)
        norm = np.linalg.norm
        return math.hypot(*(norm(gradient - g(lsr), axis=1) / norm(gradient, axis=1)).tolist())

    best = off(amount.lsr)
    assert best == pytest.approx(math.hypot(*amount.residuals)) and best > EXPLAIN_TOLERANCE
    for field in ("alpha", "loss_scale"):
        for factor in (0.99, 1.01):
            assert (
                off(amount.lsr.model_copy(update={field: factor * getattr(amount.lsr, field)}))
                > best
            )


class Whole(Canonical):
    """A loss that is not CE and a soft part: CE times (1 - p)^gamma."""

    has_parts: ClassVar[bool] = False
    name: Literal["whole"] = "whole"
    gamma: float = 2.0
    kind: str = "focal"

    def terms(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None
    ) -> Terms:
        log_p = logits.log_softmax(dim=1).gather(1, labels[:, None])
        return Terms(-((1 - log_p.exp()) ** self.gamma * log_p).mean(), None)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # it is not in the union
def test_a_loss_without_parts_is_explained_by_its_own_gradient_and_not_as_ce() -> None:
    objective = Whole(loss_scale=0.3)
    test_the_gradient_is_that_of_the_loss(objective, 10)
    amount = amounts_to(objective, 10)
    assert objective.ce_share is amount.ce_weight is None and amount.residual > 0.1
    plain = amounts_to(Whole(gamma=0, loss_scale=0.3), 10)
    assert plain.residual < 1e-12 and plain.lsr.loss_scale == pytest.approx(0.3)
    run = TrainConfig(objective=CrossEntropy(), epochs=1, data={"name": "digits", "subset": 100})
    run = run.model_copy(update={"objective": objective})
    lines = list(arm_line("mine", run))
    assert lines[:3] == [
        "mine: whole",
        "  loss_scale 0.3, gamma 2, kind focal",
        "  weight of CE unknown: whole gives the whole loss",
    ]
    (epoch,) = train(run)
    assert "train_loss" in epoch.metrics
    assert not {"train_ce", "train_kd", "train_kd_ratio"} & set(epoch.metrics)


def test_every_setting_of_an_objective_is_shown() -> None:
    objective = {"name": "dkd", "nontarget_weight": {"low": 1, "high": 8}}
    assert "  loss_scale 1, alpha 0.9, T 4, target_weight 1, nontarget_weight 1 to 8" in explained(
        space(objective)
    )


# --- settings


@pytest.mark.parametrize("name", IDS)
def test_loss_scale_is_redundant_everywhere(name: str) -> None:
    found = knob(name, 10, loss_scale=SCALE)
    assert found.verdict == "redundant" and found.residual < 1e-12
    assert found.scalars == (pytest.approx(math.sqrt(0.05)), pytest.approx(1 / math.sqrt(0.05)))


@pytest.mark.parametrize("K", [10, 1000])
@pytest.mark.parametrize(
    "name", [o.name for o in OBJECTIVES if o.needs_teacher and hasattr(o, "temperature")]
)
def test_the_temperature_of_a_trained_teacher_is_live(name: str, K: int) -> None:
    assert knob(name, K, temperature={"low": 1, "high": 20, "log": True}).residual > 0.2


def test_what_has_no_weight_is_dead() -> None:
    assert knob("kd", alpha=0, temperature={"low": 1, "high": 20}).verdict == "dead"
    assert (
        knob("dkd", 2, nontarget_weight={"choices": [1, 8, 4]}).verdict == "dead"
    )  # K = 2: one class beside the label
    assert knob("dkd", 10, nontarget_weight={"choices": [1, 8, 4]}).verdict == "live"


def test_what_only_scales_the_loss_is_redundant() -> None:
    found = knob("dkd", alpha=1, nontarget_weight=0, target_weight={"low": 0, "high": 4})
    assert found.verdict == "redundant" and found.scalars == (0, pytest.approx(2))


def test_a_setting_is_dead_only_if_it_is_at_the_ends_of_the_others_too() -> None:
    tree = {"name": "kd", "temperature": {"low": 1, "high": 20}, "alpha": {"choices": [0, 0.9]}}
    found = {k.name: k.verdict for k in knobs(space(tree).branches[0], 10)}
    assert found == {"objective.kd.alpha": "live", "objective.kd.temperature": "live"}


@pytest.mark.parametrize("K, alpha, least, most", [
    (10, 0.1, 0.02, 0.06), (100, 0.1, 0.02, 0.05), (1000, 0.1, 0.001, 0.01),
    (10, 0.9, 0.05, 0.15), (100, 0.9, 0.1, 0.2), (1000, 0.9, 0.05, 0.15),
])  # fmt: skip
def test_high_temperatures_of_tfkd_reg_differ_little_and_low_ones_much(
    K: int, alpha: float, least: float, most: float
) -> None:
    high = knob("tfkd_reg", K, alpha=alpha, temperature={"low": 20, "high": 40, "log": True})
    low = knob("tfkd_reg", K, alpha=alpha, temperature={"low": 2, "high": 4, "log": True})
    assert least < high.residual < most
    assert 1.5 * high.residual < low.residual < 0.6 and low.residual > 0.04


@pytest.mark.parametrize("low, high, least, most", [(20, 40, 0.001, 0.06), (2, 4, 0.07, 0.62)])
def test_at_the_start_of_training_the_gradient_moves_as_the_default_range_assumes(
    low: float, high: float, least: float, most: float
) -> None:
    """K = 100, small logits, alpha .1 to .9: T 20 to 40 moves it .1 to 6 %, T 2 to 4 7 to 62 %."""
    gradient, moved = _gradients(100), []
    for alpha in (0.1, 0.5, 0.9):
        a, b = (gradient(TfkdReg(alpha=alpha, temperature=T))[0] for T in (low, high))
        moved.append(float(np.linalg.norm(b - a) / np.linalg.norm(a)))
    assert least < min(moved) and max(moved) < most


# --- sentences


def test_a_dead_setting_is_warned_of_by_name() -> None:
    tree = {"name": "kd", "alpha": 0, "temperature": {"low": 1, "high": 20}}
    assert warnings_of(space(tree)) == [
        "objective.kd.temperature: dead: over its range the logit gradient moves by 0.00 % (below 2 %), and its size by "
        "0.00 %; fix it, or widen it"
    ]


def test_a_redundant_setting_is_warned_of_with_a_way_out() -> None:
    tree = {"name": "lsr", "loss_scale": SCALE}
    (sentence,) = warnings_of(space(tree))
    assert sentence == (
        "objective.lsr.loss_scale: redundant: it only scales the loss (20-fold over its range), which equals "
        "optim.lr times that factor and optim.weight_decay divided by it; search these instead, or fix it"
    )
    both = {"lr": {"low": 0.01, "high": 1}, "weight_decay": {"low": 1e-5, "high": 1e-3}}
    (sentence,) = warnings_of(space(tree, optim=both))
    assert sentence.endswith("both are searched already: fix it")
    (sentence,) = warnings_of(space(tree, optim="adamw"))
    assert sentence.endswith(
        "(20-fold over its range), and updates of adamw do not depend on that; fix it"
    )


def test_settings_that_are_one_knob_are_warned_of() -> None:
    """At T = 1 only alpha * (1 - correct_prob) matters."""
    both = {"alpha": {"low": 0.1, "high": 0.9}, "correct_prob": {"low": 0.5, "high": 0.9}}
    (sentence,) = warnings_of(space({"name": "tfkd_reg", "temperature": 1, **both}))
    assert sentence == (
        "objective.tfkd_reg: alpha and correct_prob are one knob: at all ends of their ranges it equals lsr alpha "
        "0.01111 to 0.5 with loss_scale 1 (to 0.00 %); search one of them, or lsr"
    )
    assert warnings_of(space({"name": "tfkd_reg", "temperature": 4, **both})) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_reports_of_shipped_spaces_fit_and_name_every_searched_setting(path: Path) -> None:
    shipped = load_space(path)
    lines = list(explained(shipped))
    assert max(map(len, lines)) <= 80
    for branch in shipped.branches:
        start = next(
            i
            for i, line in enumerate(lines)
            if line.split(",")[0] == f"objective.{branch.objective}"
        )
        part = lines[start : lines.index("", start)] if "" in lines[start:] else lines[start:]
        searched = [p.path[-1] for p in branch.parameters if p.path[0] == "objective"]
        assert [
            line.split()[0] for line in part if line.endswith((" live", " redundant", " dead"))
        ] == searched


def test_no_setting_of_the_shipped_digits_space_is_wasted() -> None:
    assert warnings_of(load_space(DIGITS)) == []


@pytest.mark.slow
def test_a_long_list_of_choices_is_cut_to_fit() -> None:
    scale = {"low": 1e-5, "high": 0.999999, "log": True}
    tree = {
        "name": "kd_standardised",
        "temperature": {"choices": [k / 7 for k in range(7, 70)]},
        "loss_scale": scale,
    }
    assert max(map(len, explained(space(tree)))) <= 80


def test_an_arm_says_what_it_amounts_to() -> None:
    code = from_released("tfkd_reg", alpha=0.95, temperature=40, num_classes=10).model_dump()
    assert list(arm_line("released", TrainConfig.model_validate({"objective": code}))) == [
        "released: tfkd_reg_code",
        "  loss_scale 0.145, alpha 0.6552, T 40, correct_prob 0.99",
        "  weight of CE 0.05, of the soft part 0.095",
        "  equals lsr alpha 0.6535 with loss_scale 0.145 (to 0.00 %)",
    ]
    kd = TrainConfig.model_validate({"objective": {"name": "tfkd_self", "temperature": 2}})
    lines = list(arm_line("self", kd))
    assert "no label smoothing is within 2 %; the nearest, alpha " in lines[
        3
    ] and "% at 10)" in " ".join(lines)
    assert list(arm_line("plain", TrainConfig.model_validate({"objective": "ce"})))[1:] == [
        "  loss_scale 1",
        "  weight of CE 1",
    ]
