"""Measuring what a model generates: retrieval by pixels, and scores by networks that others trained."""

from diffengine.evaluation.evaluate import EvalData, Evaluation, LossData, Source, evaluate
from diffengine.evaluation.retrieval import Gallery

__all__ = ["EvalData", "Evaluation", "Gallery", "LossData", "Source", "evaluate"]
