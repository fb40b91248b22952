"""The sections of the report: each turns facts into what its template of the same name draws. What is missing is told."""
