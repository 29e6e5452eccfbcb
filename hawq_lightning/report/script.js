"use strict";
// The nearest spot within reach shows its text; without this script the browser shows the same text as a plain tooltip.
const tip = document.getElementById("tip");
const REACH = 22;
let shown = null;

function hide() {
  if (shown) shown.classList.remove("on");
  shown = null;
  tip.hidden = true;
}

function show(spot, x, y) {
  if (spot !== shown) {
    hide();
    shown = spot;
    spot.classList.add("on");
    tip.textContent = spot.dataset.text;
    if (spot.dataset.bits) {
      const bars = document.createElement("div");
      bars.className = "bars";
      for (const b of spot.dataset.bits.split(",")) {
        const bar = document.createElement("i");
        bar.style.height = `${12.5 * Number(b)}%`;
        bars.append(bar);
      }
      tip.append(bars);
    }
    tip.hidden = false;
  }
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - box.height - 4))}px`;
}

for (const plot of document.querySelectorAll("svg.plot")) {
  const spots = [...plot.querySelectorAll(".hits circle")];
  for (const spot of spots) {
    const title = spot.querySelector("title");
    spot.dataset.text = title.textContent;
    title.remove();
  }
  plot.addEventListener("pointermove", (event) => {
    let best = null, least = REACH;
    for (const spot of spots) {
      const box = spot.getBoundingClientRect();
      const away = Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      if (away <= least) { least = away; best = spot; }
    }
    if (best) show(best, event.clientX, event.clientY); else hide();
  });
  plot.addEventListener("pointerleave", hide);
}
addEventListener("scroll", hide, { passive: true });
