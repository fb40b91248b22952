"""WHERE the work runs: one module a job, each `Config`, `Result`, `run(config) -> Result`."""
