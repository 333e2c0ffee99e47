"""A plot of open-loop predictions against what the demonstrator did."""

from __future__ import annotations

import io

from spear.evaluate.open_loop import OpenLoop


def plot(model: OpenLoop, reference: OpenLoop, episodes: int = 3, dpi: int = 110) -> bytes:
    """PNG: predicted against true displacement per axis, and the gripper, over some held-out episodes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = range(min(episodes, len(model.truth)))
    names = ("forward (x), mm", "left (y), mm", "up (z), mm", "gripper opening")
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, len(chosen), sharex="col", sharey="row", squeeze=False)
    for column, index in enumerate(chosen):
        for row, name in enumerate(names):
            scale, dimension = (1000, row) if row < 3 else (1, 7)
            axis = axes[row][column]
            axis.plot(scale * model.truth[index][:, dimension], "o-", color="#30363d", label="demonstrator")
            axis.plot(scale * model.predicted[index][:, dimension], "o-", color="#2460c8", label=model.name)
            axis.plot(
                scale * reference.predicted[index][:, dimension], "--", color="#c8402f", label=reference.name
            )
            axis.grid(alpha=0.25)
            axis.margins(y=0.15)
            if column == 0:
                axis.set_ylabel(name)
        axes[0][column].set_title(f"held-out episode {index + 1}")
        axes[3][column].set_xlabel("step (5 Hz)")
    axes[0][0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
