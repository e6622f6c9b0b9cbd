// Draws the charts to fit the page, in its light or dark colours, and sorts tables by a click on a heading.
const given = document.getElementById("specification").textContent;
const place = document.getElementById("charts");
const dark = matchMedia("(prefers-color-scheme: dark)");
let drawn = 0;

function draw() {
  const width = place.clientWidth;
  if (width === drawn) return;
  drawn = width;
  document.getElementById("switches").replaceChildren();
  const columns = width < 800 ? 1 : 2;
  // Black lines would not be seen on a dark page.
  const spec = JSON.parse(dark.matches ? given.replaceAll("#000000", "#e8e8e8") : given);
  spec.columns = columns;
  spec.config.background = "transparent";
  spec.config.legend = {columns: width < 500 ? 3 : 6};
  spec.config.view.continuousWidth = Math.floor(width / columns) - 120;
  vegaEmbed(place, spec, {
    actions: {export: true, source: false, compiled: false, editor: false},
    bind: document.getElementById("switches"),
    renderer: "svg",
    theme: dark.matches ? "dark" : undefined,
  });
}

draw();
addEventListener("resize", draw);
dark.addEventListener("change", () => { drawn = 0; draw(); });

for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, index) => {
    heading.firstElementChild.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[index].textContent.trim();
      const number = (row) => parseFloat(value(row).replaceAll(",", ""));
      const order = (a, b) => {
        const [x, y] = [number(a), number(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) {
          return Number.isNaN(x) - Number.isNaN(y) || value(a).localeCompare(value(b));
        }
        return x - y;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
      table.tBodies[0].append(...rows);
    });
  });
}
