from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vitdist.errors import CheckpointError
from vitdist.training.ema import ModelEMA


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def move(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def values(ema: ModelEMA) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in ema.state_dict().values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_average_follows_its_formula() -> None:
    net = model()
    ema = ModelEMA(net, 0.9, warmup=False)
    wanted = net[0].weight.detach().clone()
    for seed in range(5):
        move(net, seed)
        ema.update(net)
        wanted = 0.9 * wanted + 0.1 * net[0].weight.detach()
    assert torch.allclose(ema.average["0.weight"], wanted, atol=1e-6)
    assert set(ema.average) == {name for name, t in net.state_dict().items() if t.is_floating_point()}


def test_warm_up_forgets_the_start_of_a_short_run() -> None:
    """With 0.9999 and none the start keeps 0.9999^n of it; warmed up, the product of t/(9 + t)."""
    kept = []
    for warmup in (False, True):
        net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(net.weight)
        ema = ModelEMA(net, 0.9999, warmup=warmup)
        nn.init.zeros_(net.weight)
        for _ in range(100):
            ema.update(net)
        kept.append(ema.average["weight"].item())
    assert kept[0] == pytest.approx(0.9999**100, rel=1e-4)
    assert kept[1] == pytest.approx(math.prod((1 + t) / (10 + t) for t in range(100)), rel=1e-3) and kept[1] < 1e-9


@pytest.mark.parametrize("warmup", [False, True])
def test_a_skipped_update_leaves_no_trace(warmup: bool) -> None:
    """Not in the average, not in the count, not even where a buffer of the model became NaN."""
    nets = [model(), model()]
    emas = [ModelEMA(net, 0.5, warmup=warmup) for net in nets]
    for seed in range(6):
        if seed % 2:
            before = values(emas[0])
            kept = nets[0][1].running_mean.clone()
            nets[0][1].running_mean.fill_(math.nan)
            emas[0].update(nets[0], torch.tensor(1.0))
            nets[0][1].running_mean.copy_(kept)
            assert equal(values(emas[0]), before)
            continue
        for net, ema in zip(nets, emas, strict=True):
            move(net, seed)
            ema.update(net, torch.tensor(0.0) if ema is emas[0] else None)
    assert equal(values(emas[0]), values(emas[1])) and emas[0].num_updates.item() == 3


def test_the_model_carries_the_average_inside_the_block_only() -> None:
    net = model()
    ema = ModelEMA(net, 0.5, warmup=False)
    move(net, 1)
    ema.update(net)
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.applied(net):
        assert all(torch.equal(net.state_dict()[name], average) for name, average in ema.average.items())
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in net.parameters()]


def test_warm_up_ends_at_the_decay() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    ema = ModelEMA(net, 0.2)
    nn.init.zeros_(net.weight)
    for _ in range(6):
        ema.update(net)
    assert ema.average["weight"].item() == pytest.approx(1 / 10 * 2 / 11 * 0.2**4, rel=1e-4)


def test_a_half_precision_model_is_averaged_in_float32_and_comes_back_exactly() -> None:
    net = model().to(torch.bfloat16)
    ema = ModelEMA(net, 0.999, warmup=False)
    start = ema.average["0.weight"].clone()
    move(net, 1)
    ema.update(net)
    change = (ema.average["0.weight"] - start).abs().max().item()
    assert ema.average["0.weight"].dtype == torch.float32 and 0 < change < 0.01
    own = net[0].weight.detach().clone()
    with ema.applied(net):
        assert net[0].weight.dtype == torch.bfloat16 and not torch.equal(net[0].weight, own)
    assert torch.equal(net[0].weight, own)


def test_an_average_goes_on_after_a_round_trip_as_if_nothing_had_been() -> None:
    net = model()
    ema = ModelEMA(net, 0.9)
    for seed in range(3):
        move(net, seed)
        ema.update(net)
    other = ModelEMA(model(7), 0.9)
    other.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
    move(net, 9)
    for each in (ema, other):
        each.update(net)
    assert equal(values(ema), values(other)) and ema.num_updates.item() == 4


def test_an_average_of_another_model_is_refused() -> None:
    ema = ModelEMA(model(), 0.9)
    with pytest.raises(CheckpointError, match="another model"):
        ema.load_state_dict(ModelEMA(nn.Linear(3, 4), 0.9).state_dict())
    state = ema.state_dict() | {"0.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="0.weight has another shape"):
        ema.load_state_dict(state)


def test_many_tensors_are_all_averaged() -> None:
    """More than are moved at once."""
    net = nn.ModuleList(nn.Linear(1, 1) for _ in range(100))
    ema = ModelEMA(net, 0.0, warmup=False)
    move(net, 1)
    ema.update(net)
    assert all(torch.allclose(average, net.state_dict()[name], atol=1e-6) for name, average in ema.average.items())
