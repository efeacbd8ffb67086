"""Whether backend="cpp" can run here, and backends to run a test with."""

import pytest

from ivon_lora.backends.compiler import why_not


def has_compiler() -> bool:
    return why_not() is None


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
COMPILE = pytest.param("cpp", marks=needs_compiler)
BACKENDS = ["eager", COMPILE]
