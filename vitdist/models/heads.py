"""Heads: from a backbone's tokens to one feature, and one row of logits, for each level of the class tree.

Every head starts as the linear one: what its attention adds ends in a projection that is zero at the start, so
`features` are the pooled feature itself, and classifiers found by a linear probe on that feature can be put in as
they are (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022). A zero projection learns from the
first step and what stands before it from the second, as in ReZero (Bachlechner et al., 2021).

Shapes: B batch, N tokens, D width of the pooled feature, T width of a token, L levels, C_l classes of level l.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from vitdist.errors import UsageError
from vitdist.models.backbone import Tokens
from vitdist.taxonomy import Taxonomy

HEADS = ("linear", "attention", "hierarchical")
DIRECTIONS = ("fine_to_coarse", "coarse_to_fine", "parallel")


class SelfAttention(nn.Module):
    """Tokens [B, N, T] to tokens: a pre-norm self-attention branch beside the tokens, then dropout."""

    def __init__(self, token_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(token_width)
        self.attention = Attention(token_width, num_heads=num_heads, qkv_bias=True)
        self.dropout = nn.Dropout(dropout)
        _zero(self.attention.proj)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.dropout(tokens + self.attention(self.norm(tokens)))
        return out


class AttentionPool(nn.Module):
    """Tokens [B, N, T] to [B, D]: one learned query attends to the normalised tokens; zero at the start.

    timm's AttentionPoolLatent with the query used as it is, and an output projection of our own.
    """

    def __init__(self, token_width: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(token_width)
        self.pool = AttentionPoolLatent(token_width, out_features=0, num_heads=num_heads, q_proj=False)
        self.project = nn.Linear(token_width, width)
        _zero(self.project)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.project(self.pool(self.norm(tokens)))
        return out


class Head(nn.Module):
    """The linear head: every level's classifier sees the pooled feature [B, D], after dropout."""

    def __init__(self, width: int, tree: Taxonomy, dropout: float = 0.0) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(nn.Linear(width, num_classes) for num_classes in tree.num_classes)
        self.dropout = nn.Dropout(dropout)
        for classifier in self.classifiers:
            nn.init.trunc_normal_(classifier.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """Logits [B, C_l] for each level, coarse to fine."""
        features = self.features(tokens)
        return tuple(classify(feature) for classify, feature in zip(self.classifiers, features, strict=True))

    def features(self, tokens: Tokens) -> list[Tensor]:
        """What each level's classifier sees, [B, D] a level, coarse to fine."""
        return [self.dropout(feature) for feature in self.levels(tokens)]

    def levels(self, tokens: Tokens) -> list[Tensor]:
        """Each level's feature before dropout."""
        return [tokens.pooled for _ in self.classifiers]

    def no_weight_decay(self) -> set[str]:
        """Names of the learned queries, which take no weight decay."""
        return {name for name, _ in self.named_parameters() if name.endswith(".latent")}


class AttentionHead(Head):
    """Self-attention over the tokens, then attention pooling (CoCa, Yu et al. 2022; timm's AttentionPoolLatent).

    tokens [B, N, T] -> `self_attention_blocks` x SelfAttention -> one query's AttentionPool [B, D], added to the pooled
    feature. All levels see that one feature. `dropout` follows each module.
    """

    def __init__(
        self,
        width: int,
        tree: Taxonomy,
        *,
        token_width: int,
        num_heads: int,
        dropout: float,
        self_attention_blocks: int,
    ) -> None:
        super().__init__(width, tree, dropout)
        self.blocks = nn.Sequential(
            *(SelfAttention(token_width, num_heads, dropout) for _ in range(self_attention_blocks))
        )
        self.pool = AttentionPool(token_width, width, num_heads)

    def levels(self, tokens: Tokens) -> list[Tensor]:
        feature = tokens.pooled + self.pool(self.blocks(tokens.tokens))
        return [feature for _ in self.classifiers]


class HierarchicalHead(Head):
    """One learned query for each level of the class tree, over regions that get finer with the level.

    The finest level attends to all N tokens; each level above it to tokens averaged over regions of twice the side
    (a 16x16 grid gives 16x16, 8x8, 4x4, 2x2: never below 2x2), since an order shows in the outline and a species in
    a mark of a few pixels. H-CAST (Park et al., ICLR 2025) grounds coarse levels on coarse segments likewise. What a
    level attended to [B, D] is added to what `direction` hands on:

    - `fine_to_coarse`: the next finer level's feature, with the gradient stopped; the finest takes the pooled feature.
      Coarse labels then train their own query but not the finer levels' features, which they would hurt, while fine
      features help coarse classes (FGN: Chang et al., "Your 'Flamingo' is My 'Bird'", CVPR 2021).
    - `coarse_to_fine`: the next coarser level's feature (never its answer: a species head that builds on the order's
      answer inherits its errors); the coarsest takes the pooled feature.
    - `parallel`: the pooled feature for every level.

    `self_attention_blocks` stand before it, as in `AttentionHead`; `dropout` follows each module.
    """

    def __init__(
        self,
        width: int,
        tree: Taxonomy,
        *,
        token_width: int,
        num_heads: int,
        dropout: float,
        self_attention_blocks: int,
        direction: str,
    ) -> None:
        super().__init__(width, tree, dropout)
        self.direction = direction
        self.blocks = nn.Sequential(
            *(SelfAttention(token_width, num_heads, dropout) for _ in range(self_attention_blocks))
        )
        self.pools = nn.ModuleList(AttentionPool(token_width, width, num_heads) for _ in tree.levels)

    def levels(self, tokens: Tokens) -> list[Tensor]:
        regions = pyramid(self.blocks(tokens.tokens), tokens.grid, len(self.pools))
        seen = [pool(region) for pool, region in zip(self.pools, regions, strict=True)]
        if self.direction == "parallel":
            return [tokens.pooled + own for own in seen]
        if self.direction == "coarse_to_fine":
            return _handed_on(tokens.pooled, seen, stop_gradient=False)
        return _handed_on(tokens.pooled, seen[::-1], stop_gradient=True)[::-1]


def _handed_on(pooled: Tensor, seen: list[Tensor], *, stop_gradient: bool) -> list[Tensor]:
    """Each level's feature is its own attention added to the level before it; the first builds on the pooled one."""
    features = [pooled + seen[0]]
    for own in seen[1:]:
        before = features[-1].detach() if stop_gradient else features[-1]
        features.append(before + own)
    return features


def pyramid(tokens: Tensor, grid: tuple[int, int], num_levels: int) -> list[Tensor]:
    """Tokens [B, N, T] of each level, coarse to fine: the last as they are, each before it on half the grid."""
    picture = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)
    levels = [tokens]
    for _ in range(num_levels - 1):
        # Not adaptive pooling: its gradient on CUDA is refused under deterministic algorithms.
        halves = [2 if side > 2 else 1 for side in picture.shape[2:]]
        picture = F.avg_pool2d(picture, halves, ceil_mode=True)
        levels.append(picture.flatten(2).transpose(1, 2))
    return levels[::-1]


def build_head(
    kind: str,
    width: int,
    tree: Taxonomy,
    *,
    token_width: int | None = None,
    direction: str = "fine_to_coarse",
    dropout: float = 0.0,
    num_heads: int | None = None,
    self_attention_blocks: int | None = None,
) -> Head:
    """A head by name, for pooled features of `width` and tokens of `token_width` (the same unless given).

    `num_heads` None: heads of about 64. `self_attention_blocks` None: 1 for `attention`, 0 for `hierarchical`.
    """
    token_width = token_width or width
    if kind not in HEADS or direction not in DIRECTIONS:
        raise UsageError(f"head {kind} with direction {direction}: heads are {HEADS}, directions {DIRECTIONS}")
    if kind == "linear":
        return Head(width, tree, dropout)
    heads = _checked_heads(num_heads, token_width)
    blocks = self_attention_blocks if self_attention_blocks is not None else int(kind == "attention")
    if kind == "attention":
        return AttentionHead(
            width, tree, token_width=token_width, num_heads=heads, dropout=dropout, self_attention_blocks=blocks
        )
    return HierarchicalHead(
        width, tree, token_width=token_width, num_heads=heads, dropout=dropout, self_attention_blocks=blocks,
        direction=direction,
    )  # fmt: skip


def _checked_heads(num_heads: int | None, token_width: int) -> int:
    divisors = [heads for heads in range(1, token_width + 1) if token_width % heads == 0]
    if num_heads is None:
        return min(divisors, key=lambda heads: abs(token_width / heads - 64))
    if num_heads not in divisors:
        known = ", ".join(str(heads) for heads in divisors if heads <= 64)
        raise UsageError(f"{num_heads} attention heads do not divide tokens of width {token_width}; these do: {known}")
    return num_heads


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
