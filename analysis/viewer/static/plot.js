"use strict";
// Line and point plots of the pages, drawn by uPlot; figures of the report are drawn by the server.

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Steps between ticks of positions and steps of training, which have no halves.
const WHOLE = [1, 2, 5].flatMap((first) => [...Array(12).keys()].map((power) => first * 10 ** power)).sort((a, b) => a - b);

function axes(x, xLabel, yLabel) {
  const look = { stroke: ink("--soft"), grid: { stroke: ink("--line"), width: 1 }, ticks: { stroke: ink("--line"), width: 1 } };
  return [{ ...look, label: xLabel, size: 44, incrs: x.every(Number.isInteger) ? WHOLE : undefined }, { ...look, label: yLabel, size: 62 }];
}

// Draw series over x. Each series: {label, values, color, points, band: [low, high]}; a click calls onPick(index).
function plot(holder, x, series, { xLabel, yLabel, height = 220, onPick = null }) {
  const parent = el("div");
  holder.append(parent);
  const data = [x];
  const drawn = [{ label: xLabel }];
  const bands = [];
  for (const one of series) {
    if (one.band) {
      const at = drawn.length;
      for (const [end, values] of [["last decile", one.band[1]], ["first decile", one.band[0]]]) {
        drawn.push({ label: end, stroke: "transparent", points: { show: false }, spanGaps: true });
        data.push(values);
      }
      bands.push({ series: [at, at + 1], fill: `rgba(${ink("--gray")}, 0.22)` });
    }
    drawn.push({
      label: one.label, stroke: one.color, width: one.points ? 0 : 1.4, spanGaps: one.spanGaps ?? false,
      points: one.points ? { show: true, size: 5, fill: one.color } : { show: false }, dash: one.dash,
      paths: one.points ? () => null : undefined,
    });
    data.push(one.values);
  }
  const options = {
    width: Math.max(280, parent.clientWidth || 600), height, series: drawn, bands, axes: axes(x, xLabel, yLabel),
    scales: { x: { time: false } }, legend: { live: true }, cursor: { drag: { x: true, y: false } },
  };
  const drawing = new uPlot(options, data, parent);
  if (onPick) drawing.over.addEventListener("click", () => drawing.cursor.idx !== null && onPick(drawing.cursor.idx));
  new ResizeObserver(() => {
    if (parent.clientWidth && Math.abs(parent.clientWidth - drawing.width) > 2) drawing.setSize({ width: parent.clientWidth, height });
  }).observe(parent);
  return drawing;
}
