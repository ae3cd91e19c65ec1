// Draws each chart in the place of its picture, and again when the reader's colours change from light to dark or back.
"use strict";
const { arms, charts } = JSON.parse(document.getElementById("curves").textContent);
const colours = matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function armColour(index) {
  const known = [...Array(20).keys()].filter((i) => colour(`--arm-${i}`));
  return colour(`--arm-${index % known.length}`);
}

function trace(curve) {
  const mark = curve.markers;
  return {
    type: "scatter",
    x: curve.x,
    y: curve.y,
    name: arms[curve.arm],
    mode: mark ? "lines+markers" : "lines",
    opacity: curve.opacity,
    line: { color: armColour(curve.arm), width: curve.width, dash: curve.dash, shape: curve.steps ? "hv" : "linear" },
    marker: { size: 5 },
    hovertemplate: "%{y:.4~g} at %{x:.4~s}<extra>%{fullData.name}</extra>",
  };
}

function layout(axes) {
  const line = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
  const ticks = axes.ticks ? { tickvals: axes.ticks } : { nticks: 6 };
  return {
    showlegend: false,
    hovermode: "closest",
    dragmode: "zoom",
    margin: { l: 8, r: 12, t: 8, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--muted"), size: 12 },
    hoverlabel: { font: { size: 12 }, namelength: 40 },
    xaxis: { ...line, title: { text: axes.x }, rangemode: "tozero", tickformat: "~s", nticks: 6 },
    yaxis: { ...line, title: { text: axes.y }, type: axes.log ? "log" : "linear", range: axes.limits, ...ticks },
  };
}

const options = { responsive: true, displayModeBar: false };

function draw() {
  for (const place of document.querySelectorAll(".chart")) {
    const { traces, axes } = charts[place.dataset.chart];
    place.querySelector("picture")?.remove();
    place.classList.add("drawn");
    Plotly.react(place, traces.map(trace), layout(axes), options);
  }
}

draw();
colours.addEventListener("change", draw);
