"use strict";
(() => {
  const INK = { light: "#444b54", dark: "#c8ced5" };
  const CARD = { light: "#ffffff", dark: "#23282e" };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = [];

  // Ink and hover boxes follow the page; everything else in the figures shows on both grounds.
  const inked = (mode) => ({
    "font.color": INK[mode],
    "hoverlabel.bgcolor": CARD[mode],
    "hoverlabel.bordercolor": "rgba(128,128,128,0.4)",
    "hoverlabel.font.color": INK[mode],
  });
  const dress = (plot, layout, mode) => {
    const written = plot.data.flatMap((trace, k) => (trace.texttemplate ? [k] : []));
    return Plotly.update(plot, { "textfont.color": INK[mode] }, { ...inked(mode), ...layout }, written);
  };
  const mode = () => (dark.matches ? "dark" : "light");

  for (const source of document.querySelectorAll("script[data-figure]")) {
    const plot = source.previousElementSibling;
    const figure = JSON.parse(source.textContent);
    plot.replaceChildren();
    const across = figure.layout.xaxis;
    if (across.ticktext && plot.clientWidth < 640) {
      // Too narrow for names side by side: unbroken and upright they keep apart.
      across.ticktext = across.ticktext.map((name) => name.replaceAll("<br>", " "));
      across.tickangle = -90;
    }
    plot.style.minHeight = `${figure.layout.height}px`;
    Plotly.newPlot(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true, showTips: false })
      .then(() => dress(plot, {}, mode()));
    plots.push(plot);
  }

  dark.addEventListener("change", () => plots.forEach((plot) => dress(plot, {}, mode())));
  // Paper is white and narrower than most screens, and a browser does not lay figures out again for it.
  window.addEventListener("beforeprint", () =>
    plots.forEach((plot) => dress(plot, { width: 640 }, "light")));
  window.addEventListener("afterprint", () =>
    plots.forEach((plot) => dress(plot, { width: null, autosize: true }, mode())));
})();
