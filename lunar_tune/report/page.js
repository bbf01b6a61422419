"use strict";
// Draws the pictures, makes tables sortable, filters trials, shows one trial's answers at a time.
// All data stand in the page; the tables can be read without this.
(async () => {
  const all = (selector) => [...document.querySelectorAll(selector)];

  // DataTables is a module and can only be imported from an address: it gets one of its own.
  const packed = atob(document.getElementById("datatables").textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const address = URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
  const { jQuery } = await import(address);
  URL.revokeObjectURL(address);
  const DataTable = jQuery.fn.dataTable;

  // What was not measured comes last in both directions.
  const lastIfMissing = (sign) => (a, b) =>
    a === "" || b === "" ? (a === "") - (b === "") : sign * (Number(a) - Number(b));
  DataTable.type("measured", "order", { asc: lastIfMissing(1), desc: lastIfMissing(-1) });
  const tables = new Map();
  for (const table of all("table.sortable")) {
    tables.set(table.id, new DataTable(table, {
      paging: false, info: false, order: [], autoWidth: false, layout: { topStart: null, topEnd: null },
    }));
  }

  for (const form of all("form.filters")) {
    const table = tables.get(form.dataset.for);
    const kept = (kind) => form.show.value === "all" || form.show.value === kind;
    table.search.fixed("kind", (_text, _data, place) => kept(table.row(place).node().dataset.kind));
    const apply = () => {
      table.search(form.text.value).draw();
      form.querySelector(".count").value =
        `${table.rows({ search: "applied" }).count()} of ${table.rows().count()} trials`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  const showAnswers = (select) => {
    for (const part of all(`.answers[data-search="${select.dataset.for}"]`)) {
      part.classList.toggle("hidden", part.dataset.number !== select.value);
    }
  };
  for (const select of all(".choice select")) {
    select.addEventListener("change", () => showAnswers(select));
    showAnswers(select);
  }

  const showTrial = (anchor, number) => {
    const id = `${anchor}-trial-${number}`;
    if (!document.getElementById(id)) {
      document.querySelector(`form[data-for="${anchor}-trials"]`).reset();
    }
    setTimeout(() => {
      const row = document.getElementById(id);
      all("tr.chosen").forEach((other) => other.classList.remove("chosen"));
      row.classList.add("chosen");
      row.scrollIntoView({ block: "center" });
    });
    const select = document.querySelector(`.choice select[data-for="${anchor}"]`);
    if (select && [...select.options].some((option) => option.value === String(number))) {
      select.value = number;
      showAnswers(select);
    }
  };
  const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  for (const plot of all(".plot")) {
    const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
    await Plotly.newPlot(plot, data, layout, settings);
    plot.on("plotly_click", ({ points }) => {
      if (points[0].customdata !== undefined) showTrial(plot.dataset.trials, points[0].customdata);
    });
  }
  document.documentElement.dataset.ready = "yes";
})();
