"""A page of HTML on which each token of a passage wears the colour of its value.

The page needs no network and no script: the maps are radio buttons, and a token's tooltip lists all
of its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bgkernels.training.analysis.maps import LAYERS, TokenMap

LOW, HIGH, AMOUNT = (118, 42, 131), (27, 120, 55), (230, 85, 13)
"""Purple and green, as in the demo's picture: bridge and garden, below and above zero; orange."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
pre { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre span { border-radius: 3px }
section { display: none }
input { margin: 0 .3rem 0 1rem }
"""


def render(passages: Sequence[TokenMap], title: str) -> str:
    """The page as text.

    Args:
        passages: what to show, one below the other, all with the same maps.
        title: of the page.

    Example:
        >>> page = render([TokenMap(("a<b",), (0.1,), (0.2,), (0.3,))], "An example")
        >>> "a&lt;b" in page and "soft weight 0.200" in page
        True
    """
    names = list(passages[0].layers()) if passages else []
    rules = "".join(f"#{name}:checked ~ .{name} {{ display: block }}\n" for name in names)
    buttons = "".join(
        f'<input type="radio" name="map" id="{name}"{" checked" * (i == 0)}>'
        f'<label for="{name}">{LAYERS[name].title}</label>'
        for i, name in enumerate(names)
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}{rules}</style>\n<h1>{escape(title)}</h1>\n{buttons}\n"
        + "".join(_section(passages, name) for name in names)
        + "</html>\n"
    )


def _section(passages: Sequence[TokenMap], name: str) -> str:
    """One map of all passages, on one scale."""
    every = [abs(value) for passage in passages for value in passage.layers()[name]]
    scale = max(every, default=0.0) or 1.0
    body = "".join(f"<pre>{_tokens(passage, name, scale)}</pre>\n" for passage in passages)
    legend = f"{LAYERS[name].text}; strongest colour: {scale:.3g}"
    return f'<section class="{name}"><p>{escape(legend)}</p>\n{body}</section>\n'


def _tokens(passage: TokenMap, name: str, scale: float) -> str:
    layers = passage.layers()
    spans = []
    for i, token in enumerate(passage.tokens):
        known = ", ".join(
            f"{LAYERS[x].title.lower()} {values[i]:.3f}" for x, values in layers.items()
        )
        colour = background(layers[name][i], scale, LAYERS[name].scale)
        shown = escape(token).replace("\n", "↵\n")
        spans.append(f'<span style="background:{colour}" title="{known}">{shown}</span>')
    return "".join(spans)


def background(value: float, most: float, scale: str) -> str:
    """A CSS colour on which black text can be read.

    Args:
        value: of a token.
        most: the largest size of any.
        scale: of the :class:`~bgkernels.training.analysis.maps.Layer`.

    Example:
        >>> background(0.0, 1.0, "sign"), background(0.0, 1.0, "kind")
        ('rgba(27,120,55,0.00)', 'rgba(118,42,131,0.60)')
    """
    share = max(-1.0, min(1.0, value / most))
    if scale == "kind":
        share = 2 * share - 1  # the least is as strong a colour as the most
    red, green, blue = AMOUNT if scale == "amount" else HIGH if share >= 0 else LOW
    return f"rgba({red},{green},{blue},{0.6 * abs(share):.2f})"
