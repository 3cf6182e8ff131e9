"use strict";
// What the page can do without is done here: readouts, a filter, copying, printing.

// A cell's words below its map, by mouse or by arrow keys.
const revive = (part) => { for (const map of part.querySelectorAll("svg.heat")) {
  const readout = map.closest(".tab, .mapped").querySelector(".readout");
  const cells = [...map.querySelectorAll("rect[data-m], rect[data-a]")];
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  cursor.setAttribute("class", "cursor");
  let at = null;
  const show = (cell) => { readout.textContent = cell.querySelector("title").textContent; };
  const go = (cell) => {
    at = cell;
    for (const name of ["x", "y"]) cursor.setAttribute(name, cell.getAttribute(name));
    map.append(cursor);
    show(cell);
  };
  const place = (cell) => [Number(cell.getAttribute("x")), Number(cell.getAttribute("y"))];
  map.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("rect[data-m], rect[data-a]");
    if (cell) show(cell);
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || cells.length === 0) return;
    event.preventDefault();
    if (!at) { go(cells[0]); return; }
    const [x, y] = place(at);
    // The nearest cell that lies in the direction of the key.
    let best = null, least = Infinity;
    for (const cell of cells) {
      const [cx, cy] = place(cell);
      const along = (cx - x) * step[0] + (cy - y) * step[1];
      const across = Math.abs((cx - x) * step[1]) + Math.abs((cy - y) * step[0]);
      if (along > 0 && along + 100 * across < least) { least = along + 100 * across; best = cell; }
    }
    if (best) go(best);
  });
} };
revive(document);

// What a long page has packed is unfolded where it is opened.
const unpack = async (fold) => {
  const holder = fold.querySelector(":scope > .packed");
  if (!holder || typeof DecompressionStream === "undefined") return;
  const bytes = Uint8Array.from(atob(holder.dataset.packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const body = await new Response(stream).text();
  if (!holder.isConnected) return;
  holder.insertAdjacentHTML("afterend", body);
  holder.remove();
  revive(fold);
};
for (const fold of document.querySelectorAll("details:has(> .packed)")) {
  fold.addEventListener("toggle", () => { if (fold.open) unpack(fold); });
}

// A stage that a link leads to is unfolded.
const unfold = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", unfold);
unfold();

// Paper cannot be unfolded.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});

const filter = document.getElementById("filter");
if (filter) {
  const rows = [...document.querySelectorAll(".stages tbody tr")];
  const words = rows.map((row) => row.textContent.toLowerCase());
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = words[index].includes(wanted);
      row.hidden = !fits;
      document.getElementById(`stage-${row.dataset.stage}`).hidden = !fits;
      shown += fits;
    });
    for (const family of document.querySelectorAll("details.family")) {
      const fits = family.querySelector("tbody tr:not([hidden])") !== null;
      family.hidden = !fits;
      if (fits && wanted) family.open = true;
    }
    document.getElementById("filter-count").textContent = ` ${shown} of ${rows.length}`;
  });
}

// Commands can be copied where the browser allows it.
if (navigator.clipboard) {
  for (const command of document.querySelectorAll(".command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "copy";
    button.setAttribute("aria-label", `copy: ${command.textContent}`);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command.textContent);
        button.textContent = "copied";
      } catch {
        button.textContent = "press Ctrl-C";
        getSelection().selectAllChildren(command);
      }
    });
    command.after(button);
  }
}
