"use strict";
// Tables: a click on a heading sorts by it, a second one the other way; what is missing stays last. Words filter.
for (const table of document.querySelectorAll("table[id]")) {
  const body = table.tBodies[0], rows = [...body.rows], headings = [...table.tHead.rows[0].cells];
  const key = (row, i, number) => {
    const cell = row.cells[i];
    if (number) return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
    return cell.classList.contains("none") ? null : cell.textContent.toLowerCase();
  };
  const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true});
  const sort = (i, direction) => {
    const number = headings[i].classList.contains("number");
    const keyed = rows.map((row, place) => [key(row, i, number), place, row]);
    keyed.sort(([a, m], [b, n]) =>
      a === null || b === null ? (a === null) - (b === null) || m - n : direction * compare(a, b) || m - n);
    body.append(...keyed.map(([, , row]) => row));
    headings.forEach((heading, j) =>
      heading.setAttribute("aria-sort", j !== i ? "none" : direction > 0 ? "ascending" : "descending"));
    remember();
  };
  headings.forEach((heading, i) => heading.firstElementChild.addEventListener("click", () =>
    sort(i, heading.getAttribute("aria-sort") === "ascending" ? -1 : 1)));

  const box = document.querySelector(`[data-filter="${table.id}"]`);
  const count = document.querySelector(`[data-count="${table.id}"]`);
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" "));
  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, place) => { row.hidden = !words.every((word) => texts[place].includes(word)); });
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    remember();
  };
  box.addEventListener("input", filter);

  // A page that is redrawn keeps how it was sorted and filtered.
  const place = `headscale ${location.pathname} ${table.id}`;
  const remember = () => {
    const i = headings.findIndex((heading) => heading.getAttribute("aria-sort") !== "none");
    const direction = i < 0 ? 1 : headings[i].getAttribute("aria-sort") === "ascending" ? 1 : -1;
    try { sessionStorage.setItem(place, JSON.stringify([i, direction, box.value])); } catch { /* not allowed here */ }
  };
  let kept = null;
  try { kept = JSON.parse(sessionStorage.getItem(place)); } catch { /* not allowed here */ }
  if (kept) {
    const [i, direction, words] = kept;
    box.value = words;
    filter();
    if (i >= 0 && i < headings.length) sort(i, direction);
  }
}
