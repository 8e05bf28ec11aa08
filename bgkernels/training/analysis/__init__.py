"""Where a real student is wrong, and what it costs: exposure bias, and maps of single tokens.

:mod:`~bgkernels.training.analysis.risk` estimates what the study computes;
:mod:`~bgkernels.training.analysis.maps` reads every token of a passage;
:mod:`~bgkernels.training.analysis.page` and :mod:`~bgkernels.training.analysis.figure` draw them.
"""

from bgkernels.training.analysis.maps import TokenMap
from bgkernels.training.analysis.run import Analysis, AnalysisConfig, run_analysis

__all__ = ["Analysis", "AnalysisConfig", "TokenMap", "run_analysis"]
