"""Templates that come with a checkpoint: what they may cost, and that ordinary ones notice nothing."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.processing import ChatTemplate, budget

HELLO = [{"role": "user", "content": "Hello"}]
ALPHABET = "{% set a = 'abcdefghijklmnopqrstuvwxyz' * 4000 %}"
DOUBLED = "{% set ns = namespace(l=['x'], m=['x']) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"

HOSTILE = {
    "nested ranges": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "power": "{{ 10**(10**8) }}", "power in steps": "{% set x = 10**500 %}{{ x ** x }}",
    "product of numbers": "{% set ns = namespace(n=3) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "lipsum": "{{ lipsum(10**7) }}", "repeated text": "{{ 'a'*10**9 }}", "text repeated": "{{ 10**9 * 'a' }}",
    "percent": "{{ '%1000000000d' % 1 }}", "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent with a key": "{{ '%((a))1000000000d' % {'(a)': 1} }}", "format filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'|center(10**9) }}", "center method": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}", "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}", "str.format": "{{ '{:1000000000d}'.format(1) }}",
    "format_map": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 4000000}) }}",
    "tojson": "{{ [[1]] | tojson(indent=10**9) }}", "tojson separators": "{{ [1, 2] | tojson(separators=['a'*99, ':']) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}", "slice": "{{ [1]|slice(10**9)|list }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}", "round": "{{ 1.5|round(100000000, 'ceil') }}",
    "wide indent": ALPHABET + "{{ ((a ~ '\n') * 20)|indent(a) }}",
    "join": ALPHABET + "{{ range(99999)|join(a) }}", "join method": ALPHABET + "{{ a.join(range(99999)|map('string')) }}",
    "replace": ALPHABET + "{{ a|replace('a', a) }}", "replace method": ALPHABET + "{{ a.replace('', a) }}",
    "doubled text": "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "added text": "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "many texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
                  "{% set ns.l = ns.l + ['abcdefgh' * 500000 ~ i] %}{% endfor %}",
    "doubled lists printed": DOUBLED + "{{ ns.l }}", "doubled lists": DOUBLED + "{{ ns.l | tojson }}",
    "doubled lists compared": DOUBLED.replace("[ns.l, ns.l] %}", "[ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}")
                              + "{{ ns.l == ns.m }}",
    "lists in namespaces": "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = namespace(a=ns.a, b=ns.a) %}"
                           "{% endfor %}{{ ns }}",
    "repeated lists": "{% set l = range(9999)|list * 9999 %}{{ l|length }}",
    "doubled tuples as keys": "{% macro f(d) %}{% if d %}{{ f(d - 1, varargs, varargs) }}{% else %}{{ {varargs: 1} }}"
                              "{% endif %}{% endmacro %}{{ f(60) }}",
    "output": ALPHABET + "{% for i in range(9999) %}{{ a }}{% endfor %}",
    "output of its own text": "{% for i in range(90000) %}" + "abcdefgh" * 1000 + "{% endfor %}",
    "output kept": ALPHABET + "{% set x %}{% for i in range(9999) %}{{ a }}{% endfor %}{% endset %}",
    "joined in place": ALPHABET * 5 + "{% set x = " + " ~ ".join("a" for _ in range(900)) + " %}",
    "macros that recurse": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros that branch": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(25) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "sums of lists": "{{ ([range(9999)|list] * 9999)|sum(start=[]) }}", "to_bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "urlize": "{{ ('http://a.' * 400000)|urlize }}", "long date": "{{ strftime_now('%Y' * 100000) }}",
    "escapes": "{% autoescape true %}{% set ns = namespace(t='<&' * 900000) %}{% for i in range(20) %}"
               "{% set ns.t = ns.t|string|escape %}{% endfor %}{% endautoescape %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.3)
    started = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(HerdError, match="chat template") as caught:
            ChatTemplate(HOSTILE[name], {}).render(HELLO)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert time.thread_time() - started < 4
    assert peak < 200 << 20
