"""One page of HTML of a run: curves, tables, and passages token by token.

:mod:`~bgkernels.training.page.content` is what a page is made of, and renders it;
:mod:`~bgkernels.training.page.run` reads it from the folder of a run. The page has its style, its
script and its numbers in itself, and asks for nothing from anywhere.
"""

from bgkernels.training.page.charts import Chart, Line
from bgkernels.training.page.content import Cell, Page, Table, render
from bgkernels.training.page.run import of_run, write_report

__all__ = ["Cell", "Chart", "Line", "Page", "Table", "of_run", "render", "write_report"]
