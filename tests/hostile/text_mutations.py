"""Ways to hurt JSON, TOML, CSV and other texts: values of other types, huge numbers, deep nesting, odd characters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any

from hostile.byte_mutations import Mutation

_DEEP = "@@deep@@"
ODD_TEXTS = (
    *("", "x" * 100_000, "\ud800", "\0", "a\nb", "\x1b[31m", "../../x", "/dev/zero", "é" * 200, "{}", "NaN", "[red]"),
    *("%s%n", "‮", "sha256:" + "0" * 64, "1e999", "-1", "trt", "blocks.0.attn"),
)
ODD_NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**63, -(2**64), 10**400, 1e308, -1e-308, 0.5, float("nan"), float("inf"))


def odd_value(rng: Random) -> Any:
    """A value that hardly ever fits."""
    return rng.choice(
        (
            *(None, True, False, [], {}, [[]], {"": 0}, [0] * 10_000, _DEEP, [None], "9" * 5000),
            *ODD_TEXTS,
            *ODD_NUMBERS,
        )
    )


def hurt_document(document: Any, rng: Random) -> Any:
    """The document with one or a few values, keys or places changed."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(document))
        if not places:
            return odd_value(rng)
        parent, key = rng.choice(places)
        kind = rng.choice(("replace", "replace", "replace", "delete", "add", "swap", "scale", "rename", "repeat"))
        if kind == "replace":
            parent[key] = odd_value(rng)
        elif kind == "delete":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[rng.choice(("colour", "", "format", "\ud800", str(key).upper()))] = odd_value(rng)
        elif kind == "swap":
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                parent[key], other[name] = other[name], parent[key]
        elif kind == "scale" and isinstance(parent[key], int | float):
            parent[key] *= rng.choice((-1, 2, 1e9, 0, 1e-9))
        elif kind == "rename" and isinstance(parent, dict):
            parent[rng.choice(ODD_TEXTS)[:50]] = parent.pop(key)
        elif kind == "repeat" and isinstance(parent, list):
            parent.extend(parent[key] for _ in range(rng.choice((1, 3, 1000))))
    return document


def spelled(document: Any, rng: Random) -> str:
    """The document as JSON, sometimes spelled in an odd way."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 2)))
    deep = rng.choice((500, 5000, 200_000))
    text = text.replace(f'"{_DEEP}"', rng.choice(("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep)))
    if rng.random() < 0.1:  # a key twice
        text = re.sub(r"\{", lambda match: '{"format": 7, ' if rng.random() < 0.2 else match[0], text)
    return text


def hurt_json(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return spelled(hurt_document(json.loads(data), rng), rng).encode(errors="surrogatepass")


def other_digit(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """One digit of a number or of a digest is another."""
    places = [match.start() for match in re.finditer(rb"\d", data)]
    if not places:
        return data
    at = rng.choice(places)
    return data[:at] + rng.choice([b"%d" % digit for digit in range(10)]) + data[at + 1 :]


def other_encoding(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    text = data.decode(errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-be")))


def hurt_csv(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    rows = [line.split(",") for line in data.decode().splitlines()]
    odd = (
        *('"', '"a', "'", "", " ", "9" * 5000, "1.5", "-1", "1", " 2", "1_0", "x" * 200_000, "a\0b", "0x1"),
        *("\ufeff", ";", "a\nb", "é", "../001.png", "/etc/passwd", "001.png", "NaN", "class 3", "=1+1", "\ud800"),
    )
    for _unused in range(rng.choice((1, 1, 2, 5))):
        row = rng.choice(rows)
        kind = rng.choice(("cell", "cell", "cell", "shorter", "longer", "repeat", "drop", "shuffle"))
        if kind == "cell" and row:
            row[rng.randrange(len(row))] = rng.choice(odd)
        elif kind == "shorter" and row:
            del row[rng.randrange(len(row))]
        elif kind == "longer":
            row.append(rng.choice(odd))
        elif kind == "repeat":
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        elif kind == "drop" and len(rows) > 1:
            rows.remove(row)
        elif kind == "shuffle":
            rng.shuffle(rows)
    return rng.choice(("\n", "\n", "\r\n", "\r")).join(map(",".join, rows)).encode(errors="surrogatepass")


def hurt_toml(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    lines = data.decode().splitlines()
    deep = rng.choice((50, 2000, 50_000))
    odd = (
        *("true", "[]", "{}", "''", '""', "nan", "-inf", "-1", "0", "1e400", "9" * 5000, "1979-05-27", "0x10", "1_0"),
        *('"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"""', "[" * deep + "]" * deep, "{a=" * deep + "1" + "}" * deep),
        *('"/dev/null"', '"/"', '"."', '"é"', '"random"', "[1, 'a']", "9223372036854775808", f'"{"x" * 5000}"', "0.2"),
    )
    for _unused in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        key, equals, _value = lines[at].partition("=")
        kind = rng.choice(("value", "value", "value", "drop", "repeat", "section", "key", "comment"))
        if kind == "value" and equals:
            lines[at] = f"{key}= {rng.choice(odd)}"
        elif kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "repeat":
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == "section":
            lines.insert(at, rng.choice(("[model]", "[[freeze]]", "[nosuch]", "[model.kwargs]", "[profile", "[a.b.c]")))
        elif kind == "key" and equals:
            lines[at] = f"{rng.choice(('colour', '', 'a.b', 'name', chr(34) * 2, 'data'))} ={_value}"
        elif kind == "comment":
            lines[at] = f"{lines[at]} # {rng.choice(ODD_TEXTS[2:8])}"
    return "\n".join(lines).encode(errors="surrogatepass")


def hurt_lines(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """Numbers of a text are others, words are left out, lines run into each other."""
    words = re.split(r"(\s+)", data.decode(errors="replace"))
    for _unused in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(words))
        word = words[at]
        words[at] = rng.choice(
            (
                *("", word * 2, word + word[::-1], re.sub(r"\d+", rng.choice(("", "9" * 12, "-1", "0", "٣")), word)),
                *(rng.choice(ODD_TEXTS)[:200], word.upper(), f"[{word}]", word.replace("@", ""), word + "%"),
            )
        )
    return "".join(words).encode(errors="surrogatepass")


JSON_MUTATIONS: Mapping[str, Mutation] = MappingProxyType(
    {"hurt_json": hurt_json, "other_digit": other_digit, "other_encoding": other_encoding}
)
CSV_MUTATIONS: Mapping[str, Mutation] = MappingProxyType({"hurt_csv": hurt_csv, "other_encoding": other_encoding})
TOML_MUTATIONS: Mapping[str, Mutation] = MappingProxyType({"hurt_toml": hurt_toml, "other_encoding": other_encoding})
LINE_MUTATIONS: Mapping[str, Mutation] = MappingProxyType({"hurt_lines": hurt_lines, "other_digit": other_digit})


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every place in the document as what holds it and the key or index there."""
    found: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        for key, value in document.items():
            found += [(document, key), *_places(value)]
    elif isinstance(document, list):
        for index, value in enumerate(document):
            found += [(document, index), *_places(value)]
    return found
