"use strict";
// The map of the model: every neuron a cell, every layer a band of cells filled column by column.

(() => {
  const $ = (id) => document.getElementById(id);
  const canvas = $("map"), names = $("names"), shares = $("shares"), tip = $("tip"), lens = $("lens");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const reader = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
  const state = { head: null, values: null, starts: [], orders: null, labels: null, found: new Set(),
                  bands: [], cell: 3, cursor: null, off: new Set(), base: null };

  // ---- colours -------------------------------------------------------------------------------------
  const hex = (h) => [1, 3, 5].map((i) => parseInt(h.slice(i, i + 2), 16));
  const stops = {
    light: {
      signed: ["#7a3200", "#b95c10", "#ef9f52", "#f8dcbc", "#eeebe4", "#d9d0ee", "#a68fd6", "#6a49ae", "#35166e"],
      number: ["#eeeae1", "#d3c6ea", "#a68dd4", "#7450b4", "#46247f", "#200a45"],
      off: "#e4dfd4", on: "#5b3d99", none: "#f6f4ef", ink: "#1e1b24", soft: "#615b69",
      cats: ["#5b3d99", "#d9731a", "#cfc9bd", "#009e73", "#0072b2", "#cc79a7", "#8c6d31", "#333333"],
      kinds: ["#5b3d99", "#d9731a", "#009e73", "#0072b2", "#cc79a7", "#8c6d31", "#56b4e9", "#e6b800", "#a01c3a", "#6b7a1e", "#333333", "#9a8fb0"],
    },
    dark: {
      signed: ["#ffd0a0", "#f59b4c", "#b7651a", "#5c371a", "#262230", "#40336a", "#7057b4", "#a78bee", "#ddd0ff"],
      number: ["#262230", "#40336a", "#6a50ae", "#9a7fe6", "#cbb6ff", "#fff4d8"],
      off: "#2b2735", on: "#b79cf2", none: "#17151c", ink: "#ece8f2", soft: "#a8a0b5",
      cats: ["#b79cf2", "#f59b4c", "#3d3849", "#35c79a", "#5bb0ea", "#e3a5c8", "#c9a86a", "#dddddd"],
      kinds: ["#b79cf2", "#f59b4c", "#35c79a", "#5bb0ea", "#e3a5c8", "#c9a86a", "#9ad7ff", "#ffe07a", "#ff7d94", "#b6c55a", "#dddddd", "#7c7096"],
    },
  };
  let palette;
  function ramp(list) {
    const points = list.map(hex), table = new Uint32Array(256);
    for (let i = 0; i < 256; i++) {
      const at = (i / 255) * (points.length - 1), k = Math.min(Math.floor(at), points.length - 2), f = at - k;
      const [r, g, b] = [0, 1, 2].map((c) => Math.round(points[k][c] * (1 - f) + points[k + 1][c] * f));
      table[i] = 0xff000000 | (b << 16) | (g << 8) | r;
    }
    return table;
  }
  const solid = (h) => { const [r, g, b] = hex(h); return (0xff000000 | (b << 16) | (g << 8) | r) >>> 0; };
  const css = (u) => `rgb(${u & 255} ${(u >> 8) & 255} ${(u >> 16) & 255})`;
  function dress() {
    const p = stops[dark.matches ? "dark" : "light"];
    palette = { signed: ramp(p.signed), number: ramp(p.number), off: solid(p.off), on: solid(p.on),
                none: solid(p.none), cats: (state.head?.column === "verdict" ? p.cats : p.kinds).map(solid), ink: p.ink, soft: p.soft };
  }
  const reach = () => Math.max(Math.abs(state.head.low), Math.abs(state.head.high)) || 1;
  function place(v) { // 0..1 on the scale of the column
    const h = state.head;
    if (h.kind === "signed") return 0.5 + 0.5 * v / reach();
    return (v - h.low) / ((h.high - h.low) || 1);
  }
  function colour(v) {
    const kind = state.head.kind;
    if (Number.isNaN(v)) return palette.none;
    if (kind === "flag") return v ? palette.on : palette.off;
    if (kind === "category") return state.off.has(v) || v < 0 ? palette.none : palette.cats[v % palette.cats.length];
    return palette[kind][Math.max(0, Math.min(255, Math.round(255 * place(v))))];
  }
  function said(v) {
    const h = state.head;
    if (Number.isNaN(v)) return "not measured";
    if (h.kind === "flag") return v ? "yes" : "no";
    if (h.kind === "category") return h.categories[v] ?? "other";
    return reader.format(v).replace("-", "−");
  }

  // ---- layout --------------------------------------------------------------------------------------
  function layout() {
    const frame = canvas.parentElement, phone = frame.clientWidth < 600;
    const across = frame.clientWidth - (phone ? 22 + 34 : 34 + 96);
    const room = Math.max(560, innerHeight - 330), sites = state.head.sites, gap = sites.length > 60 ? 1 : 3;
    const tall = (cell) => sites.reduce((sum, s) => sum + Math.ceil(s.width / Math.floor(across / cell)) * cell + gap, 0);
    let cell = 2;
    for (let c = 14; c >= 2; c--) if (tall(c) <= room) { cell = c; break; }
    if (matchMedia("(pointer: coarse)").matches) cell = Math.max(cell, 3);
    state.cell = cell;
    let y = 0;
    state.bands = [];
    for (let k = sites.length - 1; k >= 0; k--) { // the output at the top
      const rows = Math.ceil(sites[k].width / Math.floor(across / cell));
      state.bands[k] = { y, rows, height: rows * cell, columns: Math.ceil(sites[k].width / rows) };
      y += rows * cell + gap;
    }
    const used = Math.max(...state.bands.map((b) => b.columns)) * cell;
    state.size = { width: used, height: y - gap };
    canvas.style.width = used + "px"; shares.style.width = "100%"; names.style.width = "100%";
    for (const [c, w] of [[canvas, used], [names, columnWidth(0)], [shares, columnWidth(2)]]) {
      const scale = devicePixelRatio || 1;
      c.width = Math.round(w * scale); c.height = Math.round(state.size.height * scale);
      c.style.width = w + "px"; c.style.height = state.size.height + "px";
    }
  }
  const columnWidth = (i) => parseFloat(getComputedStyle(canvas.parentElement).gridTemplateColumns.split(" ")[i]);
  function sorted() {
    if ($("order").value !== "value") { state.orders = null; return; }
    state.orders = state.head.sites.map((s, k) => {
      const from = state.starts[k], index = Int32Array.from({ length: s.width }, (_, i) => i);
      const key = (i) => { const v = state.values[from + i]; return Number.isNaN(v) ? -Infinity : v; };
      return index.sort((a, b) => key(b) - key(a) || a - b);
    });
  }
  const indexAt = (k, position) => state.orders ? state.orders[k][position] : position;
  const positionOf = (k, index) => state.orders ? state.orders[k].indexOf(index) : index;
  const valueAt = (k, position) => state.values[state.starts[k] + indexAt(k, position)];

  // ---- drawing -------------------------------------------------------------------------------------
  function paint() {
    const scale = devicePixelRatio || 1, w = canvas.width, h = canvas.height;
    const image = new ImageData(w, h), pixels = new Uint32Array(image.data.buffer);
    state.head.sites.forEach((site, k) => {
      const band = state.bands[k];
      for (let n = 0; n < site.width; n++) {
        const ink = colour(valueAt(k, n)), col = Math.floor(n / band.rows), row = n % band.rows;
        const x0 = Math.round(col * state.cell * scale), x1 = Math.round((col + 1) * state.cell * scale);
        const y0 = Math.round((band.y + row * state.cell) * scale), y1 = Math.round((band.y + (row + 1) * state.cell) * scale);
        const inset = state.cell * scale >= 5 ? 1 : 0;
        for (let y = y0; y < y1 - inset; y++) pixels.fill(ink, y * w + x0, y * w + x1 - inset);
      }
    });
    const base = document.createElement("canvas");
    base.width = w; base.height = h;
    const g = base.getContext("2d");
    g.putImageData(image, 0, 0);
    g.scale(scale, scale);
    g.strokeStyle = palette.ink; g.lineWidth = 1.6;
    state.head.sites.forEach((site, k) => {
      for (const index of state.found) {
        const [number, i] = index;
        if (number !== site.number) continue;
        const { x, y } = spot(k, positionOf(k, i));
        g.beginPath(); g.arc(x, y, Math.max(5, state.cell), 0, 7); g.stroke();
      }
    });
    state.base = base;
    show(); paintNames(); paintShares(); paintLegend();
  }
  function spot(k, position) {
    const band = state.bands[k];
    return { x: (Math.floor(position / band.rows) + 0.5) * state.cell, y: band.y + (position % band.rows + 0.5) * state.cell };
  }
  function show() {
    const g = canvas.getContext("2d"), scale = devicePixelRatio || 1;
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, canvas.width, canvas.height);
    g.drawImage(state.base, 0, 0);
    if (!state.cursor) return;
    const { x, y } = spot(state.cursor.k, state.cursor.position), r = Math.max(state.cell / 2 + 2, 4);
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.lineWidth = 3.5; g.strokeStyle = dark.matches ? "#000" : "#fff"; g.strokeRect(x - r, y - r, 2 * r, 2 * r);
    g.lineWidth = 1.8; g.strokeStyle = palette.ink; g.strokeRect(x - r, y - r, 2 * r, 2 * r);
  }
  function pen(c) {
    const g = c.getContext("2d"), scale = devicePixelRatio || 1;
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, c.width, c.height);
    g.font = "10.5px " + getComputedStyle(document.body).fontFamily;
    g.textBaseline = "middle"; g.fillStyle = palette.soft;
    return g;
  }
  function paintNames() {
    const g = pen(names), w = columnWidth(0);
    g.textAlign = "right";
    let last = -99;
    const one = new Set(state.head.sites.map((s) => s.layer)).size === state.head.sites.length;
    for (let k = state.head.sites.length - 1; k >= 0; k--) {
      const y = state.bands[k].y + state.bands[k].height / 2;
      if (y - last < 12) continue;
      g.fillText(one ? state.head.sites[k].layer : state.head.sites[k].number, w - 7, y);
      last = y;
    }
  }
  function paintShares() {
    const g = pen(shares), w = columnWidth(2), { kind } = state.head, x0 = 8;
    const sums = state.head.sites.map((s, k) => {
      let sum = 0, n = 0, second = 0;
      for (let i = 0; i < s.width; i++) {
        const v = state.values[state.starts[k] + i];
        if (Number.isNaN(v)) continue;
        n++; sum += kind === "category" ? v === 0 : v; second += v === 1;
      }
      return n ? { mean: sum / n, second: second / n } : null;
    });
    if (kind === "category" && state.head.column !== "verdict") { paintKinds(g, w, x0); return; }
    const known = sums.filter(Boolean), share = kind === "flag" || kind === "category";
    const most = Math.max(...known.map((s) => Math.abs(s.mean) + (kind === "category" ? s.second : 0)), 1e-12);
    const room = w > 60 ? w - x0 - 50 : w - x0 - 4;
    let last = -99;
    for (let k = sums.length - 1; k >= 0; k--) {
      const s = sums[k], band = state.bands[k];
      if (!s) continue;
      const y = band.y + Math.max(0, band.height / 2 - 5), h = Math.min(band.height, 10), long = room * Math.abs(s.mean) / most;
      g.fillStyle = css(kind === "category" ? palette.cats[0] : kind === "signed" ? palette.signed[s.mean < 0 ? 40 : 215] : palette.on);
      g.fillRect(x0, y, long, h);
      if (kind === "category") { g.fillStyle = css(palette.cats[1]); g.fillRect(x0 + long, y, room * s.second / most, h); }
      g.fillStyle = palette.soft;
      const mid = band.y + band.height / 2, all = kind === "category" ? s.mean + s.second : s.mean;
      if (w > 60 && mid - last >= 12) {
        g.fillText(share ? (100 * all).toFixed(all < 0.1 ? 1 : 0) + " %" : Math.abs(all) < most / 500 ? "≈ 0" : reader.format(all).replace("-", "−"), x0 + room + 5, mid);
        last = mid;
      }
    }
    const c = state.head.categories;
    $("sharenote").textContent = "Right: " + (kind === "flag" ? "share of each layer" :
      kind === "category" ? `share ${c.slice(0, 2).join(" and ")} of each layer` : "mean of each layer");
  }
  function paintKinds(g, w, x0) { // how a layer divides among the categories
    const room = w - x0 - 6;
    state.head.sites.forEach((s, k) => {
      const counts = new Map(), band = state.bands[k], h = Math.min(band.height, 10);
      for (let i = 0; i < s.width; i++) {
        const v = state.values[state.starts[k] + i];
        if (v >= 0 && !state.off.has(v)) counts.set(v, (counts.get(v) ?? 0) + 1);
      }
      let x = x0;
      for (const [v, n] of [...counts].sort((a, b) => a[0] - b[0])) {
        const long = room * n / s.width;
        g.fillStyle = css(colour(v));
        g.fillRect(x, band.y + Math.max(0, band.height / 2 - 5), long, h);
        x += long;
      }
    });
    $("sharenote").textContent = "Right: how each layer divides";
  }
  function paintLegend() {
    const box = $("legend"), { kind, low, high } = state.head;
    box.replaceChildren();
    const values = state.values, missing = values.some(Number.isNaN);
    if (kind === "category" || kind === "flag") {
      const list = kind === "flag" ? [["yes", 1], ["no", 0]] : state.head.categories.map((n, i) => [n, i]);
      const cats = document.createElement("div");
      cats.className = "cats";
      for (const [name, v] of list) {
        const count = values.reduce((sum, x) => sum + (x === v), 0);
        const item = document.createElement(kind === "category" ? "button" : "span");
        const swatch = document.createElement("canvas");
        swatch.width = swatch.height = 12;
        const g = swatch.getContext("2d");
        g.fillStyle = css(kind === "flag" ? (v ? palette.on : palette.off) : palette.cats[v % palette.cats.length]);
        g.fillRect(0, 0, 12, 12);
        item.append(swatch, ` ${name} · ${count.toLocaleString("en")}`);
        if (kind === "category") {
          item.type = "button";
          item.setAttribute("aria-pressed", String(!state.off.has(v)));
          item.addEventListener("click", () => { state.off.has(v) ? state.off.delete(v) : state.off.add(v); paint(); $("legend").querySelectorAll("button")[v]?.focus(); });
        }
        cats.append(item);
      }
      box.append(cats);
    } else {
      const c = document.createElement("canvas"), scale = devicePixelRatio || 1, w = 300, h = 42;
      c.width = w * scale; c.height = h * scale; c.style.width = w + "px"; c.style.height = h + "px";
      c.setAttribute("role", "img");
      const from = kind === "signed" ? -reach() : low, to = kind === "signed" ? reach() : high;
      c.setAttribute("aria-label", `Colour scale from ${said(from)} to ${said(to)}`);
      const g = c.getContext("2d");
      g.scale(scale, scale);
      const bins = new Float64Array(100);
      for (const v of values) if (!Number.isNaN(v)) bins[Math.max(0, Math.min(99, Math.floor(100 * place(v))))]++;
      const top = Math.max(...bins.map(Math.sqrt), 1);
      for (let i = 0; i < 100; i++) {
        const x = 10 + (w - 20) * i / 100, wide = (w - 20) / 100 + 0.5;
        g.fillStyle = palette.soft; g.globalAlpha = 0.45;
        const tall = 17 * Math.sqrt(bins[i]) / top;
        g.fillRect(x, 18 - tall, wide - 0.8, tall);
        g.globalAlpha = 1; g.fillStyle = css(palette[kind][Math.round(255 * (i + 0.5) / 100)]);
        g.fillRect(x, 19, wide, 9);
      }
      g.fillStyle = palette.soft; g.font = "10.5px " + getComputedStyle(document.body).fontFamily; g.textBaseline = "top";
      for (const t of kind === "signed" ? [0, 0.25, 0.5, 0.75, 1] : [0, 0.5, 1]) {
        g.textAlign = t === 0 ? "left" : t === 1 ? "right" : "center";
        g.fillText(said(from + (to - from) * t), t === 0 ? 8 : t === 1 ? w - 8 : 10 + (w - 20) * t, 30);
      }
      box.append(c);
      const note = document.createElement("span");
      note.textContent = "The 1 % most extreme take the colours at the ends; above, how many neurons have the value (root scale).";
      box.append(note);
    }
    if (missing) { const note = document.createElement("span"); note.textContent = "Blank: not measured."; box.append(note); }
  }

  // ---- pointing ------------------------------------------------------------------------------------
  function hit(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    for (let k = 0; k < state.bands.length; k++) {
      const b = state.bands[k];
      if (y < b.y || y >= b.y + b.height) continue;
      const col = Math.floor(x / state.cell), row = Math.floor((y - b.y) / state.cell), position = col * b.rows + row;
      return col >= 0 && col < b.columns && position < state.head.sites[k].width ? { k, position } : null;
    }
    return null;
  }
  const address = ({ k, position }) => `${state.head.sites[k].number}:${indexAt(k, position)}`;
  const label = ({ k, position }) => state.labels?.[k]?.[indexAt(k, position)] ?? "";
  const seen = (t) => t.replaceAll(" ", "␣").replaceAll("\n", "↵");
  function move(cursor, at) {
    state.cursor = cursor;
    show();
    if (!cursor) { tip.hidden = true; return; }
    const word = label(cursor), value = said(valueAt(cursor.k, cursor.position));
    const link = document.createElement("a");
    link.href = "/neuron/" + address(cursor);
    link.textContent = address(cursor);
    $("where").replaceChildren(link, `${word ? ` “${seen(word)}”` : ""} · ${state.head.column} ${value}`);
    const strong = document.createElement("b");
    strong.textContent = address(cursor);
    const line = document.createElement("div");
    line.textContent = `${state.head.column}: ${value}`;
    $("tiptext").replaceChildren(strong, word ? ` “${seen(word)}”` : "", line);
    magnify(cursor);
    tip.hidden = false;
    const wide = tip.offsetWidth, tall = tip.offsetHeight;
    tip.style.left = Math.max(8, Math.min(innerWidth - wide - 8, at.x + 16)) + "px";
    tip.style.top = (at.y + tall + 24 > innerHeight ? Math.max(8, at.y - tall - 14) : at.y + 18) + "px";
  }
  function magnify({ k, position }) { // the cells around, as through a lens
    const b = state.bands[k], n = 11, m = Math.min(5, b.rows), side = 14, scale = devicePixelRatio || 1, g = lens.getContext("2d");
    lens.width = n * side * scale; lens.height = m * side * scale;
    lens.style.width = n * side + "px"; lens.style.height = m * side + "px";
    g.scale(scale, scale);
    const col = Math.floor(position / b.rows), row = position % b.rows;
    const top = Math.max(0, Math.min(row - 2, b.rows - m));
    for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) {
      const c = col + i - 5, r = top + j, p = c * b.rows + r;
      const inside = c >= 0 && c < b.columns && r >= 0 && r < b.rows && p < state.head.sites[k].width;
      g.fillStyle = inside ? css(colour(valueAt(k, p))) : "transparent";
      g.fillRect(i * side, j * side, side - 1, side - 1);
    }
    g.lineWidth = 2; g.strokeStyle = palette.ink; g.strokeRect(5 * side, (row - top) * side, side - 1, side - 1);
  }
  const open = () => { if (state.cursor) location.href = "/neuron/" + address(state.cursor); };
  let touched = null;
  canvas.addEventListener("pointermove", (e) => { if (e.pointerType === "mouse" && state.base) move(hit(e), { x: e.clientX, y: e.clientY }); });
  canvas.addEventListener("pointerleave", (e) => { if (e.pointerType === "mouse") tip.hidden = true; });
  canvas.addEventListener("click", (e) => {
    const at = state.base && hit(e);
    if (!at) return;
    const again = touched === address(at);
    move(at, { x: e.clientX, y: e.clientY });
    if (e.pointerType === "mouse" || again) open();
    touched = address(at);
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  canvas.addEventListener("blur", () => { tip.hidden = true; });
  canvas.addEventListener("keydown", (e) => {
    if (!state.base || e.ctrlKey || e.altKey || e.metaKey) return;
    let { k, position } = state.cursor ?? { k: state.bands.length - 1, position: 0 };
    const fresh = !state.cursor, last = state.bands.length - 1, b = state.bands[k], width = () => state.head.sites[k].width;
    const column = Math.floor(position / b.rows), row = position % b.rows;
    const enter = (next, fromBelow) => { // into another band at the same column
      k = next;
      const c = state.bands[k];
      position = Math.min(width() - 1, Math.min(column, c.columns - 1) * c.rows + (fromBelow ? c.rows - 1 : 0));
    };
    switch (e.key) {
      case "Enter": open(); return;
      case "Escape": tip.hidden = true; return;
      case "ArrowRight": if (!fresh) position = Math.min(width() - 1, position + b.rows); break;
      case "ArrowLeft": if (!fresh) position = Math.max(0, position >= b.rows ? position - b.rows : position); break;
      case "ArrowDown": if (row + 1 < b.rows && position + 1 < width()) position++; else if (k > 0) enter(k - 1, false); break;
      case "ArrowUp": if (row > 0) position--; else if (k < last) enter(k + 1, true); break;
      case "PageUp": enter(Math.min(last, k + 1), false); break;
      case "PageDown": enter(Math.max(0, k - 1), false); break;
      case "Home": position = 0; break;
      case "End": position = width() - 1; break;
      default: return;
    }
    e.preventDefault();
    const { x, y } = spot(k, position), box = canvas.getBoundingClientRect();
    if (box.top + y < 60 || box.top + y > innerHeight - 60) scrollBy(0, box.top + y - innerHeight / 2);
    const now = canvas.getBoundingClientRect();
    move({ k, position }, { x: now.left + x, y: now.top + y });
  });

  // ---- data ----------------------------------------------------------------------------------------
  let loads = 0;
  async function load() {
    const column = $("column").value, turn = ++loads;
    $("mapstate").textContent = "loading the map …";
    try {
      const answer = await fetch("/map/values?" + new URLSearchParams({ column }), { headers: { "HX-Request": "true" } });
      if (!answer.ok) throw new Error((await answer.text()).replace(/<[^>]*>/g, "").trim());
      const data = await answer.arrayBuffer();
      if (turn !== loads) return; // another column was chosen meanwhile: the last choice is drawn
      const size = new DataView(data).getUint32(0, true);
      state.head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
      state.values = new Float32Array(data, 4 + size);
      dress(); // what a category's colours are depends on the column
      let from = 0;
      state.starts = state.head.sites.map((s) => { const at = from; from += s.width; return at; });
      state.off.clear(); state.cursor = null; tip.hidden = true;
      canvas.setAttribute("aria-label", canvas.getAttribute("aria-label").replace(/by .*?\. Arrow/, () => `by ${column}. Arrow`));
      sorted(); layout(); paint();
      canvas.dataset.column = column;
      $("mapstate").textContent = "";
    } catch (error) {
      if (turn === loads) $("mapstate").textContent = "The map could not be drawn: " + error.message;
    }
  }
  async function ring() {
    const q = $("q").value.trim();
    const list = q ? await (await fetch("/map/found?" + new URLSearchParams({ q }))).json() : [];
    state.found = new Set(list.slice(0, 60).map((a) => a.split(":").map(Number)));
    if (q) $("mapstate").textContent = list.length ? `${Math.min(60, list.length)} neurons of “${q}” ringed` : `no neuron fits “${q}”`;
    else $("mapstate").textContent = "";
    if (state.base) paint();
  }
  function remember() {
    const query = new URLSearchParams([["column", $("column").value], ["order", $("order").value], ["q", $("q").value.trim()]].filter(([, v]) => v));
    history.replaceState(null, "", "/map?" + query);
  }
  $("mapform").addEventListener("submit", (e) => { e.preventDefault(); remember(); ring(); });
  $("column").addEventListener("change", () => { remember(); load(); });
  $("order").addEventListener("change", () => { remember(); if (state.head) { state.cursor = null; sorted(); paint(); } });
  $("q").addEventListener("search", () => { remember(); ring(); });
  dark.addEventListener("change", () => { dress(); if (state.base) paint(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (state.head && innerWidth !== width) { width = innerWidth; layout(); paint(); } });

  dress();
  load().then(() => $("q").value.trim() && ring());
  fetch("/map/labels").then((a) => a.json()).then((words) => { state.labels = words; });
})();
