"use strict";
(function () {
  const NARROW = 560;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false };
  const font = getComputedStyle(document.body).fontFamily;

  /* Sets a dotted attribute ("yaxis.ticktext") of a layout. */
  function assign(layout, name, value) {
    const parts = name.split(".");
    const last = parts.pop();
    parts.reduce((node, part) => (node[part] = node[part] || {}), layout)[last] = value;
  }

  function draw(element) {
    const width = element.clientWidth;
    if (!width || element.dataset.width === String(width)) return;
    element.dataset.width = String(width);
    const figure = figures[element.dataset.figure];
    const layout = structuredClone(figure.layout);
    layout.width = width;
    layout.height = element.clientHeight;
    layout.font.family = font;
    layout.hoverlabel.font.family = font;
    if (document.documentElement.clientWidth < NARROW) {
      Object.entries(figure.narrow).forEach(([name, value]) => assign(layout, name, value));
    }
    Plotly.react(element, structuredClone(figure.data), layout, config);
  }

  const elements = Array.from(document.querySelectorAll("[data-figure]"));
  /* One figure after the other, so that the page can be read and scrolled at once. */
  (function drawNext(rest) {
    if (!rest.length) {
      document.documentElement.dataset.drawn = "yes";
      return;
    }
    draw(rest[0]);
    setTimeout(drawNext, 0, rest.slice(1));
  })(elements);

  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => elements.forEach(draw), 120);
  });
  /* A printed page shows the folded tables. */
  window.addEventListener("beforeprint", () =>
    document.querySelectorAll("details").forEach((part) => part.setAttribute("open", "")));
})();
