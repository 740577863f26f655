"use strict";
(() => {
  const INK = { light: "#444b54", dark: "#c8ced5" };
  const CARD = { light: "#ffffff", dark: "#1b1f24" };
  const NARROW = 640; // pixels of a figure
  const LETTER = 7.2; // pixels, at the figures' size of text
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const mode = () => (dark.matches ? "dark" : "light");
  const figures = new Map(); // element -> what the page holds for it

  // --- tables and figures for other programs ----------------------------------------------------------

  const csv = (rows) => rows.map((row) => row.map((cell) =>
    /[",\n]/.test(cell.text) ? `"${cell.text.replaceAll('"', '""')}"` : cell.text).join(",")).join("\n") + "\n";

  const TEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "±": "$\\pm$", "−": "$-$", "–": "--",
    "↑": "$\\uparrow$", "↓": "$\\downarrow$", "→": "$\\rightarrow$", "β": "$\\beta$", "ε": "$\\varepsilon$", "≥": "$\\geq$",
    "≤": "$\\leq$", "×": "$\\times$", "✓": "$\\checkmark$", "…": "\\ldots{}", "“": "``", "”": "''",
  };
  const tex = (text) => text.replace(/[\\&%$#_{}~^<>±−–↑↓→βε≥≤×✓…“”]/g, (c) => TEX[c]);
  const latex = (rows, caption) => {
    const width = Math.max(...rows.map((row) => row.reduce((n, cell) => n + cell.span, 0)));
    const plain = rows.find((row) => row.length === width);
    const line = (row) => row.map((cell) => {
      const said = cell.best ? `\\textbf{${tex(cell.text)}}` : tex(cell.text);
      return cell.span > 1 ? `\\multicolumn{${cell.span}}{l}{${said}}` : said;
    }).join(" & ") + " \\\\";
    return [
      `% ${caption}. Needs \\usepackage{booktabs}`,
      `\\begin{tabular}{${plain.map((cell) => (cell.number ? "r" : "l")).join("")}}`, "\\toprule",
      line(rows[0]), "\\midrule", ...rows.slice(1).map(line), "\\bottomrule", "\\end{tabular}", "",
    ].join("\n");
  };
  const read = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => ({
    text: cell.textContent.trim().replace(/\s+/g, " "), span: cell.colSpan,
    number: cell.classList.contains("number"), best: cell.classList.contains("best"),
  })));

  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { // no clipboard access for this page: use the older way
      const area = document.createElement("textarea");
      area.value = text;
      area.className = "away";
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  };
  const button = (text, what, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-label", `${text}: ${what}`);
    made.addEventListener("click", async () => {
      told.textContent = (await act()) ? `${text}: done` : `${text}: not possible here`;
      made.textContent = told.textContent;
      setTimeout(() => { made.textContent = text; }, 1600);
    });
    return made;
  };
  const tools = (...buttons) => {
    const row = document.createElement("div");
    row.className = "tools";
    row.append(...buttons);
    return row;
  };
  const told = document.createElement("div"); // tells a screen reader that a button has done its work
  told.className = "away";
  told.setAttribute("role", "status");
  document.body.append(told);

  for (const table of document.querySelectorAll("table")) {
    const what = table.caption.textContent.trim();
    table.closest(".scroll").after(tools(
      button("Copy as CSV", what, () => copied(csv(read(table)))),
      button("Copy as LaTeX", what, () => copied(latex(read(table), what))),
    ));
  }

  // --- figures ----------------------------------------------------------------------------------------

  // Ink and hover boxes follow the page; everything else in the figures is visible on both backgrounds.
  const inked = (in_mode, notes = []) => ({
    ...Object.fromEntries(notes.map((_, k) => [`annotations[${k}].bgcolor`, CARD[in_mode]])),
    "font.color": INK[in_mode],
    "hoverlabel.bgcolor": CARD[in_mode],
    "hoverlabel.bordercolor": "rgba(128,128,128,0.4)",
    "hoverlabel.font.color": INK[in_mode],
  });
  const dress = (plot, layout, in_mode) => {
    const written = plot.data.flatMap((trace, k) => (trace.texttemplate ? [k] : []));
    const ink = written.length ? { "textfont.color": INK[in_mode] } : {};
    return Plotly.update(plot, ink, { ...inked(in_mode, plot.layout.annotations), ...layout }, written.length ? written : undefined);
  };

  const longest = (texts) => Math.max(0, ...texts.map((text) => text.length));
  const wrap = (text, width) => {
    const lines = [""];
    for (const word of text.split(/<br>| /)) {
      const last = lines.at(-1);
      if (last && last.length + 1 + word.length > width) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    return lines.join("<br>");
  };

  // The figure for this width: where it is narrow, names and titles wrap and the legend gets its own space.
  const fitted = (source, width) => {
    const figure = JSON.parse(source.textContent);
    const { layout, data } = figure;
    const { xaxis, yaxis } = layout;
    const narrow = width < NARROW;
    if (narrow && yaxis.ticktext) {
      yaxis.ticktext = yaxis.ticktext.map((name) => wrap(name, 16));
      const rows = yaxis.ticktext.length;
      const each = 16 * longest(yaxis.ticktext.map((name) => name.split("<br>"))) + 4;
      layout.height += rows * Math.max(0, each - (layout.height - 80) / rows);
    }
    if (xaxis.ticktext) { // headings above their columns: horizontal where they fit, else vertical
      const names = yaxis.ticktext ? longest(yaxis.ticktext.flatMap((name) => name.split("<br>"))) : 4;
      const room = (Math.max(width, layout.meta?.least ?? 0) - 40 - LETTER * names) / xaxis.ticktext.length;
      const upright = LETTER * longest(xaxis.ticktext.flatMap((name) => name.split("<br>"))) > room;
      xaxis.tickangle = upright ? -90 : 0;
      if (upright) {
        xaxis.ticktext = xaxis.ticktext.map((name) => name.replaceAll("<br>", " "));
        layout.height += LETTER * longest(xaxis.ticktext) - 20;
      } else layout.height += 16 * (longest(xaxis.ticktext.map((name) => name.split("<br>"))) - 1);
    } else if (narrow) {
      xaxis.nticks = 5;
      xaxis.tickangle = 0;
    }
    if (!narrow) return figure;
    if (xaxis.title) {
      xaxis.title.text = wrap(xaxis.title.text, 26);
      layout.height += 16 * (xaxis.title.text.split("<br>").length - 1);
    }
    const named = data.filter((trace) => trace.name && trace.showlegend !== false).length;
    if (layout.showlegend !== false && named > 1) {
      layout.height += 19 * Math.max(0, named - 2);
      layout.legend.maxheight = 20 * named + 20;
    }
    return figure;
  };

  // Labels of points: each goes to the first place around its point where it covers no label, point or bar, if there
  // is one. A label that would cover a label or a point, or whose point lies on another, is left to the legend.
  const PLACES = ["top center", "bottom center", "middle right", "middle left", "top right", "top left", "bottom right", "bottom left"];
  const across = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  const box = (element) => {
    const { x, y, width, height } = element.getBoundingClientRect();
    return { x, y, w: width, h: height };
  };
  const around = (dot, label, place) => {
    const [upright, sideways] = place.split(" ");
    const x = { left: dot.x - label.w - 2, center: dot.x + (dot.w - label.w) / 2, right: dot.x + dot.w + 2 }[sideways];
    const y = { top: dot.y - label.h, middle: dot.y + (dot.h - label.h) / 2, bottom: dot.y + dot.h }[upright];
    return { x, y, w: label.w, h: label.h };
  };
  const placed = (plot) => {
    const labelled = plot.data.flatMap((trace, k) => (trace.mode === "markers+text" ? [k] : []));
    const drawn = [...plot.querySelectorAll(".scatterlayer .trace")].filter((trace) => trace.querySelector(".textpoint text"));
    if (!labelled.length || drawn.length !== labelled.length) return null;
    const frame = box(plot.querySelector(".nsewdrag"));
    const dots = drawn.map((trace) => box(trace.querySelector(".points path")));
    const labels = drawn.map((trace) => box(trace.querySelector(".textpoint text")));
    const bars = drawn.flatMap((trace) => [...trace.querySelectorAll(".errorbars path")].map(box));
    const notes = [...plot.querySelectorAll(".annotation-text")].map(box);
    const taken = [];
    const places = labels.map((label, i) => {
      if (dots.some((other, j) => j !== i && across(dots[i], other))) return null;
      const free = PLACES.map((place) => [place, around(dots[i], label, place)]).filter(([, at]) =>
        at.x >= frame.x && at.x + at.w <= frame.x + frame.w && at.y >= frame.y && at.y + at.h <= frame.y + frame.h &&
        ![...taken, ...notes, ...dots.filter((_, j) => j !== i)].some((other) => across(at, other)));
      const best = free.find(([, at]) => !bars.some((bar) => across(at, bar))) ?? free[0];
      if (!best) return null;
      taken.push(best[1]);
      return best[0];
    });
    return Plotly.restyle(plot, {
      mode: places.map((place) => (place ? "markers+text" : "markers")),
      textposition: places.map((place) => place ?? "top center"),
    }, labelled);
  };

  const least = (source) => JSON.parse(source.textContent).layout.meta?.least ?? 0;
  const draw = async (plot, source) => {
    const figure = fitted(source, plot.clientWidth);
    plot.style.minHeight = `${figure.layout.height}px`;
    await Plotly.react(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true, showTips: false });
    await dress(plot, {}, mode());
    await placed(plot);
  };
  // For print: dark ink on a transparent background, whatever the page looks like.
  const svg = async (plot, name) => {
    const { data, layout } = JSON.parse(JSON.stringify({ data: plot.data, layout: plot.layout }));
    layout.font.color = INK.light;
    for (const trace of data) if (trace.texttemplate) trace.textfont = { ...trace.textfont, color: INK.light };
    const { width, height } = plot._fullLayout;
    const made = await Plotly.toImage({ data, layout }, { format: "svg", width, height, imageDataOnly: true });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([made], { type: "image/svg+xml" }));
    link.download = `${name}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    return true;
  };

  const library = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script); // runs because the page's policy admits exactly this text, by its hash
    script.remove();
  };
  const start = async () => {
    const sources = [...document.querySelectorAll("script[data-figure]")];
    if (!sources.length) return;
    await library();
    for (const source of sources) {
      const plot = source.previousElementSibling.querySelector(".plot");
      plot.replaceChildren();
      plot.style.minWidth = `${least(source)}px`;
      figures.set(plot, source);
      await draw(plot, source);
      const heading = source.closest("figure").querySelector("h3").textContent.trim();
      source.after(tools(button("Save as SVG", heading, () => svg(plot, source.dataset.figure))));
    }
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return; // a phone's toolbars appear and disappear
      width = window.innerWidth;
      figures.forEach((source, plot) => draw(plot, source));
    });
    dark.addEventListener("change", () => figures.forEach((_, plot) => dress(plot, {}, mode())));
    // Paper is white and narrower than most screens, and browsers do not lay figures out again for it.
    window.addEventListener("beforeprint", () => figures.forEach((_, plot) => dress(plot, { width: 640 }, "light")));
    window.addEventListener("afterprint", () => figures.forEach((_, plot) => dress(plot, { width: null, autosize: true }, mode())));
  };
  start();
})();
