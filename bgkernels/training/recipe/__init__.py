"""Llama 3.2's recipe: prune a teacher, distil two, fine-tune, sample and reject, prefer.

A stage is a function in a module of its own, from what the earlier ones made to the next model;
:data:`STAGES` is their table.
"""

from bgkernels.training.recipe.config import RecipeConfig
from bgkernels.training.recipe.run import STAGES, RecipeResult, run_recipe

__all__ = ["STAGES", "RecipeConfig", "RecipeResult", "run_recipe"]
