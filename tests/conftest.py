"""What holds for all tests, whatever order they run in."""

from __future__ import annotations

import os

# Spark's Java process outlives the test that starts it, and its Python workers get its variables: these are set before any test.
# Nor can a test get at a real account.
os.environ.update({"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"})
