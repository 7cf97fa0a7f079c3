"""The thread that generates survives what its requests do."""

from types import SimpleNamespace

import pytest

from mlx_clex.errors import RunError
from mlx_clex.serving.generation import Jobs, PlanningResponseGenerator
from mlx_clex.serving.prompt_caches import PlannedPromptCache


def test_a_request_that_breaks_generation_fails_alone():
    """An error while tokens are made killed the thread that answers everybody."""

    class Generator(PlanningResponseGenerator):
        runs = 0

        def _generate(self):
            self.runs += 1
            while not self._stop:
                if self._next_request(timeout=0.05) is not None and self.runs == 1:
                    raise ZeroDivisionError("the first request")

    provider = SimpleNamespace(model=object())
    generator = Generator(provider, PlannedPromptCache(provider, 1))
    try:
        with pytest.raises(RunError, match="the first request"):
            Jobs(generator, [(object(), None)]).contexts()
        assert generator.generation_available()
        assert generator.runs == 2
    finally:
        generator.stop_and_join()
