"""Plots and image grids without a plotting library: SVG and PNG, small enough to be inlined."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Okabe and Ito's colours that are visible on white and on black; dashes distinguish the series in
# print
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about n round numbers from `low` to `high`."""
    raw = (high - low) / n
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`; if there are few, also 2 and 5 times those."""
    decades = range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)
    times = (1, 2, 5) if len(decades) < 4 else (1,)
    found = [m * 10.0**k for k in decades for m in times]
    return [x for x in found if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)]


def _range(values: Sequence[float], zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


class _Axes:
    """Maps the points of a curve to their places in the plot."""

    def __init__(self, curve: Mapping[str, Any]) -> None:
        self.log = curve.get("x_scale", "linear") == "log"
        self.series: Mapping[str, Any] = curve["series"]
        self.limits: Mapping[str, float] = curve.get("limits", {})
        points = [p for line in self.series.values() for p in line]
        if not points or not all(math.isfinite(v) for p in points for v in p):
            raise ValueError(
                f"the curve {curve['title']!r} holds no points, or NaN or Inf; leave those points "
                "out"
            )
        if self.log and min(p[0] for p in points) <= 0:
            raise ValueError(
                f"the curve {curve['title']!r} holds x <= 0, which a log scale cannot show; "
                "leave those points out"
            )
        self.across = math.log10 if self.log else float
        self.x0, self.x1 = _range([self.across(p[0]) for p in points], zero=False)
        self.y0, self.y1 = _range([p[1] for p in points] + list(self.limits.values()), zero=True)

    def x(self, x: float) -> float:
        return LEFT + (self.across(x) - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, x_name: str, y_name: str) -> list[str]:
        """Return both axes with their names, ticks and horizontal lines."""
        out = []
        for y in ticks(self.y0, self.y1):
            out.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(y):.1f}" '
                f'y2="{self.y(y):.1f}" stroke="currentColor" stroke-opacity="0.18"/>'
                f'<text x="{LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
            )
        across = ticks(self.x0, self.x1, 8)
        for x in log_ticks(10**self.x0, 10**self.x1) if self.log else across:
            out.append(
                f'<text x="{self.x(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{x:.4g}</text>"
            )
        out.append(
            f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" '
            'stroke="currentColor"/>'
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(x_name)}</text>"
            f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_name)}</text>'
        )
        return out


def _key(i: int, name: str, style: str) -> str:
    """Return line i of the legend."""
    y = HEIGHT + 20 * i + 6
    return (
        f'<line x1="{LEFT}" x2="{LEFT + 34}" y1="{y}" y2="{y}" {style}/>'
        f'<text x="{LEFT + 42}" y="{y + 4}">{escape(name)}</text>'
    )


def _line(axes: _Axes, i: int, name: str, line: Sequence[tuple[float, float]]) -> list[str]:
    colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
    style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
    at = [(f"{axes.x(x):.1f}", f"{axes.y(y):.1f}") for x, y in line]
    path = "L".join(f"{x} {y}" for x, y in at)
    dots = [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in at]
    return [f'<path d="M{path}" fill="none" {style}/>', *dots, _key(i, name, style)]


def line_chart(curve: Mapping[str, Any]) -> str:
    """Return an SVG of series over one x; text and axes have the colour of the surrounding text.

    Args:
        curve: ``title``, ``x`` and ``y`` (the axes' labels, with units), ``series``: name ->
            [(x, y), ...], and, optionally, ``limits``: name -> y of a horizontal line, and
            ``x_scale``: "linear" or "log", which cannot show x <= 0.

    Raises:
        ValueError: the curve holds no points, NaN or Inf, or x <= 0 on a log scale.
    """
    axes = _Axes(curve)
    legend = 20 * len({**axes.series, **axes.limits})
    said = "; ".join(
        f"{name}: from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in axes.series.items()
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + legend}" '
        f'role="img" font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>{escape(curve['title'])}</title>",
        f"<desc>{escape(curve['y'])} over {escape(curve['x'])}. {escape(said)}</desc>",
        *axes.drawn(curve["x"], curve["y"]),
    ]
    for i, (name, line) in enumerate(axes.series.items()):
        out += _line(axes, i, name, line)
    for i, (name, y) in enumerate(axes.limits.items(), start=len(axes.series)):
        style = 'stroke="currentColor" stroke-dasharray="1 3" stroke-width="1.5"'
        at = f"{axes.y(y):.1f}"
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" {style}/>')
        out.append(_key(i, name, style))
    return "\n".join([*out, "</svg>"])


def pixels(images: Tensor, *, width: int = 0, at_most: int | None = None) -> Tensor:
    """Arrange images (n, C, H, W) in one row, as (H, n * (W + 1) - 1, 3) uint8.

    They are enlarged by the least whole factor that makes each at least `width` wide, or averaged
    down to `at_most`. Float images must be in [-1, 1].
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            "a grid's images must have shape (n, C, H, W) with C of 1 or 3; got "
            f"{tuple(images.shape)}"
        )
    x = images.detach().cpu()
    if x.dtype != torch.uint8:
        x = ((x.float() + 1) * 127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8)
    if at_most is not None and x.shape[-1] > at_most:
        height = max(1, round(x.shape[-2] * at_most / x.shape[-1]))
        x = F.interpolate(x.float(), (height, at_most), mode="area").round().to(torch.uint8)
    factor = max(1, -(-width // x.shape[-1]))
    x = x.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    gap = torch.full((len(x), 3, x.shape[2], max(1, factor // 2)), 128, dtype=torch.uint8)
    row = torch.cat([x, gap], dim=3).permute(2, 0, 3, 1).reshape(x.shape[2], -1, 3)
    return row[:, : -gap.shape[3]]


def png(x: Tensor) -> bytes:
    """Return (H, W, 3) uint8 as the bytes of a PNG file."""
    height, width, _ = x.shape
    filtered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), x.reshape(height, -1)], dim=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(filtered.contiguous().numpy().tobytes(), 9))
        + chunk(b"IEND", b"")
    )
