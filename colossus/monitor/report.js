// Shows the values under the pointer. The page is whole without it.
for (const plot of document.querySelectorAll("[data-plot]")) {
  const data = JSON.parse(plot.dataset.plot);
  const cursor = plot.appendChild(document.createElement("div"));
  const tip = plot.appendChild(document.createElement("div"));
  cursor.className = "cursor";
  tip.className = "tip";
  cursor.hidden = tip.hidden = true;

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  };
  const say = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * data.xMax;
    const steps = data.lines.map((line) => line.x[nearest(line.x, x)]);
    const step = steps.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const rows = [`<b>step ${step.toLocaleString("en")}</b>`];
    for (const line of data.lines) {
      const i = nearest(line.x, step);
      const away = Math.abs(line.x[i] - step) > 0.02 * data.xMax;
      if (!away) rows.push(`${line.name} ${say(line.y[i])}`);
    }
    tip.innerHTML = rows.join("<br>");
    cursor.hidden = tip.hidden = false;
    const left = (step / data.xMax) * box.width;
    cursor.style.left = `${left}px`;
    tip.style.left = left > box.width / 2 ? `${left - tip.offsetWidth - 10}px` : `${left + 10}px`;
  });
  plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
