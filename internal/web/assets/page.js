// The live parts of the page. All text gets into it as text (textContent), and the parts that the server makes come as
// documents that the browser has parsed without running anything.
"use strict";

const svg = "http://www.w3.org/2000/svg";
const keep = 450; // samples: a quarter of an hour, as on the server
const refreshEvery = 10000;

const state = { run: 0, last: 0, every: 2000, samples: [], cursor: null };

function element(tag, attributes, ...children) {
  const e = ["svg", "path", "line", "text", "g"].includes(tag) ? document.createElementNS(svg, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) e.setAttribute(name, value);
  e.append(...children);
  return e;
}

// digits has about three of them, as vdisk top does.
function digits(f) { return f < 10 ? f.toFixed(2) : f < 100 ? f.toFixed(1) : f.toFixed(0); }
function plain(f) { return f === 0 ? "0" : f < 10 ? f.toFixed(1) : f < 10000 ? f.toFixed(0) : digits(f / 1000) + "k"; }
function bytes(n) {
  if (n < 1024) return n.toFixed(0) + " B";
  let unit = -1;
  for (; n >= 1024 && unit < 4; unit++) n /= 1024;
  return digits(n) + " " + "KMGTP"[unit] + "iB";
}
function duration(us) {
  if (!us) return "–";
  return us < 1000 ? digits(us) + " µs" : us < 1e6 ? digits(us / 1000) + " ms" : digits(us / 1e6) + " s";
}
function percent(p) { return p == null ? "–" : p.toFixed(1) + " %"; }

const charts = [
  { title: "Requests per second", unit: plain, lines: [["r", "reads", "c-read"], ["w", "writes", "c-write"]] },
  { title: "Throughput per second", unit: bytes, binary: true, lines: [["rb", "read", "c-read"], ["wb", "written", "c-write"]] },
  { title: "Latency", unit: duration, log: true, lines: [["r50", "read p50", "c-read2"], ["r99", "p99", "c-read"], ["w50", "write p50", "c-write2"], ["w99", "p99", "c-write"]] },
  { title: "Fill", unit: percent, most: 100, lines: [["files", "log files", "c-dead"], ["fill", "live data", "c-full"]] },
];

function makeCharts() {
  const box = document.getElementById("charts");
  const levels = (box.dataset.levels || "").split(" ").filter(Boolean).map(Number);
  for (const c of charts) {
    c.levels = c.most === 100 ? levels : [];
    const caption = element("figcaption", {}, element("strong", {}));
    caption.firstChild.textContent = c.title;
    c.values = c.lines.map(([, name, kind]) => {
      const value = element("b");
      caption.append(element("span", {}, element("i", { class: kind }), name + " ", value));
      return value;
    });
    if (c.levels.length) caption.append(element("span", {}, element("i", { class: "c-level" }), "warnings"));
    c.svg = element("svg", { class: "chart", role: "img", "aria-label": c.title });
    c.svg.addEventListener("pointermove", (e) => point(c, e));
    c.svg.addEventListener("pointerleave", () => { state.cursor = null; drawAll(); });
    box.append(element("figure", {}, caption, c.svg));
  }
  box.hidden = false;
  new ResizeObserver(drawAll).observe(box);
}

// span is the time that the graphs show: the last quarter of an hour, less at the beginning.
function span() {
  const end = state.samples.length ? state.samples[state.samples.length - 1].t : Date.now();
  const first = state.samples.length ? state.samples[0].t : end;
  const length = Math.min(keep * state.every, Math.max(60000, end - first));
  return [end - length, end];
}

function point(c, e) {
  const box = c.svg.getBoundingClientRect();
  const [from, to] = span();
  const t = from + ((e.clientX - box.left - left) / (box.width - left - right)) * (to - from);
  let best = null;
  for (const s of state.samples) if (!best || Math.abs(s.t - t) < Math.abs(best.t - t)) best = s;
  state.cursor = best && best.n;
  drawAll();
}

const left = 58, right = 8, above = 8, below = 20, height = 158;

// scale returns the greatest value of a graph's axis, and the values at its lines.
function scale(c, samples) {
  let most = c.most || 0, least = Infinity;
  for (const s of samples) for (const [key] of c.lines) {
    if (s[key] > most) most = s[key];
    if (s[key] > 0 && s[key] < least) least = s[key];
  }
  if (c.log) {
    if (!most) { least = 10; most = 1000; }
    const low = Math.floor(Math.log10(least)), high = Math.max(low + 2, Math.ceil(Math.log10(most)));
    const ticks = [];
    for (let p = low; p <= high; p++) ticks.push(10 ** p);
    return { y: (v) => v > 0 ? (Math.log10(v) - low) / (high - low) : null, ticks };
  }
  if (c.most) return { y: (v) => v == null ? null : v / c.most, ticks: [0, 25, 50, 75, 100] };
  const base = c.binary ? 2 : 10;
  let step = base ** Math.floor(Math.log(Math.max(most, c.binary ? 4096 : 4) / 4) / Math.log(base));
  for (const m of c.binary ? [1, 2] : [1, 2, 2.5, 5, 10]) if (step * m * 4 >= most) { step *= m; break; }
  const top = step * 4;
  return { y: (v) => v / top, ticks: [0, 1, 2, 3, 4].map((n) => n * step) };
}

function draw(c) {
  const width = c.svg.clientWidth;
  if (!width) return;
  const [from, to] = span();
  const { y, ticks } = scale(c, state.samples);
  const x = (t) => left + ((t - from) / (to - from)) * (width - left - right);
  const at = (v) => height - below - v * (height - above - below);
  const parts = [];
  const line = (x1, y1, x2, y2, kind) => parts.push(element("line", { x1, y1, x2, y2, class: kind }));
  const text = (px, py, anchor, what) => parts.push(element("text", { x: px, y: py, "text-anchor": anchor }, what));
  ticks.forEach((v, i) => {
    const py = Math.round(at(c.log ? y(v) : y(v))) + 0.5;
    line(left, py, width - right, py, i ? "grid" : "base");
    if (!c.log || ticks.length < 6 || i % 2 === 0) text(left - 7, py + 3.5, "end", c.unit === percent ? v + " %" : c.unit === duration ? duration(v).replace(/\.0+ /, " ") : c.unit(v).replace(/\.0+(?= |$)/, ""));
  });
  const minutes = (to - from) / 60000;
  for (let m = 0; m <= minutes + 0.001; m += minutes > 8 ? 5 : minutes > 3 ? 2 : minutes > 1.5 ? 1 : 0.5) {
    const px = x(to - m * 60000);
    if (px >= left - 1) text(px, height - 5, m === 0 ? "end" : px < left + 20 ? "start" : "middle", m === 0 ? "now" : m < 1 ? "−30 s" : "−" + m + " min");
  }
  for (const l of c.levels) line(left, at(l / 100), width - right, at(l / 100), "level");
  for (const [key, , kind] of c.lines) {
    let path = "", area = "", begun = null, before = null;
    const close = () => { if (begun != null) area += `L${before.x} ${height - below}L${begun} ${height - below}Z`; begun = null; };
    for (const s of state.samples) {
      const v = s.t < from ? null : y(s[key]);
      if (v == null || (before && s.t - before.t > 3 * state.every)) close();
      if (v == null) continue;
      const px = x(s.t).toFixed(1), py = at(v).toFixed(1);
      path += (begun == null ? "M" : "L") + px + " " + py;
      if (begun == null) path += "h.01"; // a point alone is seen, too
      area += (begun == null ? "M" + px + " " + (height - below) + "L" : "L") + px + " " + py;
      if (begun == null) begun = px;
      before = { x: px, t: s.t };
    }
    close();
    if (!c.log) parts.push(element("path", { d: area, class: "area " + kind }));
    parts.push(element("path", { d: path, class: "line " + kind, "data-key": key }));
  }
  let shown = state.samples[state.samples.length - 1];
  if (state.cursor != null) {
    const s = state.samples.find((s) => s.n === state.cursor);
    if (s) { shown = s; line(x(s.t), above, x(s.t), height - below, "cursor"); }
  }
  c.lines.forEach(([key], i) => { c.values[i].textContent = shown ? c.unit(shown[key]) : ""; });
  c.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  c.svg.replaceChildren(...parts);
}

function drawAll() { for (const c of charts) draw(c); }

function showBusy(list) {
  const box = document.getElementById("busy");
  box.hidden = list.length === 0;
  box.querySelector("tbody").replaceChildren(...list.map((v) => {
    const row = element("tr", {}, element("th", { scope: "row" }, v.name));
    const cell = (text, kind) => row.append(element("td", { class: "n" + (kind || "") }, text));
    cell(plain(v.r)); cell(plain(v.w)); cell(plain(v.f), " wide"); cell(bytes(v.rb)); cell(bytes(v.wb));
    cell(duration(v.r50), " wide"); cell(duration(v.r99)); cell(duration(v.w50), " wide"); cell(duration(v.w99));
    return row;
  }));
}

function count(n, one, many) { return n === 1 ? "1 " + one : n + " " + many; }

function set(id, text) {
  const e = document.getElementById(id);
  if (e && e.textContent !== text) e.textContent = text;
}

function showState(s) {
  set("clients", count(s.clients, "client", "clients"));
  set("devices", count(s.devices, "device", "devices"));
  set("cleaner", s.cleaner);
}

// reached shows whether the server answers.
function reached(is) {
  state.reached = is;
  const live = document.getElementById("live");
  live.hidden = false;
  live.classList.toggle("on", is);
  live.textContent = is ? "live" : "no answer";
}

async function poll() {
  const response = await fetch("/live?after=" + state.last, { cache: "no-store", signal: AbortSignal.timeout(30000) });
  if (!response.ok) throw new Error(response.statusText);
  const a = await response.json();
  if (a.run !== state.run) {
    const first = state.run === 0;
    Object.assign(state, { run: a.run, last: 0, samples: [] });
    if (!first) return poll();
  }
  state.every = a.every;
  state.samples.push(...a.samples);
  state.samples.splice(0, state.samples.length - keep);
  if (a.samples.length) state.last = a.samples[a.samples.length - 1].n;
  showBusy(a.busy);
  showState(a.state);
  drawAll();
}

// refresh takes the parts of the page that the server makes from a new page. The browser parses it (responseType), so that
// no text of it becomes a script.
function refresh() {
  return new Promise((resolve, reject) => {
    const r = new XMLHttpRequest();
    r.open("GET", location.pathname + location.search);
    r.responseType = "document";
    r.timeout = 30000;
    r.onerror = r.ontimeout = () => reject(new Error("no answer"));
    r.onload = () => {
      if (r.status !== 200 || !r.response) return reject(new Error(r.statusText));
      for (const old of document.querySelectorAll("[data-part]")) {
        const fresh = r.response.getElementById(old.id);
        if (!fresh || old.isEqualNode(fresh)) continue;
        const scrolled = [...old.querySelectorAll(".scroll")].map((e) => e.scrollLeft);
        const taken = document.adoptNode(fresh);
        old.replaceWith(taken);
        taken.querySelectorAll(".scroll").forEach((e, i) => { e.scrollLeft = scrolled[i] || 0; });
      }
      resolve();
    };
    r.send();
  });
}

// every does something again and again while somebody can see the page.
function every(interval, what) {
  let timer = 0, busy = false;
  const turn = async () => {
    clearTimeout(timer);
    if (document.hidden || busy) return; // two at once would take the same samples twice
    busy = true;
    try {
      await what();
      reached(true);
    } catch {
      reached(false);
    }
    busy = false;
    timer = setTimeout(turn, interval());
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });
  return turn;
}

// The cells of the map tell what they are where there is no pointer to hover with, too.
document.addEventListener("click", (e) => {
  if (!e.target.matches(".map i")) return;
  for (const other of document.querySelectorAll(".map i.on")) other.classList.remove("on");
  e.target.classList.add("on");
  set("cell", e.target.title);
});

makeCharts();
every(() => state.every, poll)();
setTimeout(every(() => refreshEvery, refresh), refreshEvery);
