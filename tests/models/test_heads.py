from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitdist.errors import UsageError
from vitdist.models.backbone import Tokens, ViTShape, build_backbone
from vitdist.models.classifier import Classifier
from vitdist.models.heads import DIRECTIONS, HEADS, Head, HierarchicalHead, build_head, pyramid
from vitdist.taxonomy import Taxonomy

TREE = Taxonomy(
    ("order", "family", "species"),
    (("a", "b"), ("p", "q", "r"), ("1", "2", "3", "4", "5")),
    ((-1, -1), (0, 0, 1), (0, 0, 1, 2, 2)),
)
WIDTH, GRID = 24, (8, 8)
EVERY_HEAD = [("linear", "parallel"), ("attention", "parallel"), *(("hierarchical", way) for way in DIRECTIONS)]


def tokens(*, requires_grad: bool = False) -> Tokens:
    torch.manual_seed(5)
    pooled, patches = torch.randn(4, WIDTH), torch.randn(4, GRID[0] * GRID[1], WIDTH)
    return Tokens(pooled.requires_grad_(requires_grad), patches.requires_grad_(requires_grad), GRID)


def head_of(kind: str, direction: str = "fine_to_coarse", *, awake: bool = False, **options: object) -> Head:
    """A head; `awake` with its zero projections drawn at random, as training leaves them."""
    torch.manual_seed(0)
    head = build_head(kind, WIDTH, TREE, direction=direction, num_heads=3, **options)  # type: ignore[arg-type]
    for parameter in head.parameters() if awake else ():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return head


@pytest.mark.parametrize(("kind", "direction"), EVERY_HEAD)
def test_every_head_starts_as_the_linear_one(kind: str, direction: str) -> None:
    """So a probe on the pooled feature can be put into its classifiers as it is."""
    head = head_of(kind, direction, self_attention_blocks=1).eval()
    given = tokens()
    features = head.features(given)
    assert len(features) == 3 and all(torch.equal(feature, given.pooled) for feature in features)
    weight, bias = torch.randn(5, WIDTH), torch.randn(5)
    with torch.no_grad():
        head.classifiers[2].weight.copy_(weight)
        head.classifiers[2].bias.copy_(bias)
        assert torch.equal(head(given)[2], nn.functional.linear(given.pooled, weight, bias))


def test_self_attention_starts_as_no_change() -> None:
    given = tokens().tokens
    assert torch.equal(head_of("attention", self_attention_blocks=2).eval().blocks(given), given)  # type: ignore[operator]


@pytest.mark.parametrize(("kind", "direction"), EVERY_HEAD)
def test_logits_come_coarse_to_fine_and_every_parameter_learns(kind: str, direction: str) -> None:
    """What stands before projections that began at zero learns too, after an update for each of them in a row."""
    head = head_of(kind, direction)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    targets = torch.tensor([[0, 0, 0], [0, 1, 2], [1, 2, 3], [1, 2, 4]])
    for _ in range(3):
        optimizer.zero_grad()
        logits = head(tokens())
        assert [tuple(scores.shape) for scores in logits] == [(4, 2), (4, 3), (4, 5)]
        losses = [nn.functional.cross_entropy(s, t) for s, t in zip(logits, targets.T, strict=True)]
        torch.stack(losses).sum().backward()
        assert all(parameter.grad is not None for parameter in head.parameters())
        optimizer.step()
    still = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def gradient_reaches(feature: Tensor, source: Tensor | nn.Parameter) -> bool:
    gradient = torch.autograd.grad(feature.sum(), source, retain_graph=True, allow_unused=True)[0]
    return gradient is not None and bool(gradient.any())


@pytest.mark.parametrize(
    ("direction", "depends", "learns"),
    [
        # Rows: the level's feature; columns: the level's attention. coarse, middle, fine.
        ("parallel", ["100", "010", "001"], ["100", "010", "001"]),
        ("coarse_to_fine", ["100", "110", "111"], ["100", "110", "111"]),
        ("fine_to_coarse", ["111", "011", "001"], ["100", "010", "001"]),
    ],
)
def test_direction_says_what_is_handed_on_and_where_the_gradient_stops(
    direction: str, depends: list[str], learns: list[str]
) -> None:
    """fine_to_coarse: coarse features use the finer ones, but coarse labels do not train them (FGN)."""
    head = head_of("hierarchical", direction, awake=True).eval()
    assert isinstance(head, HierarchicalHead)
    given = tokens(requires_grad=True)
    features = head.features(given)
    for level, (uses, trains) in enumerate(zip(depends, learns, strict=True)):
        for other, pool in enumerate(head.pools):
            bias = pool.project.bias
            assert gradient_reaches(features[level], bias) == (trains[other] == "1")
            before = bias.detach().clone()
            with torch.no_grad():
                bias.add_(1.0)
                changed = not torch.equal(head.features(given)[level], features[level])
                bias.copy_(before)
            assert changed == (uses[other] == "1")
    reaches = [gradient_reaches(feature, given.pooled) for feature in features]
    assert reaches == ([False, False, True] if direction == "fine_to_coarse" else [True, True, True])


def test_coarse_levels_still_train_the_backbone_through_their_own_attention() -> None:
    head = head_of("hierarchical", "fine_to_coarse", awake=True).eval()
    given = tokens(requires_grad=True)
    assert gradient_reaches(head.features(given)[0], given.tokens)


def test_finer_levels_see_finer_regions() -> None:
    """A change that keeps the mean of a 2x2 region shows to the finest level only; of a 4x4 region, to two of three."""
    head = head_of("hierarchical", "parallel", awake=True).eval()
    given = tokens()
    mark = torch.randn(WIDTH)
    for apart, same in ((1, [True, True, False]), (2, [True, False, False])):
        patches = given.tokens.clone()
        patches[:, 0] += mark
        patches[:, apart] -= mark
        with torch.no_grad():
            before, after = head.features(given), head.features(Tokens(given.pooled, patches, GRID))
        assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True)] == same


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((16, 16), [4, 16, 64, 256]), ((7, 7), [4, 4, 16, 49]), ((2, 2), [4, 4, 4, 4]), ((1, 9), [2, 3, 5, 9])],
)
def test_the_pyramid_halves_each_side_down_to_two(grid: tuple[int, int], expected: list[int]) -> None:
    count = grid[0] * grid[1]
    levels = pyramid(torch.randn(2, count, 3), grid, 4)
    assert [level.shape[1] for level in levels] == expected


def test_a_pyramid_cell_is_the_mean_of_its_region() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)
    assert pyramid(patches, (4, 4), 2)[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    ragged = torch.arange(9.0).reshape(1, 9, 1)  # a side of three: the last cells hold what is left
    assert pyramid(ragged, (3, 3), 2)[0].flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


def test_dropout_follows_each_module_in_training_only() -> None:
    """The original project's setting: self-attention, dropout 0.5, hierarchical attention, dropout 0.5."""
    head = head_of("hierarchical", dropout=0.5, self_attention_blocks=1)
    dropouts = [module for module in head.modules() if isinstance(module, nn.Dropout) and module.p == 0.5]
    assert len(dropouts) == 2
    ones = Tokens(torch.ones(64, WIDTH), torch.ones(64, 64, WIDTH), GRID)
    dropped = (torch.stack(head.train().features(ones)) == 0).float().mean().item()
    seen: list[Tensor] = []
    head.blocks.register_forward_hook(lambda module, given, out: seen.append(out))  # type: ignore[union-attr]
    head.features(ones)
    assert 0.45 < dropped < 0.55 and 0.45 < (seen[0] == 0).float().mean().item() < 0.55
    assert (torch.stack(head.eval().features(ones)) == 1).all()


def test_self_attention_blocks_default_to_one_for_attention_and_none_for_hierarchical() -> None:
    assert len(head_of("attention").blocks) == 1 and len(head_of("hierarchical").blocks) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", HEADS)
def test_tokens_may_be_of_another_width_than_the_pooled_feature(kind: str) -> None:
    head = build_head(kind, 10, TREE, token_width=WIDTH, num_heads=3, self_attention_blocks=1)
    out = head(Tokens(torch.randn(4, 10), torch.randn(4, 64, WIDTH), GRID))
    assert [scores.shape[1] for scores in out] == [2, 3, 5]


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="5 attention heads"):
        build_head("attention", WIDTH, TREE, num_heads=5)
    with pytest.raises(UsageError, match="hierarchical"):
        build_head("hierachical", WIDTH, TREE)
    with pytest.raises(UsageError, match="coarse_to_fine"):
        build_head("hierarchical", WIDTH, TREE, direction="upwards")


def test_the_global_seed_decides_the_start() -> None:
    first, second = head_of("hierarchical").state_dict(), head_of("hierarchical").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    other = build_head("hierarchical", WIDTH, TREE, num_heads=3).state_dict()
    assert not torch.equal(first["classifiers.2.weight"], other["classifiers.2.weight"])


def classifier(kind: str = "hierarchical") -> Classifier:
    torch.manual_seed(0)
    backbone = build_backbone("vit", image_size=32, vit=ViTShape(8, WIDTH, 2, 3, 2.0))
    return Classifier(backbone, build_head(kind, backbone.width, TREE, num_heads=3))


def test_a_classifier_answers_in_float32_whatever_it_computes_in() -> None:
    model = classifier().to(torch.bfloat16)
    logits = model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert all(scores.dtype == torch.float32 for scores in logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(scores.dtype == torch.float32 for scores in classifier()(torch.randn(2, 3, 32, 32)))


def test_a_classifier_names_queries_and_positions_as_undecayed_and_its_head_as_the_top_layer() -> None:
    model = classifier()
    names = {name for name, _ in model.named_parameters()}
    assert {"backbone.model.pos_embed", "head.pools.0.pool.latent"} <= model.no_weight_decay() & names
    layers = model.layer_ids()
    assert set(layers) == names and layers["head.pools.0.pool.latent"] == layers["head.classifiers.2.bias"] == 3


def test_a_classifier_compiles_in_one_graph() -> None:
    model = classifier().eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(images), model(images), strict=True))
