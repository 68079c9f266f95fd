"""Measurements under the roof that memory and arithmetic put over them, as a picture.

The roofline model: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilemla.bench.further import FurtherCase
from tilemla.bench.record import PeerTime, Record
from tilemla.bench.report import peer_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE_INCHES, _DPI = (12, 7), 150
_COLORS = ("#1f5fa8", "#2a9d5c", "#d98c1a", "#b0367a", "#6a51a3", "#5b5b5b")
_PEER_MARKERS = ("s", "^", "D", "v")
_PEER_COLOR = "#9a9a9a"
_MARKER_POINTS, _PEER_MARKER_POINTS, _READING_MARKER_POINTS = 6, 7, 12
_LABEL_POINTS, _LABEL_DISTANCE_POINTS = 7.5, 8
# What a label keeps clear of around each point, and how finely the roof is walked for that.
_POINT_PIXELS, _ROOF_STEPS = 14, 400


def load_figure_class() -> type[Figure]:
    """The class of matplotlib's figures.

    Raises
    ------
    ModuleNotFoundError
        When matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure


class _Roof:
    """The ceilings of a device, and the window of the picture around them and the measurements."""

    def __init__(self, records: Sequence[Record], read_bandwidth_gbs: float, matmul_tflops: float) -> None:
        self.read_bandwidth_gbs = read_bandwidth_gbs
        self.matmul_tflops = matmul_tflops
        self.ridge = matmul_tflops / read_bandwidth_gbs * 1e3
        intensities = [record.intensity for record in records] + [self.ridge]
        self.left, self.right = min(intensities) / 2, max(intensities) * 2
        rates = [record.tflops for record in records] + [_tflops(record, peer) for record, peer in _pairs(records)]
        self.bottom, self.top = min(rates) / 2, max(*rates, matmul_tflops) * 2

    def tflops_at(self, intensity: float) -> float:
        """The most that the ceilings allow, for FLOP per byte."""
        return min(intensity * self.read_bandwidth_gbs * 1e-3, self.matmul_tflops)

    def points(self) -> list[tuple[float, float]]:
        """The roof from one side of the picture to the other, in steps."""
        factor = (self.right / self.left) ** (1 / _ROOF_STEPS)
        walk = [self.left * factor**step for step in range(_ROOF_STEPS + 1)]
        return [(intensity, self.tflops_at(intensity)) for intensity in walk]


def _pairs(records: Sequence[Record]) -> list[tuple[Record, PeerTime]]:
    return [(record, peer) for record in records for peer in record.peers]


def _tflops(record: Record, peer: PeerTime) -> float:
    return record.case.flop / peer.time_us * 1e-6


def draw_roofline(records: Sequence[Record], path: Path) -> None:
    """Write ``make_roofline(records)`` as a PNG."""
    make_roofline(records).savefig(path, format="png")


def make_roofline(records: Sequence[Record]) -> Figure:
    """Draw arithmetic intensity against rate, both logarithmic, under the ceilings of the run.

    Parameters
    ----------
    records : sequence of Record
        Measurements of one device; the ceilings are the last one's.

    Raises
    ------
    ModuleNotFoundError
        When matplotlib is not installed.
    ValueError
        When there are no records, when they are of several devices, or when the last has no ceilings.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    if not records:
        raise ValueError("there is no measurement to draw")
    gpus = sorted({record.context.gpu for record in records})
    if len(gpus) > 1:
        raise ValueError(f"a roofline is of one device, got measurements of {', '.join(gpus)}")
    context = records[-1].context
    if context.read_bandwidth_gbs is None or context.matmul_tflops is None:
        raise ValueError("the measurements come without ceilings, so there is no roof to draw")
    roof = _Roof(records, context.read_bandwidth_gbs, context.matmul_tflops)
    figure = load_figure_class()(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlim=(roof.left, roof.right), ylim=(roof.bottom, roof.top))
    _draw_roof(axes, roof)
    _draw_peers(axes, records)
    _draw_reading(axes, records)
    _draw_ours(axes, records)
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("TFLOPS")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    dtypes = ", ".join(sorted({record.case.dtype for record in records}))
    axes.set_title(f"MLA decode on {context.gpu}, {dtypes}\n{context.timing}", fontsize=11)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.95)
    _label_cases(figure, axes, records, roof)
    return figure


def _draw_roof(axes: Axes, roof: _Roof) -> None:
    axes.plot(*zip(*roof.points(), strict=True), color="#222222", linewidth=1.6, zorder=2)
    start = roof.left * 1.08
    axes.text(
        start,
        roof.tflops_at(start) * 1.12,
        f"measured: {roof.read_bandwidth_gbs:.0f} GB/s read",
        fontsize=9,
        va="bottom",
        rotation=math.degrees(math.atan(roof.read_bandwidth_gbs * 1e-3)),
        rotation_mode="anchor",
        transform_rotates_text=True,  # that angle is the roof's in data coordinates
    )
    number = f"{roof.matmul_tflops:.0f}" if roof.matmul_tflops >= 10 else f"{roof.matmul_tflops:.2f}"
    text = f"measured: {number} TFLOPS matrix product"
    axes.text(roof.right / 1.05, roof.matmul_tflops * 1.08, text, fontsize=9, ha="right")


def _draw_peers(axes: Axes, records: Sequence[Record]) -> None:
    for number, name in enumerate(peer_names(records)):
        found = [(record.intensity, _tflops(record, peer)) for record, peer in _pairs(records) if peer.name == name]
        axes.plot(
            *zip(*found, strict=True),
            linestyle="",
            marker=_PEER_MARKERS[number % len(_PEER_MARKERS)],
            markersize=_PEER_MARKER_POINTS,
            markerfacecolor="none",
            markeredgecolor=_PEER_COLOR,
            label=name,
            zorder=3,
        )


def _draw_reading(axes: Axes, records: Sequence[Record]) -> None:
    """The measured floor, where there is one: the rate of a call that takes as long as reading its pages."""
    found = [
        (record.intensity, record.case.flop / record.read_only.time_us * 1e-6)
        for record in records
        if record.read_only is not None
    ]
    if found:
        axes.plot(
            *zip(*found, strict=True),
            linestyle="",
            marker="_",
            markersize=_READING_MARKER_POINTS,
            color="#222222",
            label="the pages read only",
            zorder=3,
        )


def _draw_ours(axes: Axes, records: Sequence[Record]) -> None:
    batch_sizes = sorted({record.case.batch_size for record in records}, reverse=True)
    for number, batch_size in enumerate(batch_sizes):
        found = [(record.intensity, record.tflops) for record in records if record.case.batch_size == batch_size]
        axes.plot(
            *zip(*found, strict=True),
            linestyle="",
            marker="o",
            markersize=_MARKER_POINTS,
            color=_COLORS[number % len(_COLORS)],
            alpha=0.85,
            label=f"tilemla, batch {batch_size}",
            zorder=4,
        )


def _label_cases(figure: Figure, axes: Axes, records: Sequence[Record], roof: _Roof) -> None:
    """Write names where there is room: of the cases farthest below the roof first, of near twins only one."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout, so that positions in pixels are those of the picture
    taken = [artist.get_window_extent() for artist in (*axes.texts, axes.get_legend()) if artist is not None]
    points = roof.points()
    points += [(record.intensity, record.tflops) for record in records]
    points += [(record.intensity, _tflops(record, peer)) for record, peer in _pairs(records)]
    for x, y in axes.transData.transform(points):
        taken.append(Bbox.from_bounds(x - _POINT_PIXELS / 2, y - _POINT_PIXELS / 2, _POINT_PIXELS, _POINT_PIXELS))
    frame = axes.get_window_extent()
    for record in sorted(records, key=lambda record: record.floor_over_ours or 0.0):
        for offset, side in ((_LABEL_DISTANCE_POINTS, "left"), (-_LABEL_DISTANCE_POINTS, "right")):
            label = axes.annotate(
                _label_of(record),
                (record.intensity, record.tflops),
                xytext=(offset, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=_LABEL_POINTS,
                color="#333333",
                zorder=5,
            )
            box = label.get_window_extent()
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.count_overlaps(taken) == 0:
                taken.append(box)
                break
            label.remove()


def _label_of(record: Record) -> str:
    """The name of a case without what cases of a picture share, or the axes say."""
    if isinstance(record.case, FurtherCase):
        return str(record.case)
    batch, length, heads, queries, *_ = str(record.case).split()
    return f"{batch} {length} {heads.removesuffix('k1')} {queries}"
