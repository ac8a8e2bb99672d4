// Sorts a table by the column whose heading is clicked, and opens folded parts for printing.
(() => {
  const NUMBER = /^[×<>≤≥+]?\s*([+−-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)/i;

  function valueOf(text) {
    if (text === "never") return 0;
    if (text.startsWith("> any")) return Infinity;
    if (text === "diverged") return Infinity;
    const found = NUMBER.exec(text.startsWith("never") ? "0" : text);
    return found ? Number(found[1].replaceAll(",", "").replace("−", "-")) : NaN;
  }

  function sort(table, column, heading) {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0], rows = [...body.rows];
    const texts = new Map(rows.map((row) => [row, row.cells[column].dataset.value ?? row.cells[column].textContent.trim()]));
    const empty = (row) => ["", "–"].includes(texts.get(row));
    const filled = rows.filter((row) => !empty(row));
    const numeric = filled.every((row) => !Number.isNaN(valueOf(texts.get(row))));
    const sign = down ? -1 : 1;
    filled.sort((a, b) => sign * (numeric
      ? Math.sign(valueOf(texts.get(a)) - valueOf(texts.get(b))) || 0
      : texts.get(a).localeCompare(texts.get(b), "en", { numeric: true })));
    body.append(...filled, ...rows.filter(empty));
  }

  for (const table of document.querySelectorAll("table.sorts")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      if (!button.textContent.trim()) button.setAttribute("aria-label", "sort by this column");
      heading.append(button);
      button.addEventListener("click", () => sort(table, column, heading));
    });
  }

  const headings = [...document.querySelectorAll("main h2")], contents = document.querySelector("nav");
  if (headings.length > 3) {
    for (const heading of headings) {
      const link = document.createElement("a");
      heading.id ||= heading.textContent.toLowerCase().replaceAll(/[^a-z0-9]+/g, "-");
      link.href = `#${heading.id}`;
      link.textContent = heading.textContent;
      contents.append(link);
    }
  }
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
