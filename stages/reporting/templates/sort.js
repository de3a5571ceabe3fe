// Sorts the scoreboard within each data set, since scores of different data sets aren't comparable. Empty cells are always last.
"use strict";
for (const button of document.querySelectorAll("#scores thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const column = head.cellIndex;
    const numeric = head.dataset.kind === "number";
    const before = head.getAttribute("aria-sort");
    const order = before ? (before === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    for (const body of document.querySelectorAll("#scores tbody")) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return (numeric ? x - y : x.localeCompare(y)) * (order === "ascending" ? 1 : -1);
      });
      body.append(...rows);
    }
    document.getElementById("sorted").textContent = `Sorted by ${button.textContent}, ${order}`;
  });
}
