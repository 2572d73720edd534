"""A page as a reader's program sees it: refuses tags that do not nest, keeps texts, tables and attributes."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta"}


class ParsedPage(HTMLParser):
    """text: of everything but the style. tables: rows of cell texts. spans: (class, text) of an answer's pieces."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.style = ""
        self.tables: list[list[list[str]]] = []
        self.answers: list[list[tuple[str, str]]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs)))
        kind = dict(attrs).get("class")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif (tag, kind) == ("pre", "answer"):
            self.answers.append([])
        elif tag == "span" and self.inside("pre", "answer"):
            self.answers[-1].append((kind or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> is not HTML")

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if "style" in tags:
            self.style += data
            return
        self.text += data
        if tags and tags[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.inside("pre", "answer"):
            kind, text = self.answers[-1][-1]
            self.answers[-1][-1] = kind, text + data

    def inside(self, tag: str, kind: str) -> bool:
        return any((name, attributes.get("class")) == (tag, kind) for name, attributes in self.open)
