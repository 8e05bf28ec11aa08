"""The picture of an analysis: how errors accumulate, and the maps of one passage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bgkernels.training.analysis.run import Analysis
from bgkernels.training.errors import extra
from bgkernels.training.figure import PARTS, picture
from bgkernels.training.maps import LAYERS
from bgkernels.training.passage import lines_of, pale, write_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(analysis: Analysis, path: Path) -> None:
    """Write the picture as a PNG."""
    with extra():
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
    passage = analysis.passages[0]
    layers, height = passage.layers(), 0.7 + 0.24 * lines_of(passage.tokens)
    with picture(path, (11, 3.5 + height * len(layers)), "Where the student is wrong") as figure:
        ratios = [3.2, *[height] * len(layers)]
        top, *rest = figure.subplots(len(ratios), 1, height_ratios=ratios)
        _accumulation(top, analysis)
        for axes, (name, values) in zip(rest, layers.items(), strict=True):
            largest = max(map(abs, values), default=0.0) or 1.0
            kind = LAYERS[name].scale
            norm = Normalize(-largest if kind == "sign" else 0, largest)
            scale = ScalarMappable(norm, pale("Oranges" if kind == "amount" else "PRGn"))
            colors = scale.to_rgba(np.array(values))
            write_tokens(axes, passage.tokens, colors, lines_of(passage.tokens))
            axes.set_title(f"{LAYERS[name].title}: {LAYERS[name].text}")
            figure.colorbar(scale, ax=axes, location="right", aspect=10, pad=0.01)


def _accumulation(axes: Axes, analysis: Analysis) -> None:
    """ExAccErr against the length of the continuation, with standard errors."""
    for part, colour in PARTS.items():
        points = [(n, parts[part]) for n, parts in analysis.accumulation.items()]
        axes.errorbar(
            [n for n, _ in points],
            [100 * x.mean for _, x in points],
            yerr=[100 * x.error for _, x in points],
            fmt="o-",
            color=colour,
            label=part if part == "all" else f"{part}s",
            ms=4,
            elinewidth=0.8,
        )
    axes.axhline(0, color="#333333", lw=0.8)
    axes.set(xlabel="tokens of the continuation", ylabel="ExAccErr, %")
    axes.set_title("Errors that feed on errors: excess KL on the student's own text")
    axes.legend()
