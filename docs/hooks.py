"""What the site adds to MkDocs: links into the tree, mathematics as SVG, roles of docstrings.

Pages are written to be read in the repository too: they link to files beside them by their paths,
and set formulas between dollar signs. In the site a file of the tree gets a page of its own.
"""

from __future__ import annotations

import html
import posixpath
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ziamath  # opens its font in a way that Python means to end

ROOT = Path(__file__).resolve().parent.parent
TREE = "tree/"
"""Where files that are not under ``docs`` appear in the site."""

SIZE, SCALE = 24, 1.12
"""Points that formulas are drawn at; and their size beside that of the text."""

LINK = re.compile(r"(\]\()([^)\s:#]*[^)\s:#/])(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
TIGHT = re.compile(r"(?<=[=(])-|(?<== )-|\\(?:pm|partial)\b")
"""What stands before a symbol as a sign of its own, not between two."""

ROLE = re.compile(r":(?:mod|func|class|meth|attr):`(~?)([\w.]+)`")
SEVERAL = re.compile(r"^ +\w+(?:, \w+)+: ", re.M)

ziamath.config.svg2 = False  # no identifiers, which would meet on one page
ziamath.config.math.color = "currentColor"


def place(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return uri.removeprefix(TREE).removesuffix(".src.md") if uri.startswith(TREE) else f"docs/{uri}"


def page_of(path: str) -> str:
    """The page, or file, of the site for a path in the repository: :func:`place` backwards."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{TREE}{path}" if path.endswith(".md") else f"{TREE}{path}.src.md"


def links(markdown: str, path: str) -> Iterator[str]:
    """Paths in the repository that a page at ``path`` links to."""
    for match in LINK.finditer(FENCE.sub("", markdown)):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file of the tree that some page links to."""
    waiting = [place(f.src_uri) for f in files.documentation_pages()]
    while waiting:
        path = waiting.pop()
        for target in links(source(path), path):
            uri = page_of(target)
            if files.get_file_from_path(uri) or not (ROOT / target).exists():
                continue
            files.append(
                File.generated(
                    config, uri, content=shown(target), inclusion=InclusionLevel.NOT_IN_NAV
                )
            )
            if target.endswith(".md") or (ROOT / target).is_dir():
                waiting.append(target)
    return files


def source(path: str) -> str:
    """The text of a file of the tree; of a folder, links to its files."""
    here = ROOT / path
    if not here.is_dir():
        return here.read_text(encoding="utf-8")
    names = sorted(p.name for p in here.iterdir() if p.is_file())
    return "".join(f"- [{name}]({here.name}/{name})\n" for name in names)


def shown(path: str) -> str:
    """A file or folder of the tree as a page."""
    text = source(path)
    if path.endswith(".md"):
        return text
    if (ROOT / path).is_dir():
        return f"# `{path}`\n\n{text}"
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json"}
    code = language.get(Path(path).suffix, "cpp" if path.startswith("csrc/") else "text")
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n"
    return f"{head}# `{path}`\n\n~~~~~{code}\n{text}\n~~~~~\n"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the tree lead to their pages."""
    uri = page.file.src_uri
    here = posixpath.dirname(place(uri))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        if not (ROOT / target).exists():
            return match[0]
        to = posixpath.relpath(page_of(target), posixpath.dirname(uri) or ".")
        return f"{match[1]}{to}{match[3] or ''}{match[4]}"

    return outside(FENCE, markdown, lambda text: LINK.sub(link, text))


def outside(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """``text`` changed wherever ``pattern`` does not match."""
    ends = [(m.start(), m.end()) for m in pattern.finditer(text)]
    made, at = "", 0
    for start, end in [*ends, (len(text), len(text))]:
        made, at = made + change(text[at:start]) + text[start:end], end
    return made


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as pictures that need neither scripts nor fonts."""

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        if match[1] == "span":
            return drawn(latex, inline=True)
        return f'<div class="formula">{drawn(latex.replace("{aligned}", "{align*}"))}</div>'

    return FORMULA.sub(formula, content)


def drawn(latex: str, inline: bool = False) -> str:
    """A formula as SVG, in the size and colour of the text around it."""
    tight = TIGHT.sub(r"{\g<0>}", latex.replace(r"\Vert", r"\|"))
    made = ziamath.Latex(tight, size=SIZE, inline=inline)
    svg, below = made.svgxml(), made.getyofst()
    for side in ("width", "height"):
        svg.set(side, f"{float(svg.get(side)) / SIZE * SCALE:.3f}em")
    svg.set("style", f"vertical-align: {below / SIZE * SCALE:.3f}em")
    svg.set("role", "img")
    svg.set("aria-label", latex)
    return ElementTree.tostring(svg, encoding="unicode")


class Roles(griffe.Extension):
    """Cross-references of docstrings, ``:func:`name```, as links where the site has the name."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            text = SEVERAL.sub(lambda m: m[0][:-1].replace(", ", ",\u00a0") + " ", text)
            obj.docstring.value = ROLE.sub(self.link, text)

    @staticmethod
    def link(role: re.Match[str]) -> str:
        """The link that a role becomes."""
        name = role[2].rpartition(".")[2] if role[1] else role[2]
        full = role[2] if "." in role[2] else f"bgkernels.{role[2]}"
        return f'<autoref identifier="{full}" optional><code>{name}</code></autoref>'
