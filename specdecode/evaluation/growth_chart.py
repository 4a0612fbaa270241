"""Curves of growth in, a PNG out; matplotlib is an extra."""

from collections.abc import Sequence as Several
from pathlib import Path
from typing import TYPE_CHECKING

from specdecode.errors import ConfigError

if TYPE_CHECKING:
    from specdecode.evaluation.growth import Curve


def draw_growth(curves: "Several[Curve]", path: Path) -> None:
    """Draws a panel for each axis, both scales logarithmic, one line for each phase.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"growth.chart {str(path)!r} needs the package matplotlib: pip install 'specdecode[bench]'"
        ) from error
    axes = list(dict.fromkeys(curve.axis for curve in curves))
    figure = Figure(figsize=(4.5 * len(axes), 4), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        for curve in (curve for curve in curves if curve.axis == axis):
            panel.plot(curve.sizes, curve.ms, marker="o", markersize=3, label=curve.phase)
        panel.set_xscale("symlog" if axis == "K" else "log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms in a round")
    figure.axes[-1].legend(fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"growth.chart {str(path)!r}: cannot be written: {error.strerror}") from error
