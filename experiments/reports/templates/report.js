"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = [...document.querySelectorAll(".plot")];
const hidden = new Set();
const touch = matchMedia("(pointer: coarse)").matches;

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Colours are the page's; an arm that was switched off stays off.
function traces(figure) {
  return figure.data.map((trace) => {
    const arms = Number(style("--arms"));
    const color = trace.meta === null ? style("--muted") : style(`--arm-${trace.meta % arms}`);
    return {
      type: "scatter", showlegend: false, ...trace, visible: !hidden.has(trace.meta),
      line: { ...trace.line, color }, marker: { ...trace.marker, color },
    };
  });
}

function layout(figure) {
  const axis = {
    gridcolor: style("--line"), linecolor: style("--line"), zeroline: false, automargin: true, fixedrange: false,
    exponentformat: "B", separatethousands: true, tickfont: { size: 11.5 }, nticks: 6,
  };
  const titled = (own) => ({ ...axis, ...own, title: { standoff: 10, font: { size: 12.5 }, ...(own?.title ?? {}) } });
  return {
    ...figure.layout, xaxis: titled(figure.layout.xaxis), yaxis: titled(figure.layout.yaxis),
    autosize: true, height: figure.layout.height ?? 320, margin: { l: 52, r: 14, t: 30, b: 44 }, uirevision: "kept",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12.5, color: style("--muted") },
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") }, namelength: 60 },
    dragmode: touch ? false : "zoom", // a finger scrolls the page; the bar's buttons zoom
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--muted"), activecolor: style("--ink") },
  };
}

function draw() {
  return Promise.all(plots.map((place, i) => Plotly.react(place, traces(figures[i]), layout(figures[i]), {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", displayModeBar: touch ? true : "hover",
    modeBarButtonsToRemove: touch ? ["zoom2d", "pan2d", "select2d", "lasso2d", "autoScale2d"] : ["select2d", "lasso2d", "autoScale2d"],
  })));
}

for (const button of document.querySelectorAll("button[data-arm]")) {
  button.addEventListener("click", () => {
    const arm = Number(button.dataset.arm);
    const shown = hidden.delete(arm);
    if (!shown) hidden.add(arm);
    button.setAttribute("aria-pressed", String(shown));
    draw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw().then(() => document.documentElement.setAttribute("data-drawn", String(plots.length)));
