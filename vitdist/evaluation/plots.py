"""Charts as inline SVG: coloured by CSS variables of the page, so that they follow light and dark, without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_POINTS = 600  # of one drawn line; more are averaged in buckets
_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 34


@dataclass(frozen=True)
class Series:
    """One line of a chart; a value that is not finite leaves a gap. `color` is a number of the palette (1-4)."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 1
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    y_format: Callable[[float], str] = lambda value: f"{value:g}",
    from_zero: bool = False,
) -> str:
    """An SVG of some lines over one axis; an empty text when no series has a finite point."""
    drawn = [(line, *_finite(line)) for line in series]
    drawn = [(line, x, y) for line, x, y in drawn if np.isfinite(y).any()]
    if not drawn:
        return ""
    xs = np.concatenate([x for _, x, _ in drawn])
    ys = np.concatenate([y[np.isfinite(y)] for _, _, y in drawn])
    x_ticks = nice_ticks(float(xs.min()), float(xs.max()), 6)
    y_ticks = nice_ticks(0.0 if from_zero else float(ys.min()), float(ys.max()), 5)
    to_x = _Scale(*_span(float(xs.min()), float(xs.max())), _LEFT, _WIDTH - _RIGHT)
    to_y = _Scale(*_span(min(y_ticks[0], float(ys.min())), max(y_ticks[-1], float(ys.max()))), _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += [_y_tick(to_y(tick), y_format(tick)) for tick in y_ticks]
    parts += [_x_tick(to_x(tick), f"{tick:,.0f}" if tick >= 10 else f"{tick:g}") for tick in x_ticks]
    parts.append(
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    for line, x, y in drawn:
        parts.append(_line(line, x, y, to_x, to_y, y_format))
    return "".join(parts) + "</svg>" + _legend([line for line, _, _ in drawn if line.name])


def smoothed(values: Sequence[float | None], keep: float) -> list[float | None]:
    """The running average without its bias to the start; gaps stay gaps."""
    average, weight = 0.0, 0.0
    result: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            result.append(None)
            continue
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers within low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def heat_map(matrix: np.ndarray, names: Sequence[str], *, label: str) -> str:
    """Rows are true classes, columns answers; a cell is as strong as its share of the row."""
    size = len(names)
    cell = max(9, min(34, 560 // size))
    margin = 8 + round(6.2 * min(22, max(len(name) for name in names)))
    width = margin + cell * size + 8
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    parts = [f'<svg class="heat" viewBox="0 0 {width} {width}" style="max-width:{width}px" role="img"']
    parts.append(f' aria-label="{escape(label)}">')
    for i, name in enumerate(names):
        middle, text = margin + cell * i + cell / 2, escape(_short(name))
        parts.append(f'<text class="axis" x="{margin - 5}" y="{middle + 3:.1f}" text-anchor="end">{text}</text>')
        turned = f"translate({middle + 3:.1f} {margin - 5}) rotate(-90)"
        parts.append(f'<text class="axis" transform="{turned}">{text}</text>')
    side = cell * size
    parts.append(f'<rect class="frame" x="{margin}" y="{margin}" width="{side}" height="{side}"/>')
    for i, j in zip(*np.nonzero(matrix), strict=True):
        title = f"{names[i]} called {names[j]}: {matrix[i, j]} of {matrix[i].sum()}"
        place = f'x="{margin + cell * j}" y="{margin + cell * i}" width="{cell - 1}" height="{cell - 1}"'
        kind = "right" if i == j else "wrong"
        parts.append(
            f'<rect class="{kind}" {place} fill-opacity="{max(0.25, shares[i, j]):.2f}">'
            f"<title>{escape(title)}</title></rect>"
        )
    return "".join(parts) + "</svg>"


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _finite(line: Series) -> tuple[np.ndarray, np.ndarray]:
    """The points as arrays, long lines as means of buckets of neighbouring points."""
    x = np.asarray(line.x, dtype=np.float64)
    y = np.asarray([math.nan if value is None else value for value in line.y], dtype=np.float64)
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
    pairs = [(x[a:b], y[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    means = [values[np.isfinite(values)].mean() if np.isfinite(values).any() else math.nan for _, values in pairs]
    return np.array([places.mean() for places, _ in pairs]), np.array(means)


def _span(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    around = abs(low) * 0.1 or 1.0
    return low - around, high + around


def _y_tick(y: float, text: str) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + f'<text class="axis" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'


def _x_tick(x: float, text: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'


def _line(
    line: Series, x: np.ndarray, y: np.ndarray, to_x: _Scale, to_y: _Scale, y_format: Callable[[float], str]
) -> str:
    look = f"line c{line.color}" + (" faint" if line.faint else "")
    parts, run = [], []
    for place, value in [*zip(x, y, strict=True), (math.nan, math.nan)]:
        if math.isfinite(value):
            run.append(f"{to_x(place):.1f},{to_y(value):.1f}")
        elif run:
            parts.append(f'<polyline class="{look}" points="{" ".join(run)}"/>')
            run = []
    if line.dots and len(x) <= 100:
        for place, value in zip(x, y, strict=True):
            if math.isfinite(value):
                title = f"{line.name}: {y_format(value)} at step {place:,.0f}"
                dot = f'<circle class="dot f{line.color}" cx="{to_x(place):.1f}" cy="{to_y(value):.1f}" r="3">'
                parts.append(f"{dot}<title>{escape(title)}</title></circle>")
    return "".join(parts)


def _legend(lines: Sequence[Series]) -> str:
    items = "".join(f'<span><i class="b{line.color}"></i>{escape(line.name)}</span>' for line in lines)
    return f'<div class="legend">{items}</div>' if len(lines) > 1 else ""
