"""One border for each engine that jobs lean on: Spark, MLflow, the online store, torchrun."""
