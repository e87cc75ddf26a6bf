"""The labeling-and-retraining workbench: upload, annotate, review, evaluate, version, retrain, promote, deploy."""

__version__ = "0.1.0"
