"""Valid files made hostile: a few of their values or bytes changed to what breaks readers. Same numbers, same file."""

import copy
import json
import struct
from random import Random
from typing import Any

NUMBERS = [
    0, 1, -1, 2, 3, 7, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 53, 1 << 60, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1, -(1 << 63), 10**30, 0.5, -0.5, 1e-320, 1e308, -0.0, float("nan"), float("inf"),
]  # fmt: skip
WORDS = [
    "", " ", ".", "..", "/", "a", "../model.safetensors", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "~",
    "a/b.safetensors", "model.safetensors", "config.json", "\x00", "a\x00b", "\n", "\x1b[31m", "\u202e", "\ud800",
    "é" * 40,
    "x" * 5000, "[/]", "{{ 1 }}", "%s%n", "re:(a+)+$", r"re:(\w+\.?)+!", "re:(", "re:.*", "*", "-1", "1e9", "0x", "nan",
    "!!python/object/apply:os.system ['true']", "os:system", "auto_map", "float16", "bfloat16", "F8_E8M0", "llama",
    "qwen3", "awq", "gptq", "compressed-tensors", "group", "channel", "pack-quantized", "yarn", "longrope", "dynamic",
]  # fmt: skip


def nasty(rng: Random) -> Any:
    """A value of any type that JSON has, from the ones that readers forget."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(WORDS)
    if kind == 6:
        return rng.choice([None, True, False])
    if kind == 7:
        return rng.choice([[], {}, [[]], {"": {}}, [None], {"a": [1, {"b": None}]}, ["Linear"], [1] * 1000])
    if kind == 8:
        value: Any = rng.choice(WORDS)
        for _ in range(rng.choice([2, 10, 63, 64, 65, 200])):
            value = [value] if rng.randrange(2) else {"a": value}
        return value
    return [rng.choice(NUMBERS), rng.choice(WORDS)]


def changed(rng: Random, value: Any) -> Any:
    """The value with one to four of what is inside it replaced, removed, doubled, renamed or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        places = list(_places(value))
        if not places or rng.randrange(200) == 0:
            return nasty(rng)
        holder, key = rng.choice(places)
        what = rng.randrange(9)
        if what < 4:
            holder[key] = nasty(rng)
        elif what == 4:
            del holder[key]
        elif what == 5 and type(holder[key]) in (int, float):
            holder[key] += rng.choice([-1, 1, 1 << 32])
        elif what == 6:
            other, from_key = rng.choice(places)
            if isinstance(other, dict) and from_key in other:
                holder[key] = copy.deepcopy(other[from_key])
        elif isinstance(holder, dict):
            holder[rng.choice(WORDS) if what == 7 else f"{key}_"] = holder.pop(key) if what == 7 else nasty(rng)
        else:
            holder.insert(rng.randint(0, len(holder)), nasty(rng))
    return value


def _places(value: Any, depth: int = 0) -> Any:
    if depth > 12:
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key], depth + 1)


def as_json(rng: Random, value: Any) -> bytes:
    """JSON of the changed value; of one in ten the bytes are damaged besides."""
    text = json.dumps(changed(rng, value), indent=rng.choice([None, 2]), ensure_ascii=rng.randrange(2) == 0)
    data = text.encode("utf-8", errors="surrogatepass")
    return damaged(rng, data) if rng.randrange(10) == 0 else data


def damaged(rng: Random, data: bytes) -> bytes:
    """One to eight changes of the bytes: flipped, cut, put twice, or overwritten with a number that is too large."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        what, at = rng.randrange(8), rng.randrange(len(found) + 1)
        if what < 2 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            del found[at:]
        elif what == 3:
            del found[at : at + rng.randint(1, 64)]
        elif what == 4:
            found[at:at] = found[at : at + rng.randint(1, 64)]
        elif what == 5:
            number = rng.choice([0, 1 << 20, 1 << 31, 1 << 40, 1 << 60, (1 << 64) - 1])
            form = rng.choice(["<Q", "<I"])
            found[at : at + struct.calcsize(form)] = struct.pack(form, number & ((1 << 8 * struct.calcsize(form)) - 1))
        elif what == 6:
            found[at:at] = rng.choice(WORDS).encode("utf-8", errors="surrogatepass")
        else:
            found[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
        if not found:
            break
    return bytes(found)


def noise(rng: Random) -> bytes:
    """Random bytes, and now and then none."""
    return bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 7, 8, 9, 24, 100])))


_STATEMENTS = [
    "{{ messages }}", "{{ bos_token }}", "{{ messages[0]['content'] }}", "{{ messages[999].content }}", "{{ x.y.z }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}", "{% if add_generation_prompt %}a{% endif %}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}",
    "{{ messages.__class__.__base__.__subclasses__() }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__ }}",
    "{{ lipsum.__globals__['os'].system('true') }}", "{{ namespace(a=1).a }}", "{% set x = messages %}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'a' %}", "{{ messages.append(1) }}",
    "{{ 'a' * 100000000 }}", "{{ range(100000) | list | length }}", "{{ range(10**9) }}", "{{ '%s' | format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson }}",
    "{{ messages | tojson(indent=9999) }}",
    "{% generation %}a{% endgeneration %}", "{{ '{0.__class__}'.format(messages) }}", "{{ 9**9**3 }}", "{{", "{%", "}}",
    "{{ messages | map(attribute='__class__') | list }}", "{{ dict(a=1).update }}", "{# #}", "{% raw %}{% endraw %}",
    "{{ joiner.__init__.__globals__ }}", "{{ messages | attr('__class__') }}", "{{ 'x' | center(999999999) }}",
]  # fmt: skip


def template(rng: Random, valid: str) -> str:
    """A chat template: the valid one with statements put in that sandboxes are for."""
    parts = [valid] if rng.randrange(3) else []
    parts += [rng.choice(_STATEMENTS) for _ in range(rng.randint(1, 5))]
    rng.shuffle(parts)
    text = "".join(parts)
    return damaged(rng, text.encode()).decode("utf-8", errors="replace") if rng.randrange(4) == 0 else text


_LINES = [
    "<<: *a", "a: &a [*a]", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "!!python/object/apply:os.system ['true']",
    "x: !!python/name:os.system", "x: !include /etc/passwd", "x: !!binary AAAA", "x: 2001-99-99", "x: 0b_", "x: 0x_",
    "x: 190:20:30", "? [1, 2]\n: 3", "? {a: 1}\n: 3", "x: " + "9" * 5000, "x: .inf", "x: .nan", "---\na: 1", "...",
    "\t",
    "[" * 100, "{" * 100, "- " * 100, "? " * 100, "x: |\n  text", "x: 'a", 'x: "\\ud800"', "%YAML 9.9", "\x00", "é",
    "name: 'x\ny'", "model: /etc/passwd", "? ", ": ", "&a", "*a", "!", "!<x> y", "a: !!int ''", "a: !!timestamp 'x'",
]  # fmt: skip


def yaml_lines(rng: Random, valid: str) -> bytes:
    """A YAML file: the valid one with lines put in, taken out and indented otherwise; now and then damaged bytes."""
    lines = valid.splitlines()
    for _ in range(rng.randint(1, 4)):
        what, at = rng.randrange(5), rng.randrange(len(lines) + 1)
        if what == 0 and at < len(lines):
            del lines[at]
        elif what == 1:
            lines.insert(at, " " * rng.choice([0, 2, 4]) + rng.choice(_LINES))
        elif what == 2 and at < len(lines):
            lines[at] = " " * rng.choice([0, 2, 4]) + lines[at].lstrip()
        elif at < len(lines) and ":" in lines[at]:
            value = json.dumps(nasty(rng)) if rng.randrange(2) else str(nasty(rng))
            lines[at] = f"{lines[at].partition(':')[0]}: {value}"
    data = "\n".join(lines).encode("utf-8", errors="surrogatepass")
    return damaged(rng, data) if rng.randrange(10) == 0 else data
