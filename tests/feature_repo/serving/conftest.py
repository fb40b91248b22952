"""Stores of the feature repository's tests, for those of the serving process."""

from tests.feature_repo.conftest import lake as lake  # for pytest, which looks fixtures up here
from tests.feature_repo.conftest import postgres as postgres
from tests.feature_repo.conftest import redis_port as redis_port
