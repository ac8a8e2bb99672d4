// Draws every <figure class="chart"> of the page as SVG: hover for values, drag to zoom, click the
// legend to hide a line. The data are the JSON element inside the figure (report/charts.py).
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const hidden = new Set(); // labels of hidden series, in all figures of the page
  const charts = [];

  function make(name, attributes, parent, text) {
    const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  const colors = (look) => `--l:${look.light};--d:${look.dark}`;

  // ---- scales and ticks -------------------------------------------------------------------------

  const SCALES = {
    linear: { to: (v) => v, from: (t) => t },
    log: { to: (v) => (v > 0 ? Math.log10(v) : NaN), from: (t) => 10 ** t },
    symlog: {
      to: (v) => (Math.abs(v) <= 1 ? v : Math.sign(v) * (1 + Math.log10(Math.abs(v)))),
      from: (t) => (Math.abs(t) <= 1 ? t : Math.sign(t) * 10 ** (Math.abs(t) - 1)),
    },
  };
  const scaleOf = (axis) => SCALES[axis.scale || "linear"];

  function format(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1e4) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(4)));
  }

  function linearTicks(low, high, count, whole) {
    const raw = Math.max(whole ? 1 : 0, (high - low) / Math.max(1, count)), power = 10 ** Math.floor(Math.log10(raw));
    const step = (whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map((m) => m * power).find((s) => s >= raw * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
    return ticks;
  }

  function decadeTicks(low, high, count) {
    const inside = (multiples) => {
      const ticks = [];
      for (let k = Math.floor(low); k <= Math.ceil(high); k++) {
        for (const m of multiples) {
          const t = Math.log10(m) + k;
          if (t >= low - 1e-9 && t <= high + 1e-9) ticks.push(Number((m * 10 ** k).toPrecision(6)));
        }
      }
      return ticks;
    };
    for (const multiples of [[1, 2, 5], [1, 3], [1]]) {
      const ticks = inside(multiples);
      if (ticks.length <= count + 1 && ticks.length >= 2) return ticks;
    }
    const all = inside([1]), every = Math.ceil(all.length / Math.max(2, count));
    return all.length >= 2 ? all.filter((_, i) => i % every === 0) : linearTicks(10 ** low, 10 ** high, count);
  }

  function ticksOf(axis, [low, high], count, whole) {
    const scale = scaleOf(axis);
    if (axis.ticks) {
      let fixed = axis.ticks.filter(([v]) => scale.to(v) >= low - 1e-9 && scale.to(v) <= high + 1e-9);
      const every = Math.ceil(fixed.length / Math.max(2, count * 1.7));
      fixed = fixed.filter((_, i) => i % every === 0);
      if (fixed.length >= 2 || axis.ticks.length < 2) return fixed;
    }
    let values;
    if (axis.scale === "log") values = decadeTicks(low, high, count);
    else if (axis.scale === "symlog") {
      values = [0, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 1e4, 1e5].flatMap((v) => (v ? [-v, v] : [v]))
        .sort((a, b) => a - b).filter((v) => scale.to(v) >= low - 1e-9 && scale.to(v) <= high + 1e-9);
      const every = Math.ceil(values.length / Math.max(2, count));
      const zero = Math.max(0, values.indexOf(0));
      values = values.filter((_, i) => (i - zero) % every === 0);
    } else values = linearTicks(low, high, count, whole);
    return values.map((v) => [v, format(v)]);
  }

  // Lowest and highest value in scale units, with a margin; intervals widen it by a third at most.
  function domain(axis, panel, name) {
    const scale = scaleOf(axis);
    if (axis.limits) return axis.limits.map(scale.to).sort((a, b) => a - b);
    const shown = panel.series.filter((s) => !hidden.has(s.label));
    const main = shown.flatMap((s) => s[name]).map(scale.to).filter(Number.isFinite);
    if (!main.length) return [0, 1];
    let low = Math.min(...main), high = Math.max(...main);
    const reach = (high - low) / 3 || Infinity;
    if (name === "y") {
      const ends = shown.flatMap((s) => [...(s.low || []), ...(s.high || [])]).map((v) => (v === null ? NaN : scale.to(v)));
      for (const end of ends.filter(Number.isFinite)) {
        low = Math.min(low, Math.max(end, Math.min(...main) - reach));
        high = Math.max(high, Math.min(end, Math.max(...main) + reach));
      }
    }
    for (const rule of panel.rules.filter((r) => r.vertical === (name === "x"))) {
      const at = scale.to(rule.at);
      if (Number.isFinite(at)) [low, high] = [Math.min(low, at), Math.max(high, at)];
    }
    if (axis.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5;
    return [axis.zero && low === 0 ? 0 : low - margin, high + margin];
  }

  // ---- marks ------------------------------------------------------------------------------------

  function marker(kind, x, y, r) {
    const at = (points) => "M" + points.map(([a, b]) => `${(x + a * r).toFixed(1)} ${(y + b * r).toFixed(1)}`).join("L") + "Z";
    const n = 0.45;
    const shapes = {
      s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
      D: [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]],
      v: [[-1.1, -0.9], [1.1, -0.9], [0, 1.1]],
      "^": [[-1.1, 0.9], [1.1, 0.9], [0, -1.1]],
      "<": [[0.9, -1.1], [0.9, 1.1], [-1.1, 0]],
      ">": [[-0.9, -1.1], [-0.9, 1.1], [1.1, 0]],
      P: [[-n, -1.2], [n, -1.2], [n, -n], [1.2, -n], [1.2, n], [n, n], [n, 1.2], [-n, 1.2], [-n, n], [-1.2, n], [-1.2, -n], [-n, -n]],
      X: [[-1.2, -0.7], [-0.7, -1.2], [0, -0.5], [0.7, -1.2], [1.2, -0.7], [0.5, 0], [1.2, 0.7], [0.7, 1.2], [0, 0.5], [-0.7, 1.2], [-1.2, 0.7], [-0.5, 0]],
    };
    if (shapes[kind]) return at(shapes[kind]);
    return `M${(x - r).toFixed(1)} ${y.toFixed(1)}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
  }

  function swatch(series) {
    const svg = make("svg:svg", { width: 30, height: 12, viewBox: "0 0 30 12", "aria-hidden": "true", class: "s", style: colors(series.look) });
    if (series.line) make("svg:path", { d: "M1 6H29", "stroke-width": 2, "stroke-dasharray": series.look.dash, class: "line" }, svg);
    if (series.points) make("svg:path", { d: marker(series.look.marker, 15, 6, 3.5), class: "point" }, svg);
    return svg;
  }

  // ---- one panel --------------------------------------------------------------------------------

  function draw(chart, panel) {
    const box = panel.box, width = Math.floor(box.clientWidth);
    if (width < 60) return;
    const small = chart.figure.classList.contains("compact");
    let height = Math.round(small ? Math.min(200, Math.max(120, width * 0.72)) : Math.min(310, Math.max(200, width * 0.62)));
    if (chart.rows) height = 24 * chart.rows + 56;
    const xs = scaleOf(panel.x), ys = scaleOf(panel.y);
    const xd = panel.zoom.x || domain(panel.x, panel, "x"), yd = panel.zoom.y || domain(panel.y, panel, "y");
    const yTicks = ticksOf(panel.y, yd, chart.rows || Math.max(3, height / 55));
    const left = 16 + Math.max(14, ...yTicks.map(([, text]) => 6.4 * text.length)) + (panel.y.label ? 14 : 0);
    const right = 12, top = 8, bottom = panel.x.label ? 40 : 24, w = width - left - right, h = height - top - bottom;
    const whole = panel.series.every((s) => s.x.every(Number.isInteger)); // steps, layers, k
    const xTicks = ticksOf(panel.x, xd, Math.max(2, w / 75), whole);
    const flip = (t, reverse) => (reverse ? 1 - t : t);
    const px = (v) => left + w * flip((xs.to(v) - xd[0]) / (xd[1] - xd[0]), panel.x.reverse);
    const py = (v) => top + h * (1 - flip((ys.to(v) - yd[0]) / (yd[1] - yd[0]), panel.y.reverse));
    panel.back = { // from pixels to scale units
      x: (p) => xd[0] + flip((p - left) / w, panel.x.reverse) * (xd[1] - xd[0]),
      y: (p) => yd[0] + flip(1 - (p - top) / h, panel.y.reverse) * (yd[1] - yd[0]),
    };

    const svg = make("svg:svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": panel.alt });
    const clip = `clip-${chart.figure.id}-${panel.index}`;
    make("svg:rect", { x: left, y: top, width: w, height: h }, make("svg:clipPath", { id: clip }, make("svg:defs", {}, svg)));
    for (const [v, text] of yTicks) {
      make("svg:path", { d: `M${left} ${py(v).toFixed(1)}h${w}`, class: "grid" }, svg);
      make("svg:text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, svg, text);
    }
    for (const [v, text] of xTicks) {
      make("svg:path", { d: `M${px(v).toFixed(1)} ${top}v${h}`, class: "grid" }, svg);
      const half = 3.1 * text.length, x = px(v);
      const anchor = x + half > width ? "end" : x - half < 0 ? "start" : "middle";
      make("svg:text", { x: anchor === "end" ? width - 1 : x, y: height - bottom + 16, "text-anchor": anchor }, svg, text);
    }
    make("svg:path", { d: `M${left} ${top}v${h}h${w}`, class: "frame" }, svg);
    if (panel.x.label) make("svg:text", { x: left + w / 2, y: height - 6, "text-anchor": "middle", class: "name" }, svg, panel.x.label);
    if (panel.y.label) {
      make("svg:text", { transform: `translate(11 ${top + h / 2}) rotate(-90)`, "text-anchor": "middle", class: "name" }, svg, panel.y.label);
    }
    const body = make("svg:g", { "clip-path": `url(#${clip})` }, svg);
    for (const rule of panel.rules) {
      const d = rule.vertical ? `M${px(rule.at)} ${top}v${h}` : `M${left} ${py(rule.at)}h${w}`;
      make("svg:path", { d, class: "rule s", style: colors(rule.look) }, body);
      if (rule.label) {
        const at = rule.vertical ? { x: px(rule.at) + 4, y: top + 11 } : { x: left + w - 4, y: py(rule.at) - 4, "text-anchor": "end" };
        make("svg:text", { ...at, class: "rule-name" }, body, rule.label);
      }
    }
    panel.spots = [];
    const shown = panel.series.filter((s) => !hidden.has(s.label));
    const bands = make("svg:g", {}, body), lines = make("svg:g", {}, body), points = make("svg:g", {}, body);
    for (const series of shown) plot(series, { px, py, ys, bands, lines, points }, panel);
    panel.ring = make("svg:circle", { r: 7, class: "ring", visibility: "hidden" }, body);
    panel.frame = { left, top, w, h };
    panel.svg = svg;
    box.replaceChildren(svg);
  }

  function plot(series, place, panel) {
    const { px, py, bands, lines, points } = place;
    const style = { style: colors(series.look) };
    const xy = series.x.map((x, i) => [px(x), py(series.y[i])]);
    const ok = xy.map(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
    const floor = (v) => Math.min(Math.max(v, -2000), 4000); // far outside the panel is far enough
    const text = (list) => list.map(([x, y]) => `${floor(x).toFixed(1)} ${floor(y).toFixed(1)}`).join("L");
    if (series.low && series.bars) {
      const d = xy.map(([x, y], i) => {
        if (!ok[i] || series.low[i] === null || series.high[i] === null) return "";
        const low = py(series.low[i]), high = py(series.high[i]);
        return `M${x.toFixed(1)} ${floor(Number.isFinite(low) ? low : 4000).toFixed(1)}V${floor(high).toFixed(1)}`;
      }).join("");
      make("svg:path", { d, class: "bar s", ...style }, lines);
    } else if (series.low) {
      const kept = xy.map((_, i) => i).filter((i) => ok[i] && series.low[i] !== null && series.high[i] !== null);
      const low = kept.map((i) => [xy[i][0], Number.isFinite(py(series.low[i])) ? py(series.low[i]) : 4000]);
      const high = kept.map((i) => [xy[i][0], py(series.high[i])]).reverse();
      if (kept.length > 1) make("svg:path", { d: `M${text([...low, ...high])}Z`, class: "band s", ...style }, bands);
    }
    const drawn = xy.filter((_, i) => ok[i]);
    if (series.line && drawn.length > 1) {
      const attributes = { d: "M" + text(drawn), "stroke-width": series.width, class: "line s", ...style };
      if (series.look.dash) attributes["stroke-dasharray"] = series.look.dash;
      make("svg:path", attributes, lines);
    }
    const size = drawn.length > 60 ? 2 : 3.2;
    const single = drawn.length === 1;
    if (series.points || single) {
      make("svg:path", { d: drawn.map(([x, y]) => marker(series.look.marker, floor(x), floor(y), size)).join(""), class: "point s", ...style }, points);
    }
    if (series.marks && series.marks.length) {
      const d = series.marks.filter((i) => ok[i]).map((i) => marker("^", xy[i][0], xy[i][1], 6)).join("");
      make("svg:path", { d, class: "mark s", ...style }, points);
    }
    xy.forEach(([x, y], i) => { if (ok[i]) panel.spots.push({ x, y, i, series }); });
  }

  // ---- hover, zoom, legend ----------------------------------------------------------------------

  const tip = make("div", { class: "tip", role: "status", hidden: "" });

  function pointed(panel, event) {
    const bounds = panel.svg.getBoundingClientRect(), scale = bounds.width / panel.svg.viewBox.baseVal.width;
    const x = (event.clientX - bounds.left) / scale, y = (event.clientY - bounds.top) / scale;
    const { left, top, w, h } = panel.frame;
    const inside = (s) => s.x >= left - 1 && s.x <= left + w + 1 && s.y >= top - 1 && s.y <= top + h + 1;
    let best = null, nearest = 45 ** 2;
    for (const spot of panel.spots) {
      const far = (spot.x - x) ** 2 + (spot.y - y) ** 2;
      if (far < nearest && inside(spot)) [best, nearest] = [spot, far];
    }
    return best;
  }

  function show(panel, event) {
    const spot = pointed(panel, event);
    if (!spot) return hide(panel);
    const { series, i } = spot;
    panel.ring.setAttribute("cx", spot.x);
    panel.ring.setAttribute("cy", spot.y);
    panel.ring.setAttribute("visibility", "visible");
    tip.replaceChildren();
    const head = make("div", { class: "tip-head" }, tip);
    head.append(swatch(series));
    make("b", {}, head, series.label + (series.note ? `, ${series.note}` : ""));
    if (series.tips) make("div", {}, tip, series.tips[i]);
    const named = (axis, value) => (axis.ticks || []).find(([v]) => v === value)?.[1];
    make("div", {}, tip, `${panel.x.label || "x"}: ${named(panel.x, series.x[i]) || format(series.x[i])}`);
    const interval = series.low && series.low[i] !== null ? ` [${format(series.low[i])}, ${format(series.high[i])}]` : "";
    make("div", {}, tip, `${panel.y.label || panel.title || "y"}: ${format(series.y[i])}${interval}`);
    if (series.marks && series.marks.includes(i)) make("div", {}, tip, "first evaluation after a forward jump");
    tip.hidden = false;
    const space = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${window.scrollX + Math.max(4, Math.min(event.clientX + 14, space))}px`;
    tip.style.top = `${window.scrollY + event.clientY + 18}px`;
    return undefined;
  }

  function hide(panel) {
    tip.hidden = true;
    panel.ring.setAttribute("visibility", "hidden");
  }

  function listen(chart, panel) {
    const box = panel.box;
    let start = null, area = null;
    const local = (event) => {
      const bounds = panel.svg.getBoundingClientRect(), scale = bounds.width / panel.svg.viewBox.baseVal.width, f = panel.frame;
      const within = (v, low, size) => Math.min(Math.max(v, low), low + size);
      return [within((event.clientX - bounds.left) / scale, f.left, f.w), within((event.clientY - bounds.top) / scale, f.top, f.h)];
    };
    box.addEventListener("pointerdown", (event) => { if (event.button === 0) start = local(event); });
    box.addEventListener("pointermove", (event) => {
      if (!start) return void show(panel, event);
      const [x, y] = local(event), [x0, y0] = start;
      if (Math.abs(x - x0) < 6) return;
      hide(panel);
      if (!area) { area = make("svg:rect", { class: "area" }, panel.svg); box.setPointerCapture(event.pointerId); }
      const tall = Math.abs(y - y0) > 20, f = panel.frame;
      const sizes = { x: Math.min(x, x0), width: Math.abs(x - x0), y: tall ? Math.min(y, y0) : f.top, height: tall ? Math.abs(y - y0) : f.h };
      for (const [key, value] of Object.entries(sizes)) area.setAttribute(key, value);
    });
    box.addEventListener("pointerup", (event) => {
      if (area) {
        const [x, y] = local(event), [x0, y0] = start, sorted = (a, b) => [Math.min(a, b), Math.max(a, b)];
        panel.zoom = { x: sorted(panel.back.x(x0), panel.back.x(x)), y: Math.abs(y - y0) > 20 ? sorted(panel.back.y(y0), panel.back.y(y)) : null };
        for (const other of chart.panels) { // panels with the same axis zoom together
          if (other !== panel && panel.x.label && other.x.label === panel.x.label) other.zoom = { ...other.zoom, x: panel.zoom.x };
        }
        redraw(chart);
      } else show(panel, event); // a tap
      start = area = null;
    });
    box.addEventListener("pointercancel", () => { if (area) area.remove(); start = area = null; });
    box.addEventListener("pointerleave", () => hide(panel));
    box.addEventListener("dblclick", () => reset(chart));
  }

  function reset(chart) {
    for (const panel of chart.panels) panel.zoom = {};
    redraw(chart);
  }

  function redraw(chart) {
    for (const panel of chart.panels) draw(chart, panel);
    chart.reset.hidden = !chart.panels.some((panel) => panel.zoom.x || panel.zoom.y);
    for (const key of chart.figure.querySelectorAll(".key")) key.setAttribute("aria-pressed", String(!hidden.has(key.dataset.label)));
  }

  function toggle(label, alone) {
    if (alone) {
      const labels = new Set(charts.flatMap((chart) => chart.labels));
      const others = [...labels].filter((other) => other !== label);
      const isolated = others.every((other) => hidden.has(other));
      hidden.clear();
      if (!isolated) others.forEach((other) => hidden.add(other));
    } else if (!hidden.delete(label)) hidden.add(label);
    charts.forEach(redraw);
  }

  function rows(chart) { // the points of a figure as CSV
    const quote = (value) => (/[",\n]/.test(String(value ?? "")) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
    const lines = [["panel", "series", "point", "x", "y", "low", "high"]];
    for (const panel of chart.panels) {
      for (const s of panel.series) s.x.forEach((x, i) => lines.push([panel.title, s.label, s.tips?.[i], x, s.y[i], s.low?.[i], s.high?.[i]]));
    }
    return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
  }

  function legend(chart, bar) {
    const first = new Map();
    for (const series of chart.panels.flatMap((panel) => panel.series)) {
      const known = first.get(series.label); // the swatch shows the boldest line, and points if any series has them
      if (!known) first.set(series.label, { ...series });
      else {
        if (series.line && (!known.line || series.width > known.width)) Object.assign(known, { look: series.look, width: series.width, line: true });
        known.points ||= series.points;
      }
    }
    chart.labels = [...first.keys()];
    if (!chart.legend) return;
    for (const [label, series] of first) {
      const key = make("button", { type: "button", class: "key", "aria-pressed": "true", title: "Click: hide or show. Shift-click: only this one." }, bar);
      key.dataset.label = label;
      key.append(swatch(series));
      make("span", {}, key, label);
      key.addEventListener("click", (event) => toggle(label, event.shiftKey));
    }
  }

  function build(figure) {
    const chart = { figure, ...JSON.parse(figure.querySelector("script").textContent) };
    const bar = make("div", { class: "bar-of-keys" }), grid = make("div", { class: "panels" });
    figure.prepend(bar, grid);
    chart.panels.forEach((panel, index) => {
      const cell = make("div", { class: "panel" }, grid);
      if (panel.title) make("div", { class: "panel-title" }, cell, panel.title);
      panel.box = make("div", { class: "plot" }, cell);
      panel.alt = (chart.panels.length > 1 && panel.title ? `${panel.title}. ` : "") + figure.dataset.alt;
      panel.index = index;
      panel.zoom = {};
      listen(chart, panel);
    });
    legend(chart, bar);
    chart.reset = make("button", { type: "button", class: "tool", hidden: "" }, bar, "Reset zoom");
    chart.reset.addEventListener("click", () => reset(chart));
    const save = make("button", { type: "button", class: "tool", title: "Download the points of this figure" }, bar, "CSV");
    save.addEventListener("click", () => {
      const link = make("a", { download: `${figure.id}.csv`, href: URL.createObjectURL(new Blob([rows(chart)], { type: "text/csv" })) });
      link.click();
      URL.revokeObjectURL(link.href);
    });
    charts.push(chart);
    let width = 0;
    new ResizeObserver(() => {
      if (grid.clientWidth === width) return;
      width = grid.clientWidth;
      requestAnimationFrame(() => redraw(chart));
    }).observe(grid);
    redraw(chart);
  }

  document.querySelectorAll("figure.chart").forEach(build);
  document.body.append(tip);
})();
