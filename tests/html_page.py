"""What an HTML page holds, read with the standard library's parser, and whether it is well formed."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
_SVG_LEAVES = {"path", "use", "rect", "line", "circle"}  # these close themselves with a slash


class Page(HTMLParser):
    """A page, parsed.

    Attributes:
        faults: tags that do not match, and ids or attributes that are there twice.
        words: all visible text, with single spaces.
        texts: by tag, the text of every element of that kind.
        addresses: everything that an attribute names to be fetched or followed.
        tags: every tag that opens.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self._open: list[tuple[str, list[str]]] = []
        self._ids: set[str] = set()
        self._words: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag, _ in self._open]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._meet(tag, attrs)
        if tag in _SVG_LEAVES:
            self.faults.append(f"<{tag}> is left open")
        if tag not in VOID:
            self._open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._meet(tag, attrs)
        if tag not in _SVG_LEAVES:
            self.faults.append(f"<{tag}/> is no empty element of HTML")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.faults.append(f"</{tag}> closes {self._open[-1][0] if self._open else 'nothing'}")
            return
        _, parts = self._open.pop()
        self.texts.setdefault(tag, []).append(" ".join("".join(parts).split()))
        if self._open:
            self._open[-1][1].append(f" {''.join(parts)} ")

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)
        if not any(tag in ("style", "head") for tag, _ in self._open):
            self._words.append(data)

    def _meet(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        self.faults += [f"<{tag}> has {name} twice" for name in set(names) if names.count(name) > 1]
        for name, value in attrs:
            if name == "id":
                if value in self._ids:
                    self.faults.append(f"id {value} is there twice")
                self._ids.add(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.faults.append(f"<{tag}> has a script in {name}")
            if name == "aria-labelledby" and value is not None:
                self.labels.append(value)
        if tag == "title" and self._open and self._open[-1][0] == "svg":
            self.faults.append("an image's title would be shown twice")

    def unknown_labels(self) -> list[str]:
        """Ids that labels point at and that are not there."""
        return [label for label in self.labels if label not in self._ids]
