"""The style and the script of a report's page: dark mode, the table of trials, marks in all views.

The script draws the plots, sorts and filters the table of trials, and marks a trial in every view
when it is pointed at or chosen in one. A mark is drawn by the script itself, in an SVG above the
plot, because redrawing all plots for each movement of the mouse would take a second.
"""

import json

DARK, PALE_LINE, PALE_TEXT = "#222222", "#999999", "#555555"
"""Colours on a light page that are no objective's: ink, lines and small text of plots."""
NIGHT = {
    DARK: "#e8e8e8",
    PALE_LINE: "#777777",
    PALE_TEXT: "#aaaaaa",
    "#e6e6e6": "#33373c",
    "#0072B2": "#3d9fe0",
    "#7F7F7F": "#a6a6a6",
    "#8A6D3B": "#b8955a",
    "#6A4FB3": "#9c86e0",
    "#882255": "#d0609a",
}
"""Colours on a dark page for those that are too dark there."""
WIDEST_PHONE = 640
"""Width in pixels up to which a row of a table is a block of lines."""

STYLE = """
:root { --ink: #1b1b1b; --page: #fff; --soft: #555; --rule: #ccc; --box: #f4f4f4; --yes: #eaf7f2; --no: #fdf1ea;
  --mark: #c2006b; --chosen: #fce4f0;
  color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --page: #16181b; --soft: #a5a9ae; --rule: #3b3f45; --box: #22252a; --yes: #14302a;
    --no: #38231a; --mark: #ff5db1; --chosen: #47203a; }
}
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { margin: .5rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--rule); font-size: 1.3rem; }
h3 { margin: 1.4rem 0 .2rem; font-size: 1.05rem; }
h4 { margin: .4rem 0 0; font-size: .95rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: .3rem 0 .6rem; max-width: 50rem; overflow-wrap: anywhere; }
a { color: inherit; }
.sub { color: var(--soft); }
#live { border-left: .5rem solid #009e73; background: var(--box); padding: .4rem 1rem; }
#live.lost, #live.interrupted { border-color: #d55e00; background: var(--no); }
html:has(#live) { overflow-anchor: none; }
nav { margin: .8rem 0; font-size: .9rem; }
nav a { margin-right: 1rem; overflow-wrap: anywhere; }
.box { border-left: .5rem solid #888; background: var(--box); padding: .6rem 1rem; margin: .6rem 0; }
.box.yes { border-color: #009e73; background: var(--yes); }
.box.no { border-color: #d55e00; background: var(--no); }
.box strong { font-size: 1.2rem; }
.box li { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.tall { max-height: 32rem; overflow: auto; border-bottom: 1px solid var(--rule); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--rule);
  white-space: pre-line; }
td { overflow-wrap: anywhere; }
th { font-weight: 600; vertical-align: bottom; }
.short { white-space: pre; }
.whole { white-space: nowrap; }
.controls { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: baseline; margin: .4rem 0;
  font-size: .9rem; }
.controls[hidden] { display: none; }
.controls input { flex: 1 1 16rem; min-width: 0; max-width: 26rem; font: inherit; padding: .15rem .4rem; }
.controls select, .controls button, #marked button { font: inherit; }
.trials th { position: sticky; top: 0; background: var(--page); white-space: nowrap; }
.trials th button { all: unset; cursor: pointer; font-weight: 600; }
.trials th button:focus-visible { outline: 2px solid var(--mark); }
.trials th[aria-sort=ascending] button::after { content: " \\25b4"; }
.trials th[aria-sort=descending] button::after { content: " \\25be"; }
.trials th, .trials td { padding-right: .6rem; font-size: .85rem; }
.trials td { white-space: nowrap; font-variant-numeric: tabular-nums; }
.trials tr.hollow td { color: var(--soft); }
[data-trials] { cursor: pointer; }
tr.pointed { background: var(--box); }
tr.chosen { background: var(--chosen); }
td.pointed, td.chosen { outline: 3px solid var(--mark); outline-offset: -3px; }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: .4em; border: 2px solid; border-radius: 50%;
  box-sizing: border-box; vertical-align: baseline; }
.dot.full { background: currentColor; }
.heat { font-variant-numeric: tabular-nums; }
.heat th, .heat td { padding: .3rem .4rem; text-align: center; vertical-align: middle; border: 0; white-space: normal; }
.heat th { overflow-wrap: normal; }
.heat small { font-size: .75rem; }
#marked { position: sticky; bottom: 0; background: var(--chosen); padding: .4rem .8rem; font-size: .9rem;
  overflow-wrap: anywhere; max-height: 6rem; overflow-y: auto; z-index: 2; }
#marked button { margin-left: .6rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 1.5rem; }
.panels.wider { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.panels.one { max-width: 46rem; grid-template-columns: 1fr; }
.panel { min-width: 0; position: relative; }
.marks { position: absolute; pointer-events: none; overflow: hidden; fill: none; stroke: var(--mark); }
pre { overflow-x: auto; font-size: .8rem; background: var(--box); padding: .6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (max-width: WIDESTpx) {
  .short { white-space: pre-line; }
  .rows, .rows tbody, .rows tr, .rows td { display: block; border: 0; padding: 0; }
  .rows td { white-space: pre-line; }
  .rows thead { display: none; }
  .rows tr { border-bottom: 1px solid var(--rule); padding: .4rem 0; }
  .rows td:empty { display: none; }
  .rows td::before { content: attr(data-label) ": "; color: var(--soft); }
  .rows.trials td { display: inline-block; margin-right: .7rem; }
  .trials td:first-child::before { content: none; }
  .trials tr[hidden] { display: none; }
}
@media print {
  :root { font-size: 11px; }
  body { max-width: none; padding: 0; }
  nav, details, .controls, #marked, .marks { display: none !important; }
  .panels, .panels.wider { grid-template-columns: 1fr 1fr; }
  .panels.one { grid-template-columns: 1fr; }
  .panel, .box, tr, figure:has(.one) { break-inside: avoid; }
  h2, h3, h4, figcaption { break-after: avoid; }
  .wide { overflow: visible; }
  .tall { max-height: none; }
  .trials td { white-space: normal; }
  .heat td { print-color-adjust: exact; }
}
@page { margin: 14mm; }
figure { margin: 0; }
""".replace("WIDEST", str(WIDEST_PHONE))

_SCRIPT = r"""
const NIGHT = NIGHT_COLOURS;
const bar = document.getElementById('marked');
const touch = matchMedia('(pointer: coarse)').matches;
const dark = matchMedia('(prefers-color-scheme: dark)');
const trialsOf = cell => cell.dataset.trials.split(' ');
let chosen = new Set(), pointed = new Set();
let texts, plots, table, rows, cells, heads, names, keys;

function find() {
  texts = JSON.parse(document.getElementById('trials')?.textContent || '{}');
  plots = [...document.querySelectorAll('.plot')];
  table = document.querySelector('table.trials');
  rows = table ? [...table.tBodies[0].rows] : [];
  cells = [...document.querySelectorAll('[data-trials]')];
  heads = table ? [...table.tHead.rows[0].cells] : [];
  names = heads.map(head => head.textContent.trim());
  keys = names.map(name => name.split(',')[0]);
}

// --- plots: a trial's points are found by the numbers in customdata

function dataOf(plot) {
  const night = (key, value) => dark.matches && typeof value === 'string' && NIGHT[value] || value;
  const drawn = JSON.parse(plot.nextElementSibling.textContent, night);
  plot.places = new Map();
  drawn.data.forEach((trace, k) => {
    if (!trace.customdata) return;
    trace.hovertext = trace.customdata.map(trial => texts[trial]?.[1] || '');
    trace.customdata.forEach((trial, i) => {
      if (trial === null) return;
      if (!plot.places.has(String(trial))) plot.places.set(String(trial), []);
      plot.places.get(String(trial)).push([k, i]);
    });
  });
  const points = drawn.data.some(trace => trace.customdata && trace.mode === 'markers');
  const drag = points ? 'select' : 'zoom';
  drawn.layout.dragmode = touch ? false : drag;
  return drawn;
}

function mark(plot) {
  const full = plot._fullLayout, [across, up] = [full.xaxis, full.yaxis], lines = [];
  for (const [trials, width] of [[pointed, 1.5], [chosen, 2.5]]) for (const trial of trials) {
    let before = null, path = '';
    for (const [k, i] of plot.places.get(trial) || []) {
      const trace = plot.data[k], [x, y] = [trace.x[i], trace.y[i]];
      if (x === null || y === null) continue;
      const [left, top] = [across._offset + across.d2p(x), up._offset + up.d2p(y)];
      if (!isFinite(left) || !isFinite(top)) continue;
      if (trace.mode === 'lines') path += `${before === k ? 'L' : 'M'}${left} ${top}`;
      else path += `M${left - 7} ${top}a7 7 0 1 0 14 0a7 7 0 1 0 -14 0`;
      before = k;
    }
    if (path) lines.push(`<path stroke-width="${width}" d="${path}"/>`);
  }
  plot.marks.style.cssText = `left:${plot.offsetLeft}px;top:${plot.offsetTop}px`;
  plot.marks.setAttribute('width', plot.clientWidth);
  plot.marks.setAttribute('height', plot.clientHeight);
  plot.marks.innerHTML = lines.join('');
}

function show() {
  plots.forEach(mark);
  for (const element of cells) {
    const trials = trialsOf(element);
    element.classList.toggle('pointed', trials.some(trial => pointed.has(trial)));
    element.classList.toggle('chosen', trials.some(trial => chosen.has(trial)));
  }
  document.documentElement.dataset.chosen = [...chosen].join(' ');
}

function choose(trials, more) {
  const all = trials.length > 0 && trials.every(trial => chosen.has(trial));
  if (more) trials.forEach(trial => all ? chosen.delete(trial) : chosen.add(trial));
  else chosen = new Set(all && chosen.size === trials.length ? [] : trials);
  if (bar) {
    bar.hidden = !chosen.size;
    bar.textContent = `marked: ${[...chosen].map(trial => texts[trial][0]).join(', ')}`;
    const clear = document.createElement('button');
    clear.textContent = 'clear';
    clear.addEventListener('click', () => choose([], false));
    bar.append(clear);
  }
  if (table) filter();
  show();
}

function point(trials) {
  pointed = new Set(trials);
  show();
}

const trialsAt = event => [...new Set(event.points.map(at => at.data.customdata?.[at.pointNumber])
  .filter(trial => trial !== undefined && trial !== null).map(String))];

function draw(plot) {
  const drawn = dataOf(plot);
  Plotly.react(plot, drawn.data, drawn.layout, {responsive: true, displayModeBar: false});
}

function begin(plot) {
  plot.marks = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  plot.marks.classList.add('marks');
  plot.after(plot.nextElementSibling, plot.marks);
  draw(plot);
  plot.on('plotly_hover', event => point(trialsAt(event)));
  plot.on('plotly_unhover', () => point([]));
  plot.on('plotly_click', event => choose(trialsAt(event), event.event.shiftKey));
  plot.on('plotly_selected', event => {
    if (!event || plot.clearing) return;  // plotly also tells that the box is taken away
    choose(trialsAt(event), false);
    setTimeout(async () => {
      plot.clearing = true;
      await Plotly.update(plot, {selectedpoints: null}, {selections: []});
      plot.clearing = false;
    });
  });
  for (const name of ['plotly_doubleclick', 'plotly_deselect']) {  // the second after boxes
    plot.on(name, () => { if (!plot.clearing) choose([], false); });
  }
  plot.on('plotly_afterplot', () => mark(plot));
}
dark.addEventListener('change', () => plots.forEach(draw));
const fit = () => plots.forEach(plot => Plotly.relayout(plot, {width: plot.parentElement.clientWidth}));
matchMedia('print').addEventListener('change', fit);
addEventListener('beforeprint', fit);
addEventListener('afterprint', () => plots.forEach(plot => Plotly.relayout(plot, {width: null, autosize: true})));

// --- cells and rows of trials

const cellAt = event => event.target.closest?.('[data-trials]');
let over = null;
document.addEventListener('mouseover', event => {
  if (cellAt(event) === over) return;
  over = cellAt(event);
  point(over ? trialsOf(over) : []);
});
document.addEventListener('click', event => {
  const head = event.target.closest('table.trials th button')?.parentElement;
  if (head) sort(heads.indexOf(head), head.getAttribute('aria-sort') === 'ascending');
  else if (cellAt(event)) choose(trialsOf(cellAt(event)), event.shiftKey);
});
document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && cellAt(event)) choose(trialsOf(cellAt(event)), event.shiftKey);
});

// --- the table: sorted by a column, and filtered by words and by conditions such as lr<0.1

const valueOf = (row, k) => row.cells[k].dataset.value ?? row.cells[k].textContent;
const isNumber = text => text.trim() !== '' && isFinite(text);

let sorted = null;

function sort(k, down) {
  sorted = [k, down];
  const sign = down ? -1 : 1;
  const order = (a, b) => {
    const [x, y] = [valueOf(a, k), valueOf(b, k)];
    if (x === '' || y === '') return (x === '') - (y === '');
    return sign * (isNumber(x) && isNumber(y) ? x - y : x.localeCompare(y, undefined, {numeric: true}));
  };
  table.tBodies[0].append(...[...rows].sort(order));
  heads.forEach((head, i) => {
    if (i === k) head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    else head.removeAttribute('aria-sort');
  });
  document.getElementById('order').value = `${k} ${down ? 1 : 0}`;
}

const COMPARE = {
  '<': (x, y) => x < y, '>': (x, y) => x > y, '<=': (x, y) => x <= y, '>=': (x, y) => x >= y,
  '=': (x, y) => x === y, '!=': (x, y) => x !== y,
};

function meets(row, term) {
  const found = term.match(/^([^<>=!]+)(<=|>=|!=|<|>|=)(.+)$/);
  const k = found ? keys.indexOf(found[1]) : -1;
  if (k < 0) return row.textContent.toLowerCase().includes(term.toLowerCase());
  const [x, y] = [valueOf(row, k), found[3]];
  if (x === '') return false;
  const numbers = isNumber(x) && isNumber(y);
  return COMPARE[found[2]](numbers ? Number(x) : x, numbers ? Number(y) : y);
}

function filter() {
  const terms = document.getElementById('filter').value.split(/\s+/).filter(Boolean);
  const only = document.getElementById('only').checked && chosen.size > 0;
  let left = 0;
  for (const row of rows) {
    const kept = terms.every(term => meets(row, term)) && (!only || chosen.has(row.dataset.trials));
    row.hidden = !kept;
    left += kept;
  }
  document.getElementById('left').textContent = `${left} of ${rows.length} trials`;
}

document.addEventListener('input', event => { if (event.target.id === 'filter') filter(); });
document.addEventListener('change', event => {
  if (event.target.id === 'only') filter();
  if (event.target.id !== 'order') return;
  const [k, down] = event.target.value.split(' ');
  if (down) sort(Number(k), down === '1');
  else unsort();
});

function unsort() {
  sorted = null;
  heads.forEach(head => head.removeAttribute('aria-sort'));
  table.tBodies[0].append(...rows);
}

function beginTable() {
  const order = document.getElementById('order');
  heads.forEach((head, k) => {
    if (head.firstElementChild) return;
    const button = document.createElement('button');
    button.textContent = names[k];
    head.replaceChildren(button);
    for (const down of [0, 1]) {
      order.add(new Option(`${names[k]}, ${down ? 'descending' : 'ascending'}`, `${k} ${down}`));
    }
  });
  if (sorted) sort(...sorted);
  else order.value = '';
  document.querySelectorAll('.controls').forEach(part => part.hidden = false);
  filter();
}

function setUp() {
  find();
  cells.forEach(element => element.tabIndex = 0);
  if (table) beginTable();
  plots.filter(plot => !plot.marks).forEach(begin);
  show();
  document.documentElement.dataset.drawn = plots.length;
}
setUp();
"""

_FOLLOW = r"""
// --- a followed experiment: what has changed is replaced, and what the reader has set is kept

const EVERY_MS = 2000;
let version = '', asking = false, held = false, told = '', answered = new Date();
const live = () => document.getElementById('live');
const textless = node => ![...node.childNodes].some(part => part.nodeType === 3 && part.data.trim());
const inside = node => [...node.children].filter(child => !child.matches('.marks'));
const kind = node => `${node.nodeName} ${node.dataset.key || node.className}`;

function renew(old, fresh) {
  if (old.isEqualNode(fresh) || old.matches('.controls')) return;
  if (old.matches('.plot')) {
    old.style.height = fresh.style.height;
    return;
  }
  const [have, want] = [inside(old), inside(fresh)];
  const alike = want.length > 0 && have.length === want.length && old.nodeName !== 'TBODY'
    && textless(old) && textless(fresh) && want.every((child, i) => kind(child) === kind(have[i]));
  if (!alike) {
    replace(old, fresh);
    return;
  }
  old.className = fresh.className;
  want.forEach((child, i) => renew(have[i], child));
}

function replace(old, fresh) {
  const drawn = new Map([...old.querySelectorAll('.plot')].map(plot => [plot.dataset.key, plot]));
  const given = [...fresh.querySelectorAll('.plot')];
  old.replaceWith(fresh);
  for (const plot of given) {
    const before = drawn.get(plot.dataset.key);
    if (!before) continue;
    before.style.height = plot.style.height;
    plot.replaceWith(before);
    before.nextElementSibling.after(before.marks);
  }
}

function renewAll(text) {
  const main = document.querySelector('main');
  const fresh = new DOMParser().parseFromString(text, 'text/html').querySelector('main');
  const shown = new Map(plots.map(plot => [plot, plot.nextElementSibling.textContent]));
  const sections = [...main.querySelectorAll(':scope > section')];
  const top = sections.find(section => section.getBoundingClientRect().bottom > 0);
  const place = top?.getBoundingClientRect().top;
  const title = section => section.querySelector('h2').textContent;
  const old = new Map(sections.map(section => [title(section), section]));
  const outside = new Map([...main.children].map(part => [kind(part) + part.id, part]));
  const wanted = [...fresh.children].map(part => {
    const found = part.nodeName === 'SECTION' ? old.get(title(part)) : outside.get(kind(part) + part.id);
    if (!found) return part;
    found.id = part.id;
    renew(found, part);
    return found.isConnected ? found : part;
  });
  [...main.children].filter(part => !wanted.includes(part)).forEach(part => part.remove());
  wanted.forEach((part, i) => { if (main.children[i] !== part) main.insertBefore(part, main.children[i] || null); });
  setUp();
  plots.filter(plot => shown.has(plot) && shown.get(plot) !== plot.nextElementSibling.textContent).forEach(draw);
  show();
  if (top?.isConnected && scrollY > 0) scrollBy({top: top.getBoundingClientRect().top - place, behavior: 'instant'});
}

const clock = () => answered.toLocaleTimeString([], {hour12: false});

async function ask() {
  const answer = await fetch('page', {headers: {'If-None-Match': version}, cache: 'no-store'});
  return [answer, answer.status === 304 ? '' : await answer.text()];
}

async function follow() {
  if (document.hidden || asking || held) return;
  asking = true;
  const [answer, text] = await ask().catch(() => [null, '']);
  asking = false;
  if (answer?.status === 200) {
    renewAll(text);
    version = answer.headers.get('ETag');
    told = live().textContent;
  }
  const good = answer?.ok || answer?.status === 304;
  if (good) answered = new Date();
  const lost = `tfkd report has not answered since ${clock()}: it was ended, or the connection is lost. ` +
    'This is the state of then; the page goes on by itself once there is an answer.';
  live().textContent = good ? `${told} (as of ${clock()})` : text || lost;
  live().classList.toggle('lost', !good);
}

addEventListener('pointerdown', event => held = event.button === 0);
for (const name of ['pointerup', 'pointercancel']) addEventListener(name, () => held = false);
document.addEventListener('visibilitychange', follow);
setInterval(follow, EVERY_MS);
follow();
"""


def css_colour(colour: str) -> str:
    """Return a colour of a light page as CSS that follows the page into the dark."""
    return f"light-dark({colour}, {NIGHT.get(colour, colour)})"


def script(*, follow: bool = False) -> str:
    """Return the script of the page; of one that follows an experiment, with what renews it."""
    text = _SCRIPT.replace("NIGHT_COLOURS", json.dumps(NIGHT), 1)
    return text + _FOLLOW if follow else text
