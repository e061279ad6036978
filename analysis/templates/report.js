"use strict";
// Sort the rows of a table by the column whose header is clicked; cells without a value stay last.
const text = (row, column) => row.cells[column].textContent.trim().replaceAll(",", "");
const isEmpty = (value) => value === "" || value.startsWith("\u2013");
function compare(a, b, isNumeric) {
  if (isEmpty(a) || isEmpty(b)) return null;
  return isNumeric ? parseFloat(a) - parseFloat(b) : a.localeCompare(b, "en", { numeric: true });
}
function sortTable(table, header) {
  const column = header.cellIndex;
  const isDown = header.getAttribute("aria-sort") !== "descending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("claim"));
    const values = new Map(rows.map((row) => [row, text(row, column)]));
    const isNumeric = rows.every((row) => isEmpty(values.get(row)) || !Number.isNaN(parseFloat(values.get(row))));
    rows.sort((a, b) => {
      const order = compare(values.get(a), values.get(b), isNumeric);
      if (order === null) return isEmpty(values.get(a)) - isEmpty(values.get(b));
      return isDown ? -order : order;
    });
    body.append(...rows);
  }
}
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const labels = headers.map((header) => header.textContent.trim());
  // On narrow screens, where cells are stacked, each shows its label.
  for (const body of table.tBodies)
    for (const row of body.rows)
      if (row.cells.length === labels.length) [...row.cells].forEach((cell, i) => (cell.dataset.label = labels[i]));
  for (const header of headers) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortTable(table, header));
    header.append(button);
  }
}
// Open the folded part that a link leads to.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", openTarget);
openTarget();
