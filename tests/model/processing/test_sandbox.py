"""Templates that come with a checkpoint: what they may cost, and that ordinary ones notice nothing."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.processing import ChatTemplate, budget

HELLO = [{"role": "user", "content": "Hello"}]
ALPHABET = "{% set a = 'abcdefghijklmnopqrstuvwxyz' * 4000 %}"
DOUBLED = "{% set ns = namespace(l=['x'], m=['x']) %}" \
          "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"

HOSTILE = {
    "nested ranges": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "power": "{{ 10**(10**8) }}", "power in steps": "{% set x = 10**500 %}{{ x ** x }}",
    "product of numbers":
        "{% set ns = namespace(n=3) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "lipsum": "{{ lipsum(10**7) }}", "repeated text": "{{ 'a'*10**9 }}", "text repeated": "{{ 10**9 * 'a' }}",
    "percent": "{{ '%1000000000d' % 1 }}", "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent with a key": "{{ '%((a))1000000000d' % {'(a)': 1} }}", "format filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'|center(10**9) }}", "center method": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}", "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}", "str.format": "{{ '{:1000000000d}'.format(1) }}",
    "format_map": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 4000000}) }}",
    "tojson": "{{ [[1]] | tojson(indent=10**9) }}",
    "tojson separators": "{{ [1, 2] | tojson(separators=['a'*99, ':']) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}", "slice": "{{ [1]|slice(10**9)|list }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}", "round": "{{ 1.5|round(100000000, 'ceil') }}",
    "wide indent": ALPHABET + "{{ ((a ~ '\n') * 20)|indent(a) }}",
    "join": ALPHABET + "{{ range(99999)|join(a) }}",
    "join method": ALPHABET + "{{ a.join(range(99999)|map('string')) }}",
    "replace": ALPHABET + "{{ a|replace('a', a) }}", "replace method": ALPHABET + "{{ a.replace('', a) }}",
    "doubled text": "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "added text": "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "many texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
                  "{% set ns.l = ns.l + ['abcdefgh' * 500000 ~ i] %}{% endfor %}",
    "doubled lists printed": DOUBLED + "{{ ns.l }}", "doubled lists": DOUBLED + "{{ ns.l | tojson }}",
    "doubled lists compared": DOUBLED.replace("[ns.l, ns.l] %}", "[ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}")
                              + "{{ ns.l == ns.m }}",
    "lists in namespaces": "{% set ns = namespace(a=1) %}{% for i in range(60) %}"
                           "{% set ns.a = namespace(a=ns.a, b=ns.a) %}{% endfor %}{{ ns }}",
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
    "sums of lists": "{{ ([range(9999)|list] * 9999)|sum(start=[]) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "urlize": "{{ ('http://a.' * 400000)|urlize }}", "long date": "{{ strftime_now('%Y' * 100000) }}",
    "pieces": "{% set a = '- ' * 500000 %}{% for i in range(99) %}{% set b = a.split() + a|list %}{% endfor %}",
    "searches": "{% set a = 'ab' * 500000 %}{% for i in range(99999) %}{% set b = 'zz' in a %}{% endfor %}",
    "variables": "".join(f"{{% set a{i} = 'x' * 1000000 %}}" for i in range(300)),
    "block of a filter": "{% filter upper %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endfilter %}",
    "condition of a loop": "{% for x in range(99999) if range(99999)|list|length == 3 %}{% endfor %}",
    "attribute filter": "{{ ('a'|attr('center'))(1000000000) }}", "subscript": "{{ 'a'['center'](1000000000) }}",
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


BROKEN = {
    "nested too deeply": "{% if x %}" * 5000 + "{% endif %}" * 5000,
    "nested brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "nested lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}", "break outside of a loop": "{% break %}",
    "unknown tag": "{% nothing %}", "unknown filter": "{{ 1|nothing }}", "too long": "x" * 200_000,
    "many operators": "{{ " + "-" * 20000 + "1 }}", "many names": "{{ a" + ".a" * 20000 + " }}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_templates(name: str) -> None:
    with pytest.raises(HerdError, match="the checkpoint's chat template") as caught:
        ChatTemplate(BROKEN[name], {})
    assert "\n" not in str(caught.value)


ORDINARY = {
    "{% for m in messages[1:] %}{{ m.role|upper ~ ':' ~ m['content']|trim }};{% endfor %}": "USER:b;",
    "{{ messages|map(attribute='role')|join(', ') }}": "system, user",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "1",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}": "3",
    "{% macro show(m, n=2) %}[{{ m.content * n }}]{% endmacro %}{{ show(messages[1]) }}{{ show(messages[0], n=1) }}":
        "[ b  b ][a]",
    "{{ tools|tojson(indent=4) }}":
        json.dumps([{"name": "f", "x": ["\u00e9", 1, None]}], indent=4, ensure_ascii=False),
    "{{ tools|tojson }}": '[{"name": "f", "x": ["\u00e9", 1, null]}]', "{{ '%s-%02d'|format('a', 7) }}": "a-07",
    "{{ 'a\nb'|indent(2) }}": "a\n  b", "{{ messages[0].content.replace('a', 'xyz') }}": "xyz",
    "{% for k, v in tools[0].items() %}{{ k }}{% if not loop.last %},{% endif %}{% endfor %}": "name,x",
    "{{ 'yes' if 'b' in messages[1].content.split('x')[-1] else 'no' }}": "yes", "{{ 2 ** 10 + 5 % 3 }}": "1026",
    "{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}{{ loop.index }}{% endfor %}": "2",
    "{{ (messages + [{'role': 'x'}])|length }}{{ [1, 2] * 2 }}": "3[1, 2, 1, 2]",
    "{{ messages[-1].get('no', 'd') }}": "d",
    "{% set t %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ t|replace('1', '-') }}": "0-2",
    "{{ none }}{{ undefined_name }}{{ true }}": "NoneTrue", "{{ (1, 'a')|last }}{{ {'a': 1} }}": "a{'a': 1}",
}


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates(source: str) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": " b "}]
    tools = [{"name": "f", "x": ["\u00e9", 1, None]}]
    assert ChatTemplate(source, {}).render(messages, tools=tools) == ORDINARY[source]


def test_long_conversations() -> None:
    """What a template may cost grows with what it is given."""
    messages = [{"role": "user", "content": f"{index} " * 500} for index in range(300)]
    source = ("{% set ns = namespace(seen=[], text='') %}{% for m in messages %}"
              "{% set ns.seen = ns.seen + [m.content] %}{% set ns.text = ns.text + m.content|trim %}"
              "{{ m.content|trim }}{% endfor %}{{ ns.text|length }}")
    text = "".join(message["content"].strip() for message in messages)
    assert ChatTemplate(source, {}).render(messages) == f"{text}{len(text)}"


def test_budgets_of_threads_are_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}", {})
    with ThreadPoolExecutor(4) as pool:
        rendered = set(pool.map(lambda _: template.render(HELLO), range(8)))
    assert rendered == {"Hello" * 2000}
