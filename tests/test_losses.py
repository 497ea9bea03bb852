from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitdist.losses import denominators_of, hierarchical_loss, regularisation

CLASSES = (3, 5, 7)


def batch(num_samples: int = 12, *, unknown: bool = True) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    logits = [torch.randn(num_samples, count, requires_grad=True) for count in CLASSES]
    targets = torch.stack([torch.randint(count, (num_samples,)) for count in CLASSES], dim=1)
    if unknown:
        targets[::3, 2] = -1
        targets[5] = -1
    return logits, targets


def weights() -> list[Tensor | None]:
    return [None, torch.rand(5) + 0.5, torch.rand(7) + 0.5]


def mixing(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and partners in pairs (2i, 2i + 1), as the plan gives them."""
    partners = targets.reshape(-1, 2, targets.shape[1]).flip(1).reshape(targets.shape)
    return torch.rand(len(targets) // 2).repeat_interleave(2), partners


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_level_is_torch_s_weighted_mean_over_the_known(smoothing: float) -> None:
    logits, targets = batch()
    for level, count in enumerate(CLASSES):
        per_class = torch.rand(count) + 0.5
        one = targets[:, [level]]
        ours = hierarchical_loss(
            [logits[level]], one, label_smoothing=smoothing, class_weights=[per_class],
            denominators=denominators_of(one, class_weights=[per_class]),
        )  # fmt: skip
        theirs = F.cross_entropy(logits[level], one[:, 0], per_class, ignore_index=-1, label_smoothing=smoothing)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_levels_are_summed_by_their_weights() -> None:
    logits, targets = batch()
    denominators = denominators_of(targets)
    each = [
        hierarchical_loss([scores], targets[:, [level]], denominators=denominators[[level]])
        for level, scores in enumerate(logits)
    ]
    together = hierarchical_loss(logits, targets, denominators=denominators, level_weights=(0.5, 0.0, 2.0))
    assert together.item() == pytest.approx((0.5 * each[0] + 2.0 * each[2]).item(), rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_add_up_to_the_global_batch(mixed: bool, weighted: bool) -> None:
    """Losses and gradients, though unknown labels and class weights are spread unevenly; a mean of means is not it."""
    logits, targets = batch()
    lam, partners = mixing(targets) if mixed else (None, None)
    per_class = weights() if weighted else None
    denominators = denominators_of(targets, lam=lam, partner_targets=partners, class_weights=per_class)

    def part(a: int, b: int) -> Tensor:
        return hierarchical_loss(
            [scores[a:b] for scores in logits],
            targets[a:b],
            lam=None if lam is None else lam[a:b],
            partner_targets=None if partners is None else partners[a:b],
            level_weights=(1.0, 0.5, 0.25),
            label_smoothing=0.1,
            class_weights=per_class,
            denominators=denominators,
        )

    whole = part(0, 12)
    wanted = torch.autograd.grad(whole, logits)
    pieces = [part(0, 2), part(2, 8), part(8, 12)]
    assert sum(piece.item() for piece in pieces) == pytest.approx(whole.item(), rel=1e-6)
    got = torch.autograd.grad(torch.stack(pieces).sum(), logits)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(got, wanted, strict=True))


def test_mixing_is_the_cross_entropy_against_the_mixed_label() -> None:
    logits, targets = batch(unknown=False)
    lam, partners = mixing(targets)
    ours = hierarchical_loss(logits, targets, lam=lam, partner_targets=partners, denominators=[12.0] * 3)
    soft = [
        lam[:, None] * F.one_hot(targets[:, level], count) + (1 - lam)[:, None] * F.one_hot(partners[:, level], count)
        for level, count in enumerate(CLASSES)
    ]
    theirs = sum(F.cross_entropy(scores, label).item() for scores, label in zip(logits, soft, strict=True))
    assert ours.item() == pytest.approx(theirs, rel=1e-6)


def test_an_unknown_label_has_no_gradient_and_no_place_in_the_denominator() -> None:
    logits, targets = batch()
    loss = hierarchical_loss(logits, targets, denominators=denominators_of(targets), label_smoothing=0.2)
    gradients = torch.autograd.grad(loss, logits)
    for level, gradient in enumerate(gradients):
        assert ((gradient == 0).all(dim=1) == (targets[:, level] == -1)).all()
    assert denominators_of(targets).tolist() == [11.0, 11.0, 7.0]


def test_a_partner_that_is_unknown_adds_nothing_but_the_own_label_stays() -> None:
    logits, targets = batch(num_samples=2, unknown=False)
    targets[1, 2] = -1
    lam, partners = torch.tensor([0.75, 0.75]), targets.flip(0)
    assert denominators_of(targets, lam=lam, partner_targets=partners).tolist() == [2.0, 2.0, 1.0]
    loss = hierarchical_loss(
        logits[2:], targets[:, 2:], lam=lam, partner_targets=partners[:, 2:], denominators=[1.0]
    )  # fmt: skip
    label = targets[:1, 2]
    wanted = 0.75 * F.cross_entropy(logits[2][:1], label) + 0.25 * F.cross_entropy(logits[2][1:], label)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_level_known_of_no_sample_adds_zero() -> None:
    logits, targets = batch()
    targets[:, 1] = -1
    for denominators in (denominators_of(targets), denominators_of(targets).tolist()):
        loss = hierarchical_loss(logits, targets, denominators=denominators)
        assert torch.isfinite(loss)
    assert not torch.autograd.grad(loss, logits[1])[0].any()


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, targets = batch(unknown=False)
    half = [scores.to(torch.bfloat16) for scores in logits]
    loss = hierarchical_loss(half, targets, denominators=[12.0] * 3)
    exact = hierarchical_loss([scores.float() for scores in half], targets, denominators=[12.0] * 3)
    assert loss.dtype == torch.float32 and loss.item() == exact.item()


def test_the_loss_compiles_in_one_graph() -> None:
    """A graph break would be where it waits for the device."""
    logits, targets = batch()
    denominators = denominators_of(targets)
    compiled = torch.compile(hierarchical_loss, backend="eager", fullgraph=True)
    assert compiled(logits, targets, denominators=denominators).item() == pytest.approx(
        hierarchical_loss(logits, targets, denominators=denominators).item()
    )


def test_regularisation_counts_trained_parameters_only() -> None:
    first = torch.tensor([1.0, -2.0], requires_grad=True)
    second, frozen = torch.tensor([[0.0], [3.0]], requires_grad=True), torch.ones(5)
    total = regularisation([first, second, frozen], l1=0.1, l2=0.01)
    assert isinstance(total, Tensor) and total.item() == pytest.approx(0.1 * 6 + 0.01 * 14)
    total.backward()
    assert first.grad is not None and first.grad.tolist() == pytest.approx([0.1 + 0.02, -0.1 - 0.04])
    assert second.grad is not None and second.grad[0].item() == 0.0
    assert regularisation([first], l1=0.0, l2=0.0) == 0.0
