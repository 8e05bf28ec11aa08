"""Where a real student is wrong, and what it costs: exposure bias, and maps of single tokens.

:mod:`~bgkernels.training.analysis.risk` estimates what the study computes;
:mod:`~bgkernels.training.analysis.passages` reads every token of a passage;
:mod:`~bgkernels.training.analysis.figure` draws them, and so does the page of the run.
"""

from bgkernels.training.analysis.run import Analysis, AnalysisConfig, run_analysis
from bgkernels.training.maps import TokenMap

__all__ = ["Analysis", "AnalysisConfig", "TokenMap", "run_analysis"]
