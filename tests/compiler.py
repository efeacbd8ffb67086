"""Whether backend="compile" can run here, and backends to run a test with."""

from __future__ import annotations

import pytest

from ivon_lora.c_compiler import find_compiler


def has_compiler() -> bool:
    """A C++ compiler is here."""
    try:
        find_compiler()
    except ValueError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
COMPILE = pytest.param("compile", marks=needs_compiler)
BACKENDS = ["eager", COMPILE]
