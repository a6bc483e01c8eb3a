// Sorts and filters the table of results. Without this script the table is there, whole.
(function () {
  "use strict";
  const root = document.querySelector(".results");
  if (!root) return;
  const body = root.querySelector("tbody"), rows = Array.from(body.rows);
  const form = root.querySelector("form"), count = root.querySelector(".results-count");
  const heads = Array.from(root.querySelectorAll("thead th"));
  const texts = new Map(rows.map(row => [row, Array.from(row.cells, cell => cell.textContent)]));
  const filters = [];

  function labelled(text, control) {
    const label = document.createElement("label");
    label.append(text + " ", control);
    form.append(label);
    return control;
  }

  heads.forEach((head, column) => {
    if (head.dataset.filter === undefined) return;
    const select = labelled(head.textContent, document.createElement("select"));
    const values = new Set(rows.map(row => texts.get(row)[column]));
    select.append(new Option("all", "*"));
    values.forEach(value => select.append(new Option(value || "none", value)));
    const first = head.dataset.filter;
    select.value = first && values.has(first) ? first : "*";
    filters.push([column, select]);
  });
  const search = labelled("Search", document.createElement("input"));
  search.type = "search";
  const everything = document.createElement("button");
  everything.type = "button";
  everything.textContent = "Show all rows";
  form.append(everything);

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const cells = texts.get(row), whole = cells.join(" ").toLowerCase();
      row.hidden = !(filters.every(([column, select]) =>
        select.value === "*" || select.value === cells[column])
        && words.every(word => whole.includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown + " of " + rows.length + " rows";
  }

  // Numbers before words, and cells without anything at the end, whichever way it is sorted.
  function sorted(column, up) {
    const number = text => parseFloat(text.replace(/^\[/, ""));
    return rows.slice().sort((a, b) => {
      const one = texts.get(a)[column], two = texts.get(b)[column];
      if (!one || !two) return (one ? 0 : 1) - (two ? 0 : 1);
      const x = number(one), y = number(two);
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
      const order = isNaN(x) ? one.localeCompare(two) : x - y || one.localeCompare(two);
      return up ? order : -order;
    });
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...sorted(column, up));
    });
  });
  form.addEventListener("input", show);
  form.addEventListener("submit", event => event.preventDefault());
  everything.addEventListener("click", () => {
    filters.forEach(([, select]) => { select.value = "*"; });
    search.value = "";
    show();
  });
  form.hidden = false;
  show();
})();
