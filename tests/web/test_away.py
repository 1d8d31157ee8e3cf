"""Pages while Redis or the database is away: each answers, in words, with what the other one knows. The servers are real ones of the
test's own: a redis-server that is killed, a PostgreSQL behind a proxy that cuts off or holds."""

from __future__ import annotations

import pytest

from tests.web.conftest import HERE

pytestmark = [HERE, pytest.mark.postgresql]
