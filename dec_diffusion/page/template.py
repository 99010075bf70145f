"""What every page is made of before it says anything: the document, its style and its script."""

import base64
import hashlib

from dec_diffusion.page.markup import Html, tag


def document(title: str, *body: Html) -> Html:
    """The whole file: a policy that allows nothing but `STYLE`, `SCRIPT` and embedded pictures."""
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    script = tag("script", Html(SCRIPT))
    return Html("<!DOCTYPE html>\n" + tag("html", head, tag("body", *body, script), lang="en"))


STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #56626f; --paper: #fff; --card: #f6f7f9;
  --rule: #d9dee4; --heat: 72, 120, 207; --warn: #fff4e0; --warn-rule: #e09f3e; --good: #e8f5ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #a3adb8; --paper: #14181c;
  --card: #1d2329; --rule: #38414a; --warn: #3a2c12; --good: #15301f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 1280px;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .7rem; padding-top: .7rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; }
h4 { font-size: .85rem; font-weight: 600; margin: .6rem 0 .25rem; color: var(--faint); }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); font-size: .9rem; }
.lead { font-size: 1.1rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1rem; font-size: .9rem; }
a { color: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; }
thead th { color: var(--faint); font-size: .85rem; vertical-align: bottom; }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
.numbers th { overflow-wrap: normal; min-width: 3.5em; }
.numbers tbody th { min-width: 8em; }
.numbers thead th:first-child { text-align: left; }
tbody tr:first-child > * { border-top: 1px solid var(--rule); }
.heat td { background: rgba(var(--heat), calc(var(--p, 0) * .65)); min-width: 3.2em; }
.heat tbody th { white-space: nowrap; min-width: 0; }
.warning, .good { border-left: 4px solid var(--warn-rule); background: var(--warn);
  padding: .6rem .9rem; margin: .5rem 0; border-radius: 4px; overflow-wrap: anywhere; }
.good { border-color: #3fa66b; background: var(--good); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  24rem), 1fr)); margin-top: .8rem; }
.card { background: var(--card); border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
.card h3 { border-left: 6px solid; padding-left: .5rem; }
.card table { font-size: .82rem; width: 100%; }
.card th, .card td { padding: .15rem .4rem; }
.card tbody th { min-width: 6em; overflow-wrap: anywhere; }
.strip { display: flex; flex-wrap: wrap; gap: 4px; }
.strip img { width: 52px; height: 52px; object-fit: contain; border-radius: 3px; }
.pixels { image-rendering: pixelated; }
.bar { display: inline-block; height: .6em; background: #d65f5f; border-radius: 2px; }
.bar.low { background: #4878cf; }
svg { display: block; width: 100%; height: auto; background: var(--card); border-radius: 8px; }
circle { r: var(--r); opacity: .75; }
circle:hover { opacity: 1; stroke: var(--ink); stroke-width: 3px; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  font-size: .88rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin-right: .35em; }
#tip { position: fixed; z-index: 2; pointer-events: none; max-width: min(18rem, 90vw);
  padding: .5rem; font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere;
  background: var(--paper); border: 1px solid var(--rule); border-radius: 6px;
  box-shadow: 0 3px 14px rgba(0, 0, 0, .25); }
#tip .tile { width: 96px; height: 96px; margin-bottom: .3rem; background-repeat: no-repeat; }
.figure { max-width: 100%; height: auto; border-radius: 6px; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .8rem;
  border-radius: 6px; font-size: .85rem; }
"""


SCRIPT = """
const tip = document.getElementById("tip"), tile = tip.querySelector(".tile");
const part = (i, n) => n > 1 ? 100 * i / (n - 1) + "%" : "0";
document.getElementById("map").addEventListener("pointerover", event => {
  const dot = event.target.dataset, at = Number(dot.i);
  tip.hidden = dot.t === undefined;
  if (tip.hidden) return;
  tip.querySelector("span").textContent = dot.t;
  if (tile) {
    const columns = Number(tile.dataset.columns), rows = Number(tile.dataset.rows);
    tile.style.backgroundPosition =
      part(at % columns, columns) + " " + part(Math.floor(at / columns), rows);
  }
  const box = tip.getBoundingClientRect(), gap = 14;
  const x = event.clientX + gap, y = event.clientY + gap;
  tip.style.left = Math.max(0, Math.min(x, innerWidth - box.width - gap)) + "px";
  tip.style.top = (y + box.height > innerHeight ? event.clientY - box.height - gap : y) + "px";
});
document.getElementById("map").addEventListener("pointerleave", () => { tip.hidden = true; });
"""
