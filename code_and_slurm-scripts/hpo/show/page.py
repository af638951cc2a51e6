"""The HTML of a report: one file, no network; readable on a telephone and on paper."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

MISSING = '<p class="missing">not drawn: '
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.4 system-ui, "DejaVu Sans", sans-serif; margin: 0 auto; max-width: 1200px;
        padding: 1rem 2rem 4rem; color: #222; }}
h1 {{ font-size: 1.6rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .2rem; }}  h3 {{ font-size: 1rem; margin: 0 0 .3rem; }}
nav {{ margin: 1.5rem 0 0; line-height: 1.8; }}  nav a {{ margin-right: 1rem; }}
p {{ margin: .2rem 0 .6rem; color: #555; }}
.tables {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
           gap: 1.5rem 2.5rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15rem 1rem .15rem 0; vertical-align: top; text-align: left;
          overflow-wrap: anywhere; }}
.facts td:first-child {{ overflow-wrap: break-word; }}
th {{ border-bottom: 1px solid #bbb; }}  .facts td:first-child {{ color: #555; min-width: 9rem; }}
.missing {{ border-left: 4px solid #ff9f40; padding: .3rem .8rem; }}
.wide {{ overflow-x: auto; }}
.wide td, .wide th {{ white-space: nowrap; font-size: .85rem; overflow-wrap: normal; }}
th button {{ all: unset; cursor: pointer; font-weight: bold; }}
th button:focus-visible {{ outline: 2px solid #1f77b4; }}
input {{ font: inherit; padding: .3rem .5rem; width: min(24rem, 90%); }}
.wide td:first-child, .wide th:first-child {{ position: sticky; left: 0; background: #fff; }}
.wide .different td {{ background: #fff3e0; }}
@media (max-width: 600px) {{
  body {{ padding: .5rem .8rem 2rem; font-size: 14px; }}
  .modebar {{ display: none; }}  /* it would lie over the legend */
}}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav, input, .files, #more, #found, .modebar {{ display: none !important; }}
  h2 {{ margin-top: 1rem; }}
  section {{ break-inside: avoid; }}  section.trials {{ break-inside: auto; }}
  .wide {{ overflow: hidden; }}  .panels {{ min-width: 0 !important; }}
  .wide td, .wide th {{ white-space: normal; font-size: 7pt; }}
  .trials td, .trials .wide th {{ white-space: nowrap; max-width: 12em; overflow: hidden;
                                  text-overflow: ellipsis; }}
}}
</style>
<script>{plotly_js}</script></head>
<body><h1>{title}</h1>
{sections}
<script>
function fit(change) {{ // every picture on paper: drawn wide enough, then made smaller as a whole
  document.querySelectorAll(".panels").forEach(
    box => change(box.querySelector(".plotly-graph-div"), box));
}}
window.onbeforeprint = () => fit((plot, box) => {{
  const width = Math.max(850, parseInt(box.style.minWidth));
  box.style.zoom = 680 / width;
  Plotly.relayout(plot, {{width: width}});
}});
window.onafterprint = () => fit((plot, box) => {{
  box.style.zoom = 1;
  Plotly.relayout(plot, {{width: null, autosize: true}});
}});
</script>
</body></html>
"""
TRIALS = """<section class="trials"><h2 id="trials">Trials</h2>
<p>{says}  Click on a column's name to sort by it.</p>
<p><input id="search" type="search" placeholder="search: words that a row must have"
    aria-label="search"> <span id="found"></span></p>
<div class="wide"><table><thead><tr id="head"></tr></thead><tbody id="rows"></tbody></table></div>
<p><button id="more">show all</button></p>
<noscript><p class="missing">This table needs JavaScript; trials.csv has the same.</p></noscript>
</section>
<script id="data" type="application/json">{data}</script>
<script>{code}</script>
"""
CODE = """
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = id => document.getElementById(id);
  const logs = new Set(data.logs), log = data.head.indexOf("log");
  let by = -1, down = false, most = 50;
  const text = cell => typeof cell === "number" && !Number.isInteger(cell)
    ? String(Number(cell.toPrecision(4))) : String(cell);
  function compare(a, b) {
    const x = a[by], y = b[by];
    if (x === "" || y === "") return (x === "") - (y === "");
    const both = typeof x === "number" && typeof y === "number";
    const order = both ? x - y : String(x).localeCompare(String(y), "en", {numeric: true});
    return down ? -order : order;
  }
  function cell(value, column) {
    const td = document.createElement("td");
    td.textContent = text(value);
    if (column === log && logs.has(value)) {
      const a = document.createElement("a");
      a.href = "LOGS/" + encodeURIComponent(value);
      a.textContent = value;
      td.replaceChildren(a);
    }
    return td;
  }
  function show() {
    const words = get("search").value.toLowerCase().split(/\\s+/).filter(Boolean);
    let rows = data.rows.filter(row => {
      const all = row.map(text).join(" ").toLowerCase();
      return words.every(word => all.includes(word));
    });
    if (by >= 0) rows = rows.slice().sort(compare);
    get("found").textContent = rows.length + " of " + data.rows.length;
    get("more").hidden = rows.length <= most;
    get("rows").replaceChildren(...rows.slice(0, most).map(row => {
      const tr = document.createElement("tr");
      tr.append(...row.map(cell));
      return tr;
    }));
    get("head").childNodes.forEach((th, column) => th.setAttribute("aria-sort",
      column !== by ? "none" : down ? "descending" : "ascending"));
  }
  data.head.forEach((name, column) => {
    const th = document.createElement("th"), button = document.createElement("button");
    button.textContent = name;
    button.onclick = () => { down = by === column && !down; by = column; show(); };
    th.append(button);
    get("head").append(th);
  });
  get("search").oninput = show;
  get("more").onclick = () => { most = Infinity; show(); };
  show();
})();
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Return the page; `sections` are HTML."""
    from plotly.offline import get_plotlyjs

    return PAGE.format(
        title=html.escape(title), sections="\n".join(sections), plotly_js=get_plotlyjs()
    )


def links(targets: Mapping[str, str]) -> str:
    """Return the list of what is on the page: anchor → title."""
    found = (f'<a href="#{html.escape(a)}">{html.escape(t)}</a>' for a, t in targets.items())
    return f"<nav>{' '.join(found)}</nav>"


def tables(named: Mapping[str, Mapping[str, str]]) -> str:
    """Return tables of two columns beside each other: title → name → value."""
    found = (
        f"<div><h3>{html.escape(title)}</h3>{pairs(rows)}</div>" for title, rows in named.items()
    )
    return f'<div class="tables">{"".join(found)}</div>'


def pairs(rows: Mapping[str, str]) -> str:
    """Return a table of two columns."""
    cells = (f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in rows.items())
    return f'<table class="facts">{"".join(cells)}</table>'


def _text(text: str) -> str:
    """Return a text as HTML; a long name may go on in the next line behind its _ or /."""
    return re.sub(r"([_/]+)(?=\w)", r"\1<wbr>", html.escape(text))


def section(anchor: str, title: str, body: str, says: str = "") -> str:
    """Return a part of the page; `body` is HTML."""
    text = f"<p>{html.escape(says)}</p>" if says else ""
    head = f'<h2 id="{html.escape(anchor)}">{html.escape(title)}</h2>'
    return f"<section>{head}{text}{body}</section>"


def missing(why: str) -> str:
    """Return what stands in the place of a picture that could not be drawn."""
    return f"{MISSING}{html.escape(why)}</p>"


def trials(data: str, says: str, logs: str) -> str:
    """Return the table that can be sorted and searched; `data` is JSON, `logs` a folder's URL."""
    code = CODE.replace("LOGS", logs.replace('"', "%22").replace("<", "%3C"))
    return TRIALS.format(data=data, says=html.escape(says), code=code)
