"""Where all programs must be there, a test that lacks one fails and is not left out."""
from __future__ import annotations

import pytest
from needed import ALL_THERE, program


def test_a_missing_program_leaves_a_test_out_or_fails_it(monkeypatch):
    assert program("no_such_program", "sh").endswith("/sh")
    monkeypatch.delenv(ALL_THERE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_program is not installed"):
        program("no_such_program")
    monkeypatch.setenv(ALL_THERE, "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_program is not installed, and"):
        program("no_such_program")
