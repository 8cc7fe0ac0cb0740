"""Each objective against its definition, its limits, and the authors' release."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OBJECTIVES
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tfkd_ray.learn.objectives import (
    CrossEntropy,
    DecoupledKD,
    Dist,
    KnowledgeDistillation,
    LabelSmoothing,
    StandardisedKD,
    TfkdReg,
    TfkdRegCode,
    TfkdSelf,
    flat_kl,
    from_released,
    softened_kl,
)
from tfkd_ray.settings.errors import ConfigError

Batch = tuple[Tensor, Tensor, Tensor]


def make_batch(K: int = 10, B: int = 7, scale: float = 3.0, seed: int = 0) -> Batch:
    """Return (student logits [B, K], labels [B], teacher logits [B, K]) in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, generator=g, dtype=torch.float64) * scale
    teacher = torch.randn(B, K, generator=g, dtype=torch.float64) * scale
    return logits, torch.randint(K, (B,), generator=g), teacher


@pytest.fixture
def batch() -> Batch:
    return make_batch()


# --- slow definitions: loops over images and classes, in float64


def softmax(row: list[float], T: float = 1.0) -> list[float]:
    top = max(row)
    e = [math.exp((z - top) / T) for z in row]
    return [v / sum(e) for v in e]


def slow_loss(
    logits: Tensor,
    labels: Tensor,
    targets: list[list[float]],
    alpha: float,
    T: float,
    factor: float,
) -> float:
    """Compute (1 - alpha) CE + alpha * factor * KL(target || softmax(z / T)), batch means."""
    total = 0.0
    for z, c, q in zip(logits.tolist(), labels.tolist(), targets, strict=True):
        p = softmax(z, T)
        kl = sum(q[k] * math.log(q[k] / p[k]) for k in range(len(z)) if q[k] > 0)
        total += (1 - alpha) * -math.log(softmax(z)[c]) + alpha * factor * kl
    return total / len(labels)


def virtual(labels: Tensor, K: int, a: float) -> list[list[float]]:
    return [[a if k == c else (1 - a) / (K - 1) for k in range(K)] for c in labels.tolist()]


def test_ce_is_its_definition(batch: Batch) -> None:
    logits, labels, _ = batch
    slow = slow_loss(logits, labels, virtual(labels, 10, 0.5), 0.0, 1.0, 1.0)
    assert CrossEntropy()(logits, labels).item() == pytest.approx(slow, abs=1e-12)


def test_lsr_is_its_definition_less_a_constant(batch: Batch) -> None:
    logits, labels, _ = batch
    slow = slow_loss(logits, labels, [[0.1] * 10] * 7, 0.3, 1.0, 1.0)
    assert LabelSmoothing(alpha=0.3)(logits, labels).item() == pytest.approx(slow, abs=1e-12)
    torchs = F.cross_entropy(logits, labels, label_smoothing=0.3) - 0.3 * math.log(10)
    assert LabelSmoothing(alpha=0.3)(logits, labels).item() == pytest.approx(
        torchs.item(), abs=1e-12
    )


@pytest.mark.parametrize("objective", [KnowledgeDistillation, TfkdSelf])
@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_kd_is_its_definition(
    batch: Batch, objective: type[KnowledgeDistillation], T: float
) -> None:
    logits, labels, teacher = batch
    slow = slow_loss(logits, labels, [softmax(z, T) for z in teacher.tolist()], 0.7, T, T * T)
    assert objective(alpha=0.7, temperature=T)(logits, labels, teacher).item() == pytest.approx(
        slow, abs=1e-10
    )


@pytest.mark.parametrize("K", [2, 10, 100])
@pytest.mark.parametrize("T", [1.0, 3.0, 20.0])
@pytest.mark.parametrize("a", [0.9, 0.99, 0.999])
def test_tfkd_reg_is_equation_9_with_t_squared(K: int, T: float, a: float) -> None:
    logits, labels, _ = make_batch(K)
    targets = [softmax([math.log(p) for p in row], T) for row in virtual(labels, K, a)]
    slow = slow_loss(logits, labels, targets, 0.4, T, T * T)
    loss = TfkdReg(alpha=0.4, temperature=T, correct_prob=a)(logits, labels)
    assert loss.item() == pytest.approx(slow, rel=1e-10)


@pytest.mark.parametrize("T", [1.0, 20.0])
def test_tfkd_reg_code_is_what_was_released(batch: Batch, T: float) -> None:
    logits, labels, _ = batch
    targets = [
        softmax(row, T) for row in virtual(labels, 10, 0.99)
    ]  # a temperature on probabilities
    slow = slow_loss(logits, labels, targets, 0.4, 1.0, 1.0)
    assert TfkdRegCode(alpha=0.4, temperature=T)(logits, labels).item() == pytest.approx(
        slow, abs=1e-12
    )


# --- limits and identities

every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
WITH_ALPHA = [o for o in OBJECTIVES if hasattr(o, "alpha")]
WITH_TEMPERATURE = [o for o in WITH_ALPHA if hasattr(o, "temperature")]
TAUGHT = [o for o in OBJECTIVES if o.needs_teacher]


@pytest.mark.parametrize("objective", WITH_ALPHA, ids=lambda o: o.name)
def test_alpha_0_is_plain_training(batch: Batch, objective: LabelSmoothing) -> None:
    logits, labels, teacher = batch
    zero = objective.model_copy(update={"alpha": 0.0})
    assert zero(logits, labels, teacher).item() == pytest.approx(
        F.cross_entropy(logits, labels).item(), abs=1e-12
    )


@every_objective
def test_loss_scale_multiplies_the_whole_loss(batch: Batch, objective: CrossEntropy) -> None:
    logits, labels, teacher = batch
    scaled = objective.model_copy(update={"loss_scale": 0.25})
    assert scaled(logits, labels, teacher).item() == pytest.approx(
        0.25 * objective(logits, labels, teacher).item()
    )


def test_kl_is_zero_when_student_equals_teacher(batch: Batch) -> None:
    logits, _, _ = batch
    assert softened_kl(logits, logits, 4.0).abs() < 1e-12


@pytest.mark.parametrize("gap", [0.0, 2.0, 700.0, 5000.0])
def test_flat_kl_is_finite_and_zero_on_its_own_target(gap: float) -> None:
    labels = torch.tensor([1, 0])
    logits = torch.zeros(2, 5, dtype=torch.float64).scatter(1, labels[:, None], gap)
    assert flat_kl(logits, labels, gap, 1.0).abs() < 1e-12


@pytest.mark.parametrize(
    "objective", [KnowledgeDistillation(alpha=1.0), TfkdSelf(alpha=1.0)], ids=["kd", "tfkd_self"]
)
@pytest.mark.parametrize("m", [2, 5])
def test_replicating_every_class_leaves_the_kd_term_unchanged(
    batch: Batch, objective: KnowledgeDistillation, m: int
) -> None:
    logits, labels, teacher = batch
    wide = [z.repeat_interleave(m, dim=1) for z in (logits, teacher)]
    before, after = (
        objective.terms(logits, labels, teacher),
        objective.terms(wide[0], labels * m, wide[1]),
    )
    assert before.kd is not None and after.kd is not None
    assert after.kd.item() == pytest.approx(before.kd.item(), abs=1e-12)


def test_the_gradient_keeps_its_size_at_high_temperature() -> None:
    logits, labels, teacher = make_batch(K=100, B=64)
    sizes = []
    for T in (20.0, 40.0, 80.0):
        z = logits.clone().requires_grad_()
        KnowledgeDistillation(alpha=1.0, temperature=T)(z, labels, teacher).backward()
        assert z.grad is not None
        sizes.append(z.grad.norm().item())
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("a, T", [(0.1, 1.0), (0.1, 5.0)])
def test_a_uniform_virtual_teacher_is_label_smoothing(batch: Batch, a: float, T: float) -> None:
    logits, labels, _ = batch
    if T == 1.0:
        lsr = LabelSmoothing(alpha=0.3)(logits, labels)
        assert TfkdReg(alpha=0.3, temperature=T, correct_prob=a)(
            logits, labels
        ).item() == pytest.approx(lsr.item())
    kd = TfkdReg(alpha=0.3, temperature=T, correct_prob=a)(logits, labels)
    uniform = KnowledgeDistillation(alpha=0.3, temperature=T)(
        logits, labels, torch.zeros_like(logits)
    )
    assert kd.item() == pytest.approx(uniform.item(), abs=1e-10)


@pytest.mark.parametrize("K", [10, 100, 1000])
@pytest.mark.parametrize("T", [1.0, 6.0, 20.0, 40.0])
@pytest.mark.parametrize("a", [0.5, 0.9, 0.99, 1.0])
def test_tfkd_reg_code_is_scaled_label_smoothing_plus_a_constant(
    K: int, T: float, a: float
) -> None:
    code = TfkdRegCode(alpha=0.37, temperature=T, correct_prob=a, loss_scale=0.0595)
    lsr = code.as_label_smoothing(K)
    gaps, slopes = [], []
    for seed, scale in enumerate((1.0, 5.0, 10.0)):
        logits, labels, _ = make_batch(K, scale=scale, seed=seed)
        z = logits.clone().requires_grad_()
        gap = code(z, labels) - lsr(z, labels)
        gap.backward()
        assert z.grad is not None
        gaps.append(gap.item())
        slopes.append(z.grad.abs().max().item())
    assert max(gaps) - min(gaps) < 1e-12
    assert max(slopes) < 1e-12


def test_the_released_label_smoothing_is_ours_with_a_larger_alpha(batch: Batch) -> None:
    logits, labels, _ = batch
    K, released = 10, 0.1
    targets = torch.full_like(logits, released / (K - 1)).scatter(1, labels[:, None], 1 - released)
    theirs = -(targets * F.log_softmax(logits, 1)).sum(1).mean()
    alpha = released * K / (K - 1)
    ours = LabelSmoothing(alpha=alpha)(logits, labels) + alpha * math.log(K)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


# --- the authors' release, written out (commit d000ab3), against the converter


def released_kd(z: Tensor, y: Tensor, t: Tensor, alpha: float, T: float, m: float) -> Tensor:
    kl = F.kl_div(
        F.log_softmax(z / T, 1), F.softmax(t / T, 1), reduction="none"
    ).mean()  # over B * K
    return (1 - alpha) * F.cross_entropy(z, y) + alpha * T * T * m * kl


def released_reg(z: Tensor, y: Tensor, alpha: float, T: float, m: float) -> Tensor:
    K = z.shape[1]
    p = torch.full_like(z, 0.01 / (K - 1)).scatter(1, y[:, None], 0.99)
    kl = F.kl_div(F.log_softmax(z, 1), F.softmax(p / T, 1), reduction="none").mean()
    return (1 - alpha) * F.cross_entropy(z, y) + alpha * m * kl


KD_SETTINGS = [
    ("kd", 0.95, 20.0, 1),
    ("kd", 0.6, 20.0, 1),
    ("tfkd_self", 0.95, 6.0, 50),
    ("tfkd_self", 0.9, 20.0, 100),
]
REG_SETTINGS = [(0.1, 20.0, 100), (0.95, 40.0, 1), (0.95, 10.0, 1), (0.1, 40.0, 50)]


@pytest.mark.parametrize("name, alpha, T, m", KD_SETTINGS)
def test_converted_kd_settings_equal_the_release(
    name: str, alpha: float, T: float, m: float
) -> None:
    z, y, t = make_batch(100)
    ours = from_released(name, alpha=alpha, temperature=T, multiplier=m, num_classes=100)  # type: ignore[arg-type]
    assert ours(z, y, t).item() == pytest.approx(released_kd(z, y, t, alpha, T, m).item(), rel=1e-6)


@pytest.mark.parametrize("alpha, T, m", REG_SETTINGS)
def test_converted_reg_settings_equal_the_release(alpha: float, T: float, m: float) -> None:
    z, y, _ = make_batch(100)
    ours = from_released("tfkd_reg", alpha=alpha, temperature=T, multiplier=m, num_classes=100)
    assert ours(z, y).item() == pytest.approx(released_reg(z, y, alpha, T, m).item(), rel=1e-6)


def test_the_converter_gives_the_table_of_effective_weights() -> None:
    ours = from_released("tfkd_self", alpha=0.95, temperature=6, multiplier=50, num_classes=100)
    assert (ours.loss_scale, ours.alpha) == (pytest.approx(0.525), pytest.approx(0.9048, abs=1e-4))
    reg = from_released("tfkd_reg", alpha=0.95, temperature=40, num_classes=100)
    assert isinstance(reg, TfkdRegCode)
    lsr = reg.as_label_smoothing(100)
    assert (lsr.loss_scale, lsr.alpha) == (pytest.approx(0.0595), pytest.approx(0.1597, abs=1e-3))


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 1.5}, {"temperature": 0}, {"num_classes": 0}, {"multiplier": -1}],
    ids=lambda w: next(iter(w)),
)
def test_a_released_setting_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    (name, value), setting = (
        next(iter(wrong.items())),
        {"alpha": 0.5, "temperature": 4, "num_classes": 10, **wrong},
    )
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        from_released("kd", **setting)  # type: ignore[arg-type]


# --- follow-ups, against their published formulas in slow loops


def test_dkd_is_its_definition(batch: Batch) -> None:
    logits, labels, teacher = batch
    T, target, nontarget = 4.0, 0.0, 0.0
    for z, t, c in zip(logits.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = softmax(z, T), softmax(t, T)
        target += q[c] * math.log(q[c] / p[c]) + (1 - q[c]) * math.log((1 - q[c]) / (1 - p[c]))
        others = [k for k in range(10) if k != c]
        for k in others:
            nontarget += q[k] / (1 - q[c]) * math.log((q[k] / (1 - q[c])) / (p[k] / (1 - p[c])))
    slow = (1 - 0.3) * F.cross_entropy(logits, labels).item() + 0.3 * T * T * (
        2 * target + 5 * nontarget
    ) / 7
    objective = DecoupledKD(alpha=0.3, temperature=T, target_weight=2, nontarget_weight=5)
    assert objective(logits, labels, teacher).item() == pytest.approx(slow, rel=1e-10)


def test_dkd_with_the_weights_that_kd_implies_is_kd() -> None:
    """KD = TCKD + (1 - p^t(label)) NCKD (Eq. 6 there): for one image this gives the weights."""
    logits, labels, teacher = make_batch(B=1)
    rest = 1 - softmax(teacher[0].tolist(), 4.0)[int(labels[0])]
    dkd = DecoupledKD(alpha=0.5, temperature=4.0, target_weight=1, nontarget_weight=rest)
    kd = KnowledgeDistillation(alpha=0.5, temperature=4.0)
    assert dkd(logits, labels, teacher).item() == pytest.approx(
        kd(logits, labels, teacher).item(), rel=1e-12
    )


def pearson(a: list[float], b: list[float]) -> float:
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def test_dist_is_its_definition(batch: Batch) -> None:
    logits, labels, teacher = batch
    T = 2.0
    p, q = [softmax(z, T) for z in logits.tolist()], [softmax(t, T) for t in teacher.tolist()]
    inter = sum(1 - pearson(a, b) for a, b in zip(p, q, strict=True)) / 7
    intra = sum(1 - pearson([r[k] for r in p], [r[k] for r in q]) for k in range(10)) / 10
    slow = 0.5 * F.cross_entropy(logits, labels).item() + 0.5 * T * T * (3 * inter + 2 * intra)
    objective = Dist(alpha=0.5, temperature=T, inter_weight=3, intra_weight=2)
    assert objective(logits, labels, teacher).item() == pytest.approx(slow, rel=1e-6)


def test_dist_does_not_see_a_shift_or_a_scale_of_the_probabilities(batch: Batch) -> None:
    logits, labels, _ = batch
    terms = Dist().terms(logits, labels, logits + 5)
    assert terms.kd is not None and terms.kd.abs() < 1e-12


def test_standardised_kd_is_its_definition(batch: Batch) -> None:
    logits, labels, teacher = batch

    def standardised(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))
        return [(z - mean) / (deviation + 1e-7) for z in row]

    soft = [standardised(z) for z in logits.tolist()]
    targets = [softmax(standardised(t), 2.0) for t in teacher.tolist()]
    kl = slow_loss(torch.tensor(soft, dtype=torch.float64), labels, targets, 1.0, 2.0, 4.0)
    slow = 0.1 * F.cross_entropy(logits, labels).item() + 0.9 * kl
    assert StandardisedKD(alpha=0.9, temperature=2.0)(
        logits, labels, teacher
    ).item() == pytest.approx(slow, rel=1e-10)


def test_standardised_kd_does_not_see_the_scale_of_the_logits(batch: Batch) -> None:
    logits, labels, teacher = batch
    a, b = (
        StandardisedKD().terms(logits, labels, teacher),
        StandardisedKD().terms(logits, labels, 7 * teacher + 3),
    )
    assert (
        a.kd is not None
        and b.kd is not None
        and a.kd.item() == pytest.approx(b.kd.item(), rel=1e-6)
    )


@pytest.mark.parametrize(
    "objective", [StandardisedKD(), Dist(), StandardisedKD(alpha=1), Dist(alpha=1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 3.3, -1e4])
@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-4])
def test_the_gradient_is_bounded_where_the_logits_are_equal(
    objective: StandardisedKD | Dist, dtype: torch.dtype, level: float, noise: float
) -> None:
    """For a head that starts at zero. 10 / B leaves a margin: usual logits get 1 / B."""
    torch.manual_seed(0)
    logits = (level + noise * torch.randn(8, 10)).to(dtype).requires_grad_()
    teacher = 4 * torch.randn(8, 10)
    for target in (teacher, torch.zeros(8, 10)):
        loss = objective(logits, torch.arange(8), target)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.abs().max() < 10 / 8
    if not level and not noise:
        (gradient,) = torch.autograd.grad(objective(logits, torch.arange(8), teacher), logits)
        assert gradient.abs().max() > 0.1 / 8, "and it learns from the teacher"


def test_usual_students_do_not_meet_the_bound(batch: Batch) -> None:
    """The correlation is torch's own, for logits with a deviation of 0.5."""
    logits, labels, teacher = batch
    p, q = (0.5 * z / z.std(dim=1, keepdim=True) for z in (logits, teacher))
    a, b = (F.softmax(z, dim=1) for z in (p, q))
    rows, columns = (
        (x - x.mean(dim=d, keepdim=True), y - y.mean(dim=d, keepdim=True))
        for x, y, d in ((a, b, 1), (a, b, 0))
    )
    wanted = (
        2 - F.cosine_similarity(*rows, dim=1).mean() - F.cosine_similarity(*columns, dim=0).mean()
    )
    found = Dist().terms(p, labels, q).kd
    assert found is not None and found.item() == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("objective", [type(o) for o in WITH_TEMPERATURE])
def test_the_gradient_is_right_in_float32_up_to_the_highest_temperature(
    objective: type[KnowledgeDistillation],
) -> None:
    torch.manual_seed(0)
    logits, teacher, labels = (
        3 * torch.randn(32, 1000),
        5 * torch.randn(32, 1000),
        torch.randint(1000, (32,)),
    )
    with pytest.raises(ConfigError, match="should be at most 10000"):
        objective(temperature=10001)
    highest = objective(alpha=1, temperature=1e4)
    found = []
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype).requires_grad_()
        found += torch.autograd.grad(highest(z, labels, teacher.to(dtype)), z)
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


# --- shapes, gradients, precision


@every_objective
def test_no_gradient_reaches_the_teacher_and_the_loss_is_a_scalar(
    batch: Batch, objective: CrossEntropy
) -> None:
    logits, labels, teacher = batch
    z = logits.clone().requires_grad_()
    loss = objective(z, labels, teacher.detach())
    loss.backward()
    assert loss.shape == () and z.grad is not None and z.grad.isfinite().all()


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_give_finite_losses(objective: CrossEntropy, dtype: torch.dtype) -> None:
    logits = (
        torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 0.0], [60.0, 60.0, -60.0]])
        .to(dtype)
        .requires_grad_()
    )
    loss = objective(logits, torch.tensor([1, 2, 0]), logits.detach().flip(1))
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("objective", TAUGHT, ids=lambda o: o.name)
def test_an_objective_without_its_teacher_says_what_it_needs(
    batch: Batch, objective: KnowledgeDistillation
) -> None:
    logits, labels, _ = batch
    with pytest.raises(ValueError, match=f"^objective {objective.name}: needs the teacher's"):
        objective(logits, labels)


# --- on a GPU, without one


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_no_loss_waits_for_the_device(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values, so whatever asks for one raises an error, as a mask would."""
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda *device: None)
    with FakeTensorMode():
        logits = torch.empty(6, 5, device="cuda:0", requires_grad=True)
        labels = torch.empty(6, dtype=torch.int64, device="cuda:0")
        loss = objective(logits, labels, torch.empty(6, 5, device="cuda:0"))
        assert loss.shape == () and loss.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            float(loss)
