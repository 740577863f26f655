"use strict";
(() => {
  const INK = { light: "#444b54", dark: "#bcc3cb" };
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
  const mode = () => (dark.matches ? "dark" : "light");

  for (const source of document.querySelectorAll("script[data-figure]")) {
    const plot = source.previousElementSibling;
    const figure = JSON.parse(source.textContent);
    plot.replaceChildren();
    plot.style.minHeight = `${figure.layout.height}px`;
    Plotly.newPlot(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true, showTips: false })
      .then(() => Plotly.relayout(plot, inked(mode())));
    plots.push(plot);
  }

  dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, inked(mode()))));
  // Paper is white and narrower than most screens, and a browser does not lay figures out again for it.
  window.addEventListener("beforeprint", () =>
    plots.forEach((plot) => Plotly.relayout(plot, { ...inked("light"), width: 640 })));
  window.addEventListener("afterprint", () =>
    plots.forEach((plot) => Plotly.relayout(plot, { ...inked(mode()), width: null, autosize: true })));
})();
