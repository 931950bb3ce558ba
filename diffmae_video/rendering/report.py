"""One-page HTML reports: text, tables, curves, images and videos in a single file that opens anywhere.

The file asks nothing of the network or of its folder: pictures and videos are embedded, curves are inline SVG by
matplotlib, and a Content-Security-Policy forbids everything else. It follows the reader's light or dark setting. Every
text that reaches the page is escaped, since file names and labels come from strangers.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffmae_video.files import write_atomic
from diffmae_video.rendering.figures import COLOURS, clean_points, curves_svg

_MAGIC = (  # (offset, bytes, media type): what the bytes say, never what the name says
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
)

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#60646c;--line:#d9d9e0;--page:#fcfcfd;--card:#fff;--zebra:#f6f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#edeef0;--soft:#a0a5ae;--line:#363a3f;--page:#111113;--card:#18191b;
--zebra:#1f2124}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 1.25rem}
h2{font-size:1.1rem;margin:0 0 .6rem}
section,details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.15rem;
margin:0 0 1rem}
p{margin:.4rem 0;max-width:46rem;overflow-wrap:anywhere}
code,pre{font:.88em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{background:var(--zebra);border-radius:4px;padding:.1em .3em}
pre{overflow-x:auto;margin:.75rem 0 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.4rem .7rem;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th{color:var(--soft);font-weight:600}
tbody tr:nth-child(even){background:var(--zebra)}
td.n,th.n{text-align:right;white-space:nowrap}
img,video{display:block;max-width:100%;height:auto;border-radius:6px}
.small{image-rendering:pixelated}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;color:var(--soft);font-size:.9rem;margin:.4rem 0 0}
.legend i{display:inline-block;width:1.1rem;height:.22rem;margin-right:.4rem;vertical-align:middle;border-radius:2px}
summary{cursor:pointer;font-weight:600}
.note{color:var(--soft)}
"""


class Report:
    """A page that grows from top to bottom: add parts in the order a reader should meet them, then `write`.

    Example:
        >>> report = Report("Pre-training")
        >>> report.text("Finished after **1000** steps.")
        >>> report.curves("Loss", {"train": ([1, 2, 3], [0.9, 0.5, 0.4])}, x_label="step")
        >>> report.write("report.html")
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def text(self, markdown: str) -> None:
        """Add paragraphs, separated by blank lines; knows `**bold**`, `` `code` `` and lines that start with `- `."""
        blocks = [_paragraph(block) for block in re.split(r"\n\s*\n", markdown.strip()) if block.strip()]
        self._parts.append("".join(blocks))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """Add a table; columns whose cells are all numbers (or `None`, shown as `-`) stand right-aligned.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: a row has {len(row)} cells, the header {len(columns)}")
        numeric = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(columns))]
        mark = [' class="n"' if number else "" for number in numeric]
        head = "".join(f"<th{m}>{_escape(c)}</th>" for c, m in zip(columns, mark, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{m}>{_escape(_cell(v))}</td>" for v, m in zip(row, mark, strict=True)) + "</tr>"
            for row in rows
        )
        table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        self._section(title, table, note)

    def image(self, title: str, image: bytes | np.ndarray | str | os.PathLike[str], note: str = "") -> None:
        """Add a picture: PNG, JPEG or GIF as bytes or a path, or a uint8 array (H, W, 3) or (H, W).

        Raises:
            ValueError: the bytes are none of these formats, or the array has another shape or type.
        """
        data = _png(image) if isinstance(image, np.ndarray) else _bytes(image)
        small = ""
        if isinstance(image, np.ndarray) and image.shape[1] <= 240:  # tiny clips: whole pixels, large enough to see
            small = f' class="small" width="{image.shape[1] * (480 // image.shape[1])}"'
        self._section(title, f'<img{small} alt="{_escape(title)}" src="{_data_url(data, "image/")}">', note)

    def video(self, title: str, video: bytes | str | os.PathLike[str], note: str = "") -> None:
        """Add a video that browsers can play (MP4 or WebM; a GIF becomes a picture), as bytes or a path.

        Raises:
            ValueError: the bytes are none of these formats.
        """
        data = _bytes(video)
        if data[:4] == b"GIF8":
            self.image(title, data, note)
            return
        player = f'<video controls loop muted playsinline preload="metadata" src="{_data_url(data, "video/")}"></video>'
        self._section(title, player, note)

    def curves(
        self,
        title: str,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        *,
        x_label: str = "step",
        y_label: str = "",
        log_y: bool = False,
        note: str = "",
    ) -> None:
        """Add a chart of named curves `{name: (x, y)}`; points that are not finite (with `log_y`: positive) drop out.

        Raises:
            ValueError: x and y of a curve differ in length.
        """
        curves = {name: clean_points(x, y, log_y) for name, (x, y) in series.items()}
        curves = {name: points for name, points in curves.items() if len(points[0])}
        if not curves:
            self._section(title, '<p class="note">No values yet.</p>', note)
            return
        legend = []
        for index, (name, (_, y)) in enumerate(curves.items()):
            key = f'<i style="background:{COLOURS[index % len(COLOURS)]}"></i>'
            legend.append(f"<span>{key}{_escape(name)}: {y[-1]:.4g} at the end</span>")
        if scale := ", ".join(filter(None, (y_label, "logarithmic" if log_y else ""))):
            legend.append(f"<span>vertical: {_escape(scale)}</span>")
        chart = curves_svg(curves, x_label=x_label, log_y=log_y)
        self._section(title, f'{chart}<div class="legend">{"".join(legend)}</div>', note)

    def settings(self, toml: str, title: str = "Settings") -> None:
        """Add a folded block of settings, verbatim."""
        self._parts.append(f"<details><summary>{_escape(title)}</summary><pre>{_escape(toml)}</pre></details>")

    def html(self) -> str:
        """The whole page."""
        policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body><main><h1>{_escape(self.title)}</h1>\n" + "\n".join(self._parts) + "\n</main></body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page atomically: readers see the old file or the new one, never half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.html())
        return path

    def _section(self, title: str, body: str, note: str) -> None:
        note = f'<p class="note">{_inline(note)}</p>' if note else ""
        self._parts.append(f"<section><h2>{_escape(title)}</h2>{body}{note}</section>")


def _escape(text: object) -> str:
    # Lone surrogates stand for bytes of file names that are not UTF-8; they cannot be written.
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"), quote=True)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _paragraph(block: str) -> str:
    lines = block.strip().splitlines()
    if all(line.lstrip().startswith("- ") for line in lines):
        return "<ul>" + "".join(f"<li>{_inline(line.lstrip()[2:])}</li>" for line in lines) + "</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{float(value):.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _bytes(source: bytes | str | os.PathLike[str]) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _png(array: np.ndarray) -> bytes:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"image: needs uint8 (H, W, 3) or (H, W), not {array.dtype} {array.shape}")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_url(data: bytes, family: str) -> str:
    for offset, magic, media in _MAGIC:
        if data[offset : offset + len(magic)] == magic and media.startswith(family):
            return f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"
    known = ", ".join(media for _, _, media in _MAGIC if media.startswith(family))
    raise ValueError(f"the bytes are none of {known}")
