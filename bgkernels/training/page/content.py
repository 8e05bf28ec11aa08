"""What a page is made of, and how it becomes HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bgkernels.training.errors import extra
from bgkernels.training.maps import LAYERS, TokenMap
from bgkernels.training.page import charts
from bgkernels.training.page.charts import Chart


@dataclass(frozen=True)
class Cell:
    """A value in a table.

    Args:
        text: as shown.
        note: in small letters after it, such as an error.
        share: in [0, 1], of the cell's width that a bar takes; None: no bar.
        best: whether it is the best of its column.
    """

    text: str
    note: str = ""
    share: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A row for each model.

    Args:
        title: what is measured.
        columns: titles of the values.
        rows: by the name of a model, its values.
        caption: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]
    caption: str = ""


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: of the page.
        lead: what it is about, a sentence each.
        names: of every model that the page speaks of, by key, in the order of their colours.
        tables, charts, passages: what it shows, under the keys of models; each may be empty.
        threshold: of ``H / log V``, between bridges and gardens.
        configuration: of the run, for whoever wants to see it.
    """

    title: str
    lead: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    passages: tuple[TokenMap, ...] = ()
    threshold: float = 0.25
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The maps that every passage has."""
        return [name for name in LAYERS if all(name in x.layers() for x in self.passages)]

    def strongest(self, layer: str) -> float:
        """The largest size of a value of a map, which has the strongest colour."""
        values = (abs(v) for x in self.passages for v in x.layers()[layer])
        return max(values, default=0.0) or 1.0


def render(page: Page) -> str:
    """The page as text: HTML that needs no other file and no network.

    Args:
        page: what it shows.

    Raises:
        MissingExtra: the package ``jinja2`` is not installed.

    Example:
        >>> html = render(Page("An example", passages=(TokenMap(("a<b",), (0.1,)),)))
        >>> "a&lt;b" in html, "https:" in html
        (True, False)
    """
    with extra():
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bgkernels.training.page", "."),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template("page.html").render(
        page=page,
        kinds={name: LAYERS[name] for name in page.layers},
        places=list(page.names),
        size=charts,
        shades={name: _shades(page, name) for name in page.layers},
        spoken=_spoken(page),
    )


def _spoken(page: Page) -> dict[str, Any]:
    """What the script shows of each token."""
    return {
        "names": dict(page.names),
        "layers": {name: asdict(LAYERS[name]) for name in page.layers},
        "threshold": page.threshold,
        "passages": [
            {
                "tokens": x.tokens,
                "layers": {name: x.layers()[name] for name in page.layers},
                "shades": {name: _shades(page, name)[i] for name in page.layers},
                "voices": {name: asdict(voice) for name, voice in x.voices.items()},
            }
            for i, x in enumerate(page.passages)
        ],
    }


def _shades(page: Page, layer: str) -> list[list[float]]:
    """Strength of the colour of each token of each passage, negative towards bridges."""
    most, middle = page.strongest(layer), page.threshold if layer == "ambiguity" else 0.5
    kind = LAYERS[layer].scale
    return [
        [shade(value, most, kind, middle) for value in x.layers()[layer]] for x in page.passages
    ]


def shade(value: float, most: float, scale: str, middle: float = 0.5) -> float:
    """Strength of a colour, in [-1, 1].

    Args:
        value: of a token.
        most: the largest size of any.
        scale: of the :class:`~bgkernels.training.maps.Layer`.
        middle: of a scale of kinds, the value without colour.

    Example:
        >>> shade(0.0, 0.8, "kind", 0.25), shade(0.25, 0.8, "kind", 0.25), shade(2, 4, "amount")
        (-1.0, 0.0, 0.5)
    """
    if scale == "kind":
        below = value < middle
        found = (value - middle) / (middle if below else max(most - middle, 1e-9))
    else:
        found = value / most
    return round(max(-1.0, min(1.0, found)), 3)
