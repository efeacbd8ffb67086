"""Whether backend="cpp" can run here, and backends to run a test with."""

import pytest

from ivon_lora.backends.compiler import why_not

needs_compiler = pytest.mark.skipif(why_not() is not None, reason="there is no C++ compiler")
BACKENDS = ["eager", pytest.param("cpp", marks=needs_compiler)]
