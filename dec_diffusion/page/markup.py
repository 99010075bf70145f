"""Elements of HTML from values; what is no `Html` is escaped where it is put in."""

import html
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"br", "circle", "img", "meta"})


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: Any) -> Html:
    """An element; children that are no `Html` are escaped, and so are all attributes.

    ``class_`` is ``class``, and an underscore inside a name a hyphen.
    """
    start = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{start}>" if name != "circle" else f"<{start}/>")
    inside = "".join(c if isinstance(c, Html) else escape(c) for c in children)
    return Html(f"<{start}>{inside}</{name}>")


def escape(value: Any) -> Html:
    """Any value as text for HTML; what no text can hold becomes a question mark."""
    # Names of files that are not UTF-8 arrive with surrogates.
    text = str(value).encode("utf-8", "replace").decode().replace("\0", "?")
    return Html(html.escape(text, quote=True))


def table(rows: Iterable[tuple[str, Any]]) -> Html:
    """A table of names and values, which scrolls where it is too wide."""
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", str(value))) for name, value in rows]
    return scroll(tag("table", tag("tbody", *lines)))


def scroll(table: Html) -> Html:
    """A table that scrolls where it is wider than the page."""
    return tag("div", table, class_="scroll")
