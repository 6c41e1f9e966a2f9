"""A report of one result as one html file, pictures inside: what was scored, how, and what to compare it with."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffjax.evaluation import published
from diffjax.evaluation.standard import Images
from diffjax.trees import leaves

NEIGHBOURS, SHOWN = 5, 8  # of how many samples, how many nearest images of the reference
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .2rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr + tr td { border-top: 1px solid #ddd }
td.text { text-align: left; color: #555 } img { max-width: 100%; image-rendering: pixelated }
.caveat { background: #fff3d6; padding: .5rem .8rem }
"""


def page(
    title: str,
    result: Mapping[str, Any],
    pictures: Mapping[str, np.ndarray],
    *,
    size: int,
    caveat: str = "",
) -> str:
    """The html of a report.

    Args:
        title: what was scored, one line.
        result: as `protocol.result` makes it.
        pictures: uint8 [h, w, 3] under their headings, in order.
        size: side of the images, of which published scores are shown.
        caveat: a warning about the scores, one line; "" for none.
    """
    parts = [f"<h1>{_text(title)}</h1>"]
    parts += [f'<p class="caveat">{_text(caveat)}</p>'] if caveat else []
    parts += ["<h2>Scores</h2>", _scores(result["values"])]
    for heading, picture in pictures.items():
        parts += [
            f"<h2>{_text(heading)}</h2>",
            f'<img alt="{_text(heading)}" src="data:image/png;base64,{_png(picture)}">',
        ]
    if rows := [row for row in published.ROWS if row.size == size and row.values.keys() & result["values"].keys()]:
        parts += ["<h2>Published scores</h2>", _published(rows, result)]
    parts += ["<h2>Protocol</h2>", _fields(result["protocol"]), "<h2>Subject</h2>", _fields(result["subject"])]
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>' + (
        f"<style>{STYLE}</style>\n<body>\n{body}\n</body></html>\n"
    )


def nearest(images: Images, reference: Images, kind: str) -> np.ndarray:
    """Numbers int64 [SHOWN, NEIGHBOURS] of the images of the reference nearest to the first samples, by features."""
    features = images.features[kind][:SHOWN].astype(np.float64)
    known = reference.features[kind].astype(np.float64)
    squared = np.square(known).sum(axis=1) - 2 * features @ known.T
    return np.argsort(squared, axis=1, kind="stable")[:, :NEIGHBOURS]


def _scores(values: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [("score", "value", "95 % interval", "spread", "held-out real images", "rule")]
    for name, column in values.items():
        bounds = " to ".join(f"{bound:.4f}" for bound in column["interval"]) if "interval" in column else ""
        others = [f"{column[key]:.4f}" if key in column else "" for key in ("spread", "held_out_real")]
        rows.append((name, f"{column['value']:.4f}", bounds, *others, column.get("rule", "")))
    return _table(rows)


def _published(rows: Sequence[published.Published], result: Mapping[str, Any]) -> str:
    names = [name for name in result["values"] if any(name in row.values for row in rows)]
    table = [("", *names, "protocol")]
    own = [f"{result['values'][name]['value']:.4g}" for name in names]
    table.append(("this result", *own, ""))
    for row in rows:
        differing = row.differing(result["protocol"])
        said = f"different: {', '.join(differing)}" if differing else "same, as far as it is stated"
        table.append((row.name, *(f"{row.values[name]:g}" if name in row.values else "" for name in names), said))
    return _table(table)


def _fields(tree: Mapping[str, Any]) -> str:
    return _table([("field", "value"), *((name, str(value)) for name, value in leaves(tree).items())])


def _table(rows: Iterable[Sequence[str]]) -> str:
    """The first row is the head; the last cell of others is text, which is aligned to the left."""
    head, *others = rows
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    for *cells, last in others:
        first = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        lines.append(f'<tr>{first}<td class="text">{_text(last)}</td></tr>')
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _text(value: str) -> str:
    return html.escape(value)
