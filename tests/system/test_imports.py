"""A large import leaves the collector as it was, whatever happens."""

import gc

import pytest

from ggtool.system.imports import import_large, unsearched


def test_the_collector_rests_during_the_import_and_is_then_as_before(tmp_path, monkeypatch) -> None:
    (tmp_path / "told_of_gc.py").write_text("import gc\nWAS_ON = gc.isenabled()\n")
    (tmp_path / "broken_import.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gc.isenabled()
    assert import_large("told_of_gc").WAS_ON is False
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="broken"):
        import_large("broken_import")
    assert gc.isenabled()
    gc.disable()
    try:
        import_large("json")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_there_before_is_not_searched_meanwhile() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError, match="in the middle"), unsearched():
        assert gc.get_freeze_count() > before
        raise RuntimeError("in the middle")
    assert gc.get_freeze_count() == 0
