"use strict";
// Draws the charts, makes tables sortable, filters trials, shows one trial's answers at a time.
// All data stand in the page; the tables can be read without this.
(async () => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // What was not measured comes last in both directions; what is equal stays in its order.
  const sort = (table, head, sign) => {
    const key = (row) => row.cells[head.cellIndex].dataset.order ?? row.cells[head.cellIndex].textContent;
    const numeric = head.classList.contains("number");
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b)));
    table.tBodies[0].append(...rows);
    all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  };
  for (const table of all("table.sortable")) {
    for (const head of all("th", table)) {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head, head.ariaSort === "ascending" ? -1 : 1));
    }
  }

  for (const form of all("form.filters")) {
    const rows = all("tbody tr", document.getElementById(form.dataset.for));
    const apply = () => {
      const { value } = form.show, text = form.text.value.toLowerCase();
      for (const row of rows) {
        const kept = value === "all" || value === row.dataset.kind;
        row.hidden = !(kept && row.textContent.toLowerCase().includes(text));
      }
      form.querySelector(".count").value = `${rows.filter((row) => !row.hidden).length} of ${rows.length} trials`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  const showAnswers = (select) => {
    for (const part of all(`.answers[data-search="${select.dataset.for}"]`)) {
      part.hidden = part.dataset.number !== select.value;
    }
  };
  for (const select of all(".choice select")) {
    select.addEventListener("change", () => showAnswers(select));
    showAnswers(select);
  }

  // A trial's answers where the page has them, else its row; the row is marked in any case.
  const showTrial = (anchor, number) => {
    const row = document.getElementById(`${anchor}-trial-${number}`);
    if (row.hidden) document.querySelector(`form[data-for="${anchor}-trials"]`).reset();
    all("tr.chosen").forEach((other) => other.classList.remove("chosen"));
    row.classList.add("chosen");
    const select = document.querySelector(`.choice select[data-for="${anchor}"]`);
    const known = select && [...select.options].some((option) => option.value === String(number));
    if (known) {
      select.value = number;
      showAnswers(select);
    }
    setTimeout(() => (known ? select : row).scrollIntoView({ block: known ? "start" : "center" }));
  };

  // `ast` has expressions read by an interpreter: the page's policy forbids to make code of text.
  const options = { mode: "vega-lite", ast: true, renderer: "svg", actions: false, config: { background: null } };
  for (const chart of all(".chart")) {
    const spec = JSON.parse(chart.querySelector("script").textContent);
    delete spec.title;
    if (chart.clientWidth < 600) {
      const width = chart.clientWidth - 70; // beside a panel are its axis and labels
      spec.columns = 1;
      Object.assign(spec.config.legend, { columns: 1, labelLimit: width });
      for (const panel of spec.concat) panel.width = Math.min(panel.width, width);
    }
    const { view } = await vegaEmbed(chart, spec, options);
    view.addEventListener("click", (_event, item) => {
      if (item?.datum?.trial !== undefined) showTrial(chart.dataset.search, item.datum.trial);
    });
  }
  document.documentElement.dataset.ready = "yes";
})();
