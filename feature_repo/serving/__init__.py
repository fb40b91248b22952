"""The process that an SRS calls: `python -m feature_repo.serving` answers from one immutable generation, see docs/serving.md."""
