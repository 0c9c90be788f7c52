"""Compiled code is read again from the cache until any source of the folder changes."""

import importlib.util

from cuda_kernels.cpu import caching

SOURCE = """
def twice(x):
    return 2 * x
"""


def compile_again(path):
    """(hits, misses) of the cache in a fresh function of that file."""
    spec = importlib.util.spec_from_file_location("twice", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compiled = caching.compiled(module.twice)
    assert compiled(21) == 42
    return sum(compiled.stats.cache_hits.values()), sum(compiled.stats.cache_misses.values())


def test_a_change_elsewhere_in_the_folder_makes_code_stale(tmp_path, monkeypatch):
    path = tmp_path / "twice.py"
    path.write_text(SOURCE)
    assert compile_again(path) == (0, 1)
    assert compile_again(path) == (1, 0)
    monkeypatch.setattr(caching, "_digest", lambda: "of other sources")
    assert compile_again(path) == (0, 1)


def test_the_digest_is_of_every_source(tmp_path, monkeypatch):
    names = ["a.py", "b.py"]
    for name in names:
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(caching, "__file__", str(tmp_path / "caching.py"))
    digests = set()
    for name in (None, *names):
        if name:
            (tmp_path / name).write_text("x = 2")
        caching._digest.cache_clear()
        digests.add(caching._digest())
    caching._digest.cache_clear()
    assert len(digests) == 3
