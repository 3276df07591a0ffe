"""How good a classifier is: accuracy, confusion, and what is left of it when the patches are
shuffled."""

from v2m.evaluation.classification import ClassificationResult, evaluate_classifier
from v2m.evaluation.patches import patch_size

__all__ = ["ClassificationResult", "evaluate_classifier", "patch_size"]
