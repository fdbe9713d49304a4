"""How many examples hypothesis tries: the same ones in every run of the suite, others and more in `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

#: Times the examples of a test; random ones where it is set.
FUZZ = int(os.environ.get("AIM_KERNELS_FUZZ", "0"))


def examples(count: int) -> settings:
    """Settings of a test that tries ``count`` examples in the suite."""
    return settings(
        max_examples=count * max(FUZZ, 1),
        deadline=None,
        derandomize=not FUZZ,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
