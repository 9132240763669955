"""Conformance suites for plugin authors: subclass one in three lines.

    from tlauto.testing import FreezeStrategySuite
    from my_plugin import MyStrategy

    class TestMyStrategy(FreezeStrategySuite):
        strategy = MyStrategy()

pytest collects the inherited tests. The suites use real networks of a few hundred parameters.
"""

from __future__ import annotations

import pytest

# Before the imports: only then do failing assertions of the suites show their values.
pytest.register_assert_rewrite(
    *(f"tlauto.testing.{name}" for name in ("executors", "heads", "providers", "strategies", "trackers"))
)

from tlauto.testing.executors import ExecutorSuite  # noqa: E402
from tlauto.testing.heads import TaskHeadSuite  # noqa: E402
from tlauto.testing.providers import BackboneProviderSuite  # noqa: E402
from tlauto.testing.strategies import FreezeStrategySuite  # noqa: E402
from tlauto.testing.trackers import TrackerSuite  # noqa: E402

__all__ = ["BackboneProviderSuite", "ExecutorSuite", "FreezeStrategySuite", "TaskHeadSuite", "TrackerSuite"]
