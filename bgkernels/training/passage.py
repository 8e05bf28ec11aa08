"""The picture of a passage: each token on the colour of the teacher's uncertainty about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bgkernels.training.maps import TokenMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

COLUMNS, LINES = 104, 13
"""The grid of characters; what does not fit is left out."""


def paint(axes: Axes, passage: TokenMap, threshold: float) -> None:
    """Draw the passage, purple at bridges and green in gardens.

    Args:
        axes: where to draw.
        passage: tokens and the teacher's ``H / log V`` before each.
        threshold: between bridges and gardens; white on the scale.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm

    scale = ScalarMappable(TwoSlopeNorm(threshold, 0, 1), pale("PRGn"))
    write_tokens(axes, passage.tokens, scale.to_rgba(np.array(passage.ambiguity)))
    axes.set_title(
        "A held-out passage: where the teacher sees bridges (purple) and gardens (green)"
    )
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(scale, ax=axes, location="bottom", aspect=60, shrink=0.6, pad=0.02)
    bar.set_label("teacher's entropy / log V")
    bar.set_ticks([0, threshold, 1], labels=["0", f"{threshold:g}", "1"])


def write_tokens(axes: Axes, tokens: Sequence[str], colors: Any, lines: int = LINES) -> None:
    """Write tokens on a grid of characters, each on its colour.

    Args:
        axes: where to write.
        tokens: as text.
        colors: one a token.
        lines: of the grid; what does not fit is left out.
    """
    from matplotlib.patches import Rectangle

    for token, line, column, character in _cells(tokens):
        if line >= lines:
            break
        axes.add_patch(Rectangle((column, line), 1, 1, color=colors[token], lw=0))
        axes.text(
            column + 0.5, line + 0.55, _visible(character),
            family="monospace", size=9, ha="center", va="center", parse_math=False,
        )  # fmt: skip
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0), xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def lines_of(tokens: Sequence[str]) -> int:
    r"""Lines that the tokens fill, at most as many as the grid has.

    Example:
        >>> lines_of(["one", "\n", "two"])
        2
    """
    return min(LINES, 1 + max((line for _, line, *_ in _cells(tokens)), default=0))


def _cells(tokens: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    """Token number, line, column and character of each cell of the grid."""
    line = column = 0
    for number, token in enumerate(tokens):
        for character in token.expandtabs(4):
            if column == COLUMNS:
                line, column = line + 1, 0
            yield number, line, column, character
            column += 1
            if character == "\n":
                line, column = line + 1, 0


def pale(name: str) -> Colormap:
    """A colour map on which black text can be read everywhere."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colors = colormaps[name](range(256))
    return ListedColormap(1 - 0.7 * (1 - colors))


def _visible(character: str) -> str:
    """Something to see for a line break, and for what no font has."""
    if character == "\n":
        return "↵"
    return character if character.isprintable() else "·"
