// Draws what charts.py says, with dygraphs; reloads the page while more is to come.
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("merge3-data").textContent);
  const colours = ["#555", "#b2182b", "#4d9221", "#c2a5cf", "#e08214", "#35978f"];

  // What a reader chose survives a reload. Some browsers keep nothing for a page opened from a file.
  function kept(name, value) {
    const key = "merge3 " + location.pathname + " " + name;
    try {
      if (value !== undefined) sessionStorage.setItem(key, JSON.stringify(value));
      return JSON.parse(sessionStorage.getItem(key));
    } catch (error) {
      return null;
    }
  }

  // A line through each point, a standard error each way; sideways too where the axis has errors.
  function errors(axis) {
    return function (e) {
      const c = e.drawingContext, area = e.plotArea, g = e.dygraph;
      c.save();
      c.strokeStyle = e.color;
      c.globalAlpha = 0.35;
      c.lineWidth = 1;
      c.beginPath();
      e.points.forEach(function (p) {
        if (p.yval === null || isNaN(p.yval)) return;
        c.moveTo(p.canvasx, area.h * p.y_top + area.y);
        c.lineTo(p.canvasx, area.h * p.y_bottom + area.y);
        const wide = axis.wide[p.xval + " " + p.yval];
        if (wide) {
          c.moveTo(g.toDomXCoord(p.xval - wide), p.canvasy);
          c.lineTo(g.toDomXCoord(p.xval + wide), p.canvasy);
        }
      });
      c.stroke();
      c.restore();
      Dygraph.Plotters.linePlotter(e);
    };
  }

  // A line from top to bottom at each mark.
  function marks(chart, axis) {
    return function (c, area, g) {
      c.save();
      c.strokeStyle = "#bbb";
      c.setLineDash([4, 3]);
      (chart.marks || []).forEach(function (i) {
        const x = g.toDomXCoord(axis.values[i]);
        c.beginPath();
        c.moveTo(x, area.y);
        c.lineTo(x, area.y + area.h);
        c.stroke();
      });
      c.restore();
    };
  }

  function rows(chart, axis) {
    axis.wide = {};
    const order = axis.values.map((_, i) => i).filter((i) => axis.values[i] !== null);
    order.sort((a, b) => axis.values[a] - axis.values[b] || a - b);
    return order.map(function (i) {
      return [axis.values[i]].concat(chart.series.map(function (s) {
        const value = s.values[i];
        if (value === null) return null;
        if (axis.errors.length) axis.wide[axis.values[i] + " " + value] = axis.errors[i];
        return [value, s.errors.length && s.errors[i] !== null ? s.errors[i] : 0];
      }));
    });
  }

  function options(chart, axis) {
    const styles = {
      points: { strokeWidth: 0, drawPoints: true, pointSize: 2, plotter: errors(axis) },
      front: { strokeWidth: 0, drawPoints: true, pointSize: 4, plotter: errors(axis) },
      best: { stepPlot: true, strokeWidth: 2, connectSeparatedPoints: true },
      line: { strokeWidth: 1.5, connectSeparatedPoints: true },
    };
    const series = {};
    chart.series.forEach((s) => { series[s.name] = styles[s.style]; });
    const paint = { points: "#9bb8d3", front: "#b2182b", best: "#2166ac" };
    let next = 0;
    return {
      labels: [axis.name].concat(chart.series.map((s) => s.name)),
      colors: chart.series.map((s) => paint[s.style] || colours[next++ % colours.length]),
      series: series, errorBars: true, sigma: 1, fillAlpha: 0.12, legend: "always", labelsDivWidth: 480,
      xlabel: axis.name, ylabel: chart.y, xRangePad: 8, yRangePad: 12, digitsAfterDecimal: 4, highlightCircleSize: 4,
      underlayCallback: marks(chart, axis),
    };
  }

  function draw(chart) {
    const place = document.getElementById(chart.id);
    if (!place || !chart.xs.length || !chart.xs[0].values.length) return;
    place.textContent = "";
    place.className = "chart";
    const chosen = Math.min(kept(chart.id) || 0, chart.xs.length - 1);
    const axis = chart.xs[chosen];
    const graph = new Dygraph(place, rows(chart, axis), options(chart, axis));
    if (chart.xs.length < 2) return;
    const choice = document.createElement("p");
    choice.className = "choice";
    chart.xs.forEach(function (other, i) {
      const label = document.createElement("label"), button = document.createElement("input");
      button.type = "radio";
      button.name = chart.id;
      button.checked = i === chosen;
      button.onchange = function () {
        kept(chart.id, i);
        const renewed = options(chart, other);
        renewed.file = rows(chart, other);
        renewed.dateWindow = null;
        graph.updateOptions(renewed);
      };
      label.append(button, " over " + other.name + " ");
      choice.append(label);
    });
    place.after(choice);
  }

  if (window.Dygraph) data.charts.forEach(draw);

  // By this browser's clock alone: how long ago it first saw this very page.
  const news = document.getElementById("news"), now = Date.now() / 1000;
  if (data.alive && news) {
    let seen = kept("seen");
    if (!seen || seen.written !== data.written) seen = kept("seen", { written: data.written, since: now });
    const since = seen ? now - seen.since : now - data.written;
    if (since > data.patience) {
      news.className = "old";
      news.textContent = "No news for " + Math.round(since / 60) + " min: the run was killed, or its machine sleeps. " +
        "This page no longer asks for the next one; reload it when the run goes on.";
    } else {
      news.textContent = "This page asks for the next one every " + Math.max(2, Math.round(data.every)) + " s.";
      setTimeout(() => location.reload(), 1000 * Math.max(2, data.every));
    }
  }
})();
