"use strict";
/* Draws the charts from the numbers in the page, again whenever the width or a control changes, and shows values under
   the pointer. SVG is written as text: a browser that reads it as HTML needs no name of a namespace. */
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const hover = document.getElementById("hover");
  const settings = { smoothing: 0.6, axis: "x" };
  const edge = { left: 54, right: 14, top: 8, bottom: 32 };
  const unit = timeUnit();
  const fewest = 12;    /* points: fewer are shown as they are */

  const escape = (words) => String(words).replace(/[&<>"]/g, (sign) => "&#" + sign.charCodeAt(0) + ";");

  /* what the time axis counts: the page has hours, of which a short run has few */
  function timeUnit() {
    const times = charts.flatMap((chart) => chart.lines.flatMap((line) => line.t || []));
    const longest = times.reduce((a, b) => Math.max(a, b), 0);
    return longest < 2 ? { name: "minutes", per: 60 } : longest < 48 ? { name: "hours", per: 1 }
      : { name: "days", per: 1 / 24 };
  }

  function number(value, percent) {
    if (percent) return number(100 * value) + "%";
    const size = Math.abs(value);
    if (size >= 1e9 || (size > 0 && size < 1e-3)) {
      return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
    }
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  }

  /* an exponential mean that begins at the first value instead of at zero */
  function smooth(values, weight) {
    let mean = 0, missing = 1;
    return values.map((value) => {
      mean = weight * mean + (1 - weight) * value;
      missing *= weight;
      return mean / (1 - missing);
    });
  }

  function steps(low, high, wanted) {
    const rough = (high - low) / wanted, power = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) found.push(at * step);
    return found;
  }

  function decades(low, high) {
    const found = [];
    const span = Math.log10(high / low), signs = span > 3 ? [1] : span > 1.7 ? [1, 3] : span > 1 ? [1, 2, 5] : [1, 2, 3, 5, 7];
    const every = Math.max(1, Math.ceil(span / 6));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      if (power % every) continue;
      for (const sign of signs) {
        const value = sign * Math.pow(10, power);
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found.length > 1 ? found : steps(low, high, 4);
  }

  /* what of a curve is visible with the axes as they are */
  function visible(line, axis, logarithmic) {
    const times = axis === "t" && line.t ? line.t.map((one) => (one === null ? null : one * unit.per)) : null;
    const at = times || line.x, kept = { line: line, at: [], raw: [] }, means = [];
    line.y.forEach((value, i) => {
      if (at[i] === null || (logarithmic && value <= 0)) return;
      kept.at.push(at[i]);
      kept.raw.push(value);
      means.push(line.mean ? line.mean[i] : value);
    });
    const smoothed = line.smooth && kept.raw.length >= fewest && settings.smoothing > 0;
    kept.shown = smoothed ? smooth(means, settings.smoothing) : kept.raw;
    kept.smoothed = smoothed;
    return kept;
  }

  function range(lists) {
    let low = Infinity, high = -Infinity;
    for (const list of lists) for (const value of list) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return [low, high];
  }

  function scales(lines, logarithmic, width, height) {
    let [left, right] = range(lines.map((one) => one.at));
    let [low, high] = range(lines.map((one) => one.raw));
    if (left === right) { left -= 0.5; right += 0.5; }
    if (low === high) {
      low -= logarithmic ? low / 2 : Math.abs(low) / 10 || 0.5;
      high += Math.abs(high) / 10 || 0.5;
    } else if (!logarithmic) {
      const room = (high - low) * 0.04;
      low = low >= 0 && low < room ? 0 : low - room;
      high += room;
    }
    const across = (width - edge.left - edge.right) / (right - left), down = height - edge.top - edge.bottom;
    const part = logarithmic ? (value) => Math.log(value / low) / Math.log(high / low)
      : (value) => (value - low) / (high - low);
    return { left: left, right: right, low: low, high: high, x: (value) => edge.left + (value - left) * across,
      y: (value) => edge.top + (1 - part(value)) * down };
  }

  function path(at, values, scale) {
    return at.map((place, i) => (i ? "L" : "M") + scale.x(place).toFixed(1) + " " + scale.y(values[i]).toFixed(1)).join("");
  }

  function axes(scale, chart, logarithmic, width, height) {
    const bottom = height - edge.bottom, parts = [];
    const marks = logarithmic ? decades(scale.low, scale.high) : steps(scale.low, scale.high, 5);
    for (const value of marks) {
      const y = scale.y(value).toFixed(1);
      parts.push(`<path class="grid" d="M${edge.left} ${y}H${width - edge.right}"/>`,
        `<text x="${edge.left - 6}" y="${y}" dy="4" text-anchor="end">${number(value, chart.percent)}</text>`);
    }
    const wanted = Math.max(2, Math.floor(width / 75));
    let marked = steps(scale.left, scale.right, wanted);
    if (settings.axis === "x") marked = marked.filter((value) => Number.isInteger(value));
    for (const value of marked) {
      const x = scale.x(value), anchor = x > width - edge.right - 20 ? "end" : "middle";
      parts.push(`<text x="${x.toFixed(1)}" y="${bottom + 15}" text-anchor="${anchor}">${number(value)}</text>`);
    }
    parts.push(`<text x="${width - edge.right}" y="${height - 3}" text-anchor="end">`
      + `${settings.axis === "x" ? "step" : `${unit.name} in steps`}</text>`);
    return parts.join("");
  }

  function curves(lines, scale) {
    const parts = [];
    for (const one of lines) {
      const style = `s${one.line.colour}${one.line.dashed ? " dashed" : ""}`;
      if (one.smoothed) parts.push(`<path class="raw ${style}" d="${path(one.at, one.raw, scale)}"/>`);
    }
    for (const one of lines) {
      const style = `s${one.line.colour}${one.line.dashed ? " dashed" : ""}`;
      parts.push(`<path class="curve ${style}" d="${path(one.at, one.shown, scale)}"/>`);
      if (one.line.marks || one.at.length < fewest) {
        one.at.forEach((place, i) => parts.push(`<circle class="f${one.line.colour}" r="3" `
          + `cx="${scale.x(place).toFixed(1)}" cy="${scale.y(one.shown[i]).toFixed(1)}"/>`));
      }
    }
    return parts.join("");
  }

  function draw(figure) {
    const chart = charts[figure.dataset.chart], plot = figure.querySelector(".plot");
    const width = Math.max(220, plot.clientWidth), height = Math.round(Math.min(260, 150 + width / 7));
    const lines = chart.lines.filter((line) => !line.hidden)
      .map((line) => visible(line, settings.axis, chart.log)).filter((one) => one.at.length);
    if (!lines.length) {
      plot.innerHTML = '<p class="note">Nothing to draw with these settings.</p>';
      figure.view = null;
      return;
    }
    const scale = scales(lines, chart.log, width, height);
    plot.innerHTML = `<svg viewBox="0 0 ${width} ${height}" height="${height}" role="img" tabindex="0" `
      + `aria-label="${escape(chart.title)}">${axes(scale, chart, chart.log, width, height)}${curves(lines, scale)}`
      + `<path class="grid cross" d="" style="stroke: var(--soft)"/></svg>`;
    figure.view = { lines: lines, scale: scale, width: width, height: height };
  }

  function nearest(list, value) {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] <= value) low = middle; else high = middle;
    }
    return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
  }

  function show(figure, place, clientX, clientY) {
    const view = figure.view, chart = charts[figure.dataset.chart];
    const at = view.lines.map((one) => one.at[nearest(one.at, place)])
      .reduce((best, one) => (Math.abs(one - place) < Math.abs(best - place) ? one : best));
    view.place = at;
    const x = view.scale.x(at), gap = (view.scale.right - view.scale.left) / 25;
    figure.querySelector(".cross").setAttribute("d", `M${x} ${edge.top}V${view.height - edge.bottom}`);
    const rows = view.lines.map((one) => {
      const i = nearest(one.at, at);
      if (Math.abs(one.at[i] - at) > gap) return "";
      const own = one.at[i] === at ? "" : ` (${number(one.at[i])})`;
      const second = one.smoothed ? `<td>smoothed ${number(one.shown[i], chart.percent)}</td>` : "";
      const dot = `dot k${one.line.colour}${one.line.dashed ? " stripes" : ""}`;
      return `<tr><td class="word"><span class="key"><span class="${dot}"></span>`
        + `${escape(one.line.name)}${own}</span></td><td>${number(one.raw[i], chart.percent)}</td>${second}</tr>`;
    });
    const head = settings.axis === "x" ? `step ${at}` : `${number(at)} ${unit.name}`;
    put(`<strong>${head}</strong><table>${rows.join("")}</table>`, clientX, clientY);
  }

  function put(content, x, y) {
    hover.innerHTML = content;
    hover.hidden = false;
    const box = hover.getBoundingClientRect();
    const left = x + 16 + box.width > window.innerWidth ? x - 16 - box.width : x + 16;
    hover.style.left = Math.max(4, left) + "px";
    hover.style.top = Math.max(4, Math.min(y + 14, window.innerHeight - box.height - 4)) + "px";
  }

  function leave(figure) {
    hover.hidden = true;
    const cross = figure && figure.querySelector(".cross");
    if (cross) cross.setAttribute("d", "");
  }

  function follow(figure) {
    const plot = figure.querySelector(".plot");
    const move = (event) => {
      if (!figure.view) return;
      const box = plot.getBoundingClientRect(), scale = figure.view.scale;
      const share = (event.clientX - box.left - edge.left) / (box.width - edge.left - edge.right);
      show(figure, scale.left + share * (scale.right - scale.left), event.clientX, event.clientY);
    };
    plot.addEventListener("pointermove", move);
    plot.addEventListener("pointerdown", move);
    plot.addEventListener("pointerleave", () => leave(figure));
    plot.addEventListener("focusout", () => leave(figure));
    plot.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!way || !figure.view) return;
      event.preventDefault();
      const list = figure.view.lines.reduce((a, b) => (a.at.length >= b.at.length ? a : b)).at;
      const from = figure.view.place === undefined ? (way > 0 ? -1 : list.length) : nearest(list, figure.view.place);
      const place = list[Math.max(0, Math.min(list.length - 1, from + way))], box = plot.getBoundingClientRect();
      show(figure, place, box.left + figure.view.scale.x(place), box.top + 20);
    });
  }

  function button(label, pressed, press) {
    const made = document.createElement("button");
    made.type = "button";
    made.innerHTML = label;
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", () => made.setAttribute("aria-pressed", String(press())));
    return made;
  }

  function build(figure) {
    const chart = charts[figure.dataset.chart];
    if (chart.lines.some((line) => line.y.some((value) => value > 0))) {
      figure.querySelector("figcaption").append(button("log", Boolean(chart.log), () => {
        chart.log = !chart.log;
        draw(figure);
        return chart.log;
      }));
    }
    if (chart.lines.length > 1 || chart.named) {
      const legend = document.createElement("div");
      legend.className = "legend";
      for (const line of chart.lines) {
        const dot = `dot k${line.colour}${line.dashed ? " stripes" : ""}`;
        legend.append(button(`<span class="key"><span class="${dot}"></span>${escape(line.name)}</span>`,
          true, () => {
            line.hidden = !line.hidden;
            draw(figure);
            return !line.hidden;
          }));
      }
      figure.querySelector("figcaption").after(legend);
    }
    follow(figure);
    draw(figure);
  }

  const figures = Array.from(document.querySelectorAll("figure.chart"));
  const all = () => figures.forEach(draw);
  figures.forEach(build);
  const smoothing = document.getElementById("smoothing");
  if (smoothing) {
    smoothing.addEventListener("input", () => {
      settings.smoothing = Number(smoothing.value);
      document.getElementById("smoothing-value").textContent = smoothing.value;
      all();
    });
    document.querySelector("#axis option[value=t]").textContent = unit.name;
    document.getElementById("axis").addEventListener("change", (event) => {
      settings.axis = event.target.value;
      all();
    });
  }
  let waiting = 0;
  window.addEventListener("resize", () => {
    window.clearTimeout(waiting);
    waiting = window.setTimeout(all, 120);
  });

  /* tokens say their position, number, piece, and whether they carry loss */
  const pieces = JSON.parse((document.getElementById("pieces") || { textContent: "{}" }).textContent);
  const numbers = (token) => token.dataset.t.split(" ");
  function tell(token) {
    const stretch = token.parentElement;
    let at = Number(stretch.dataset.p);
    for (const one of stretch.children) {
      if (one === token) break;
      at += numbers(one).length;
    }
    const lines = numbers(token).map((id, i) => `position ${at + i}: token ${id}, ${escape(pieces[id])}`);
    return lines.join("\n") + (stretch.className === "learnt" ? "\nwith loss" : "\nwithout loss");
  }
  for (const block of document.querySelectorAll(".tokens")) {
    const move = (event) => {
      const token = event.target.closest("i");
      if (token) put(tell(token), event.clientX, event.clientY);
      else if (!event.target.closest("[data-tip]")) leave(null);
    };
    block.addEventListener("pointermove", move);
    block.addEventListener("pointerdown", move);
    block.addEventListener("pointerleave", () => leave(null));
  }

  /* bars and blocks say what they are */
  for (const part of document.querySelectorAll("[data-tip]")) {
    part.addEventListener("pointermove", (event) => put(escape(part.dataset.tip), event.clientX, event.clientY));
    part.addEventListener("pointerleave", () => leave(null));
  }
}());
