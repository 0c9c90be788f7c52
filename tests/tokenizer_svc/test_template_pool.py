"""Templates are programs of strangers: they get an answer or an error, in bounded time and memory."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer_svc.folders import ENDLESS
from tokenizer_svc.template_pool import TemplateError, TemplateLimits, TemplatePool

CPU_SECONDS = 0.5
FRAGMENTS = [
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ x.y }}",
    "{{ x[", "{{ 1 // 0 }}", "{{ 'a' * 10 ** 12 }}", "{{ 'x' | center(10 ** 12) }}", "{{ ''.__class__ }}",
    "{{ [1] | sum }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% set x = 'aa' %}", "{% raw %}",
    "{{ range(10 ** 9) }}", "{% include 'x' %}", "{{ x | tojson }}", "{{ '%d' % 'x' }}", "{% break %}",
    "{% call x() %}", "{{ {} | attr('get') }}",
]  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    pool = TemplatePool(
        TemplateLimits(max_template_chars=10_000, max_text_chars=5000, cpu_seconds=CPU_SECONDS)
    )
    yield pool
    pool.close()


def test_helpers_of_hugging_face(pool):
    template = (
        "{% for n in numbers %}{% if n == 2 %}{% continue %}{% endif %}{% if n == 4 %}{% break %}{% endif %}"
        "{% generation %}{{ n }}{% endgeneration %}{% endfor %}"
        "{{ {'b': '<é>', 'a': 1} | tojson }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}"
    )
    assert pool.render(template, {"numbers": [1, 2, 3, 4]}) == '13{"b": "<é>", "a": 1}{"a": 2, "b": 1}'
    assert pool.render("{{ strftime_now('%Y') }}", {}) == time.strftime("%Y")
    assert pool.render("{% if true %}\n  a\n{% endif %}\n", {}) == "  a\n"


@pytest.mark.parametrize(
    ("template", "message", "line"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate", None),
        ("a\nb\n{{ x.y.z }}", "'x' is undefined", 3),
        ("a\n{% if %}", "Expected an expression", 2),
        ("\n{{ messages.append(1) }}", "not safely callable|unsafe", 2),
        ("{{ ''.__class__.__mro__ }}", "unsafe", 1),
        ("\n\n{{ 1 // 0 }}", "zero", 3),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion", 1),
        ("{% include '/etc/passwd' %}", "no loader", 1),
        ("{{ 'a' * 10 ** 10 }}", "needs more than 512 MiB", 1),
        ("{% for n in range(9000) %}x{% endfor %}", "longer than 5000 characters", None),
        ("{{ range(10 ** 9) }}", "[Rr]ange too big", 1),
        ("x" * 10_001, "10001 characters, more than the limit of 10000", None),
    ],
)
def test_errors_say_what_and_where(pool, template, message, line):
    with pytest.raises(TemplateError, match=message) as error:
        pool.render(template, {"messages": []})
    assert error.value.line == line
    assert line is None or f"line {line}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_doubling_a_string_ends_at_the_memory_limit(pool):
    template = (
        "{% set ns = namespace(s='ab') %}{% for n in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    )
    with pytest.raises(TemplateError, match=r"needs more than 512 MiB|ran for more than"):
        pool.render(template, {})


def test_an_endless_template_is_ended_and_the_next_one_rendered(pool):
    started = time.process_time()
    with pytest.raises(TemplateError, match=r"ran for more than 0\.5 s"):
        pool.render(ENDLESS, {})
    assert time.process_time() - started < CPU_SECONDS  # none of it was spent here
    assert pool.render("{{ 1 }}", {}) == "1"


def test_an_endless_template_does_not_stop_others(pool):
    def run_endlessly():
        with pytest.raises(TemplateError):
            pool.render(ENDLESS, {})

    thread = threading.Thread(target=run_endlessly)
    thread.start()
    assert pool.render("{{ 1 }}", {}) == "1"
    thread.join()


def test_many_threads(pool):
    results = {}

    def render(n):
        results[n] = pool.render("{{ n }}", {"n": n})

    threads = [threading.Thread(target=render, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: str(n) for n in range(20)}


@given(template=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=6).map("".join))
@settings(max_examples=150)
def test_any_template_is_answered(pool, template):
    try:
        text = pool.render(template, {"messages": [{"role": "user"}], "x": None})
    except TemplateError as error:
        text = str(error)
    assert isinstance(text, str)


def test_processes_end_with_the_pool():
    pool = TemplatePool(TemplateLimits())
    pool.render("x", {})
    (process,) = [process for process in pool._idle.queue if process is not None]
    pool.close()
    assert process.poll() is not None
