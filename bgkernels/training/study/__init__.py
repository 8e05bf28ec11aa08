"""An exact study of bridges and gardens (arXiv 2605.26246) in a world of 36 steps.

To read in this order: :mod:`~bgkernels.training.study.world` (the language),
:mod:`~bgkernels.training.study.exact` (what is computed of a student),
:mod:`~bgkernels.training.study.lesson` (how it is trained),
:mod:`~bgkernels.training.study.claims` (what is asked of the results).
"""

from bgkernels.training.study.config import StudyConfig, WorldConfig
from bgkernels.training.study.run import StudyResult, run_study

__all__ = ["StudyConfig", "StudyResult", "WorldConfig", "run_study"]
