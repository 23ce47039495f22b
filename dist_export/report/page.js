"use strict";
// Draws the facts of the page. Every string goes into the document as text, never as markup.

const facts = JSON.parse(document.getElementById("facts").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MOST_CHARTS = 100;

// ---- numbers ----

const formatter = new Intl.NumberFormat("en-US");
const collator = new Intl.Collator("en", { numeric: true });
const count = (number) => formatter.format(number);

function figure(number) {
  if (number === null || number === undefined) return "";
  return Number.isSafeInteger(number) ? count(number) : String(Number(number.toPrecision(3)));
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function amount(bytes) {
  let size = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (size < 999.95) return (unit === "B" ? count(size) : size.toFixed(1)) + " " + unit;
    size /= 1000;
  }
  return size.toFixed(1) + " TB";
}

// ---- elements ----

function add(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const make = (tag, attributes = {}, ...children) => add(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => add(document.createElementNS(SVG, tag), attributes, children);

function section(id, title, ...children) {
  document.querySelector("nav").append(make("a", { href: "#" + id }, title));
  document.querySelector("main").append(make("section", { id }, make("h2", {}, title), ...children));
}

function choice(label, options, chosen, choose) {
  const select = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
  select.value = chosen;
  select.addEventListener("change", () => choose(select.value));
  return make("label", {}, label, select);
}

// ---- tables of text ----

/** Columns are [title, isNumber]. A cell is a text, a number, or an element. */
function grid(columns, rows, head = (title) => title) {
  const cell = (tag, isNumber, content) => make(tag, isNumber ? { class: "number" } : {}, content);
  const text = (value) => (typeof value === "number" ? figure(value) : value ?? "");
  return make(
    "div", { class: "wide" },
    make(
      "table", {},
      make("thead", {}, make("tr", {}, ...columns.map(([title, isNumber]) => cell("th", isNumber, head(title))))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, place) => cell("td", columns[place][1], text(value)))))),
    ),
  );
}

// ---- charts ----

/** Rows are {label, text, segments: [{from, to, kind, tip}]}; kinds are the classes of colours, legend is [[kind, name]]. */
function bars(rows, legend = []) {
  const most = Math.max(...rows.flatMap((row) => row.segments.map((segment) => segment.to)), 0) || 1;
  const share = (value) => Math.max(0, (100 * value) / most);
  const chart = make("div", { class: "bars" });
  for (const row of rows) {
    const rects = row.segments.filter((segment) => segment.to > segment.from).map((segment) => draw("rect", {
      x: share(segment.from) + "%", width: Math.max(share(segment.to - segment.from), 0.2) + "%", height: "100%",
      class: segment.kind, "data-tip": segment.tip,
    }));
    chart.append(
      make("span", { class: "label" }, row.label),
      draw("svg", { role: "img", "aria-label": row.segments.map((segment) => segment.tip).join("; ") }, ...rects),
      make("span", { class: "number" }, row.text),
    );
  }
  const names = legend.map(([kind, name]) => make("span", {}, draw("svg", {}, draw("rect", { width: 12, height: 12, class: kind })), name));
  return make("div", {}, make("div", { class: "legend" }, ...names), chart);
}

/** Parts are [kind, name, value]: one bar made of parts that follow one another. */
function stack(label, parts, say) {
  let end = 0;
  const segments = parts.map(([kind, name, value]) => ({ from: end, to: (end += value), kind, tip: `${label}\n${name}: ${say(value)}` }));
  return { label, text: say(end), segments };
}

function histogram(table) {
  const { low, ratio, counts, median, p1, p99 } = table.norms;
  const edge = (place) => low * ratio ** place;
  const most = Math.max(...counts);
  const columns = counts.map((rows, place) => draw("rect", {
    x: place, y: 100 - Math.max((100 * rows) / most, rows ? 1.5 : 0), width: 0.9, height: "100", class: "one",
    "data-tip": `${table.name}\n${figure(edge(place))} to ${figure(edge(place + 1))}: ${count(rows)} rows`,
  }));
  const shape = { class: "columns", viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", role: "img" };
  const marks = [0, counts.length / 2, counts.length].map((place) => make("span", {}, figure(edge(place))));
  const told = counts.length
    ? `median ${figure(median)}; 98 % of the rows from ${figure(p1)} to ${figure(p99)}`
    : "no finite row that is not zero";
  return make(
    "figure", {},
    make("figcaption", {}, make("b", {}, table.name), told),
    ...(counts.length ? [draw("svg", { ...shape, "aria-label": `norms of ${table.name}: ${told}` }, ...columns), make("div", { class: "axis" }, ...marks)] : []),
  );
}

// ---- the section of tables: searched, sorted, the first ones drawn ----

const oddOf = (table) => (table.norms ? table.norms.dead + table.norms.nan + table.norms.inf : 0);
const droppedRows = (table) => sum(Object.values(table.rows_dropped));
const reasonsOf = (table) => Object.entries(table.rows_dropped).map(([reason, rows]) => `${count(rows)} ${reason}`).join(", ");

/** Title -> [what it sorts by, what the cell shows]. */
const COLUMNS = {
  "Table": [(table) => table.name, (table) => table.name],
  "Kind": [(table) => table.kind, (table) => table.kind],
  "Row": [(table) => table.row, (table) => [table.row.replaceAll(" ", "\u00a0"), ...table.casts].join("; ")],
  "Rows in": [(table) => table.rows_in, (table) => count(table.rows_in)],
  "Rows kept": [(table) => table.rows_out, (table) => count(table.rows_out)],
  "Rows dropped": [droppedRows, (table) => reasonsOf(table) || "0"],
  "Kept": [(table) => table.kept, (table) => amount(table.kept)],
  "Dropped": [(table) => table.dropped, (table) => amount(table.dropped)],
  "Rows read": [(table) => table.norms?.rows_read ?? -1, (table) => (table.norms ? count(table.norms.rows_read) : table.unread)],
  "Dead": [(table) => table.norms?.dead ?? -1, (table) => odd(table.norms?.dead)],
  "NaN": [(table) => table.norms?.nan ?? -1, (table) => odd(table.norms?.nan)],
  "Inf": [(table) => table.norms?.inf ?? -1, (table) => odd(table.norms?.inf)],
  "Median norm": [(table) => table.norms?.median ?? -1, (table) => figure(table.norms?.median)],
  "Largest norm": [(table) => table.norms?.largest ?? -1, (table) => figure(table.norms?.largest)],
};
const TEXTS = ["Table", "Kind", "Row"];
const SIZES = [["10", "10"], ["25", "25"], ["100", "100"], ["500", "500"], ["Infinity", "all"]];

const odd = (number) => (number === undefined ? "" : make("span", number ? { class: "bad" } : {}, count(number)));

function compare(one, two) {
  return typeof one === "string" ? collator.compare(one, two) : one - two;
}

const view = { query: "", sort: "Kept", isDescending: true, most: 10 };

function chosenTables() {
  const words = view.query.toLowerCase().split(/\s+/);
  const key = COLUMNS[view.sort][0];
  const found = facts.tables.filter((table) => words.every((word) => table.name.toLowerCase().includes(word)));
  return found.sort((one, two) => (view.isDescending ? -1 : 1) * compare(key(one), key(two)) || compare(one.name, two.name));
}

function sortBy(title) {
  view.isDescending = view.sort === title ? !view.isDescending : !TEXTS.includes(title);
  view.sort = title;
}

function tableSection() {
  const result = make("div");
  const search = make("input", { type: "search", id: "search", placeholder: "words of a name" });
  const sort = choice("Sort by", Object.keys(COLUMNS).map((title) => [title, title]), view.sort, (title) => {
    sortBy(title);
    show();
  });
  search.addEventListener("input", () => {
    view.query = search.value;
    show();
  });
  const button = (title) => {
    const element = make("button", { type: "button" }, title);
    element.addEventListener("click", () => {
      sortBy(title);
      sort.querySelector("select").value = title;
      show();
    });
    return element;
  };
  function show() {
    const found = chosenTables();
    const shown = found.slice(0, view.most);
    const list = grid(
      Object.keys(COLUMNS).map((title) => [title, !TEXTS.includes(title)]),
      shown.map((table) => Object.values(COLUMNS).map(([, content]) => content(table))),
      button,
    );
    const heads = [...list.querySelectorAll("th")];
    heads[Object.keys(COLUMNS).indexOf(view.sort)].setAttribute("aria-sort", view.isDescending ? "descending" : "ascending");
    const total = `${count(found.length)} of ${count(facts.tables.length)} tables, ${count(shown.length)} shown.`;
    result.replaceChildren(make("p", { id: "total" }, total), list, ...tableCharts(shown.slice(0, MOST_CHARTS), shown.length));
  }
  show();
  section(
    "tables", "Tables", make("p", {}, facts.sampled),
    make(
      "div", { class: "controls" },
      make("label", {}, "Search", search), sort,
      choice("Show", SIZES, String(view.most), (most) => {
        view.most = Number(most);
        show();
      }),
    ),
    result,
    ...(facts.left_out.length
      ? [make("h3", {}, "Tables that were left out"), grid([["Table", false], ["Rows", true], ["Setting", false]], facts.left_out.map(([name, rows, reason]) => [name, count(rows), reason]))]
      : []),
  );
}

function tableCharts(tables, shown) {
  const note = shown > tables.length ? [make("p", { class: "dim" }, `The charts have the first ${tables.length} of them.`)] : [];
  const bad = tables.filter(oddOf);
  const read = tables.filter((table) => table.norms);
  const badBars = bad.map((table) => stack(table.name, [["four", "dead", table.norms.dead], ["two", "NaN", table.norms.nan], ["three", "Inf", table.norms.inf]], count));
  return [
    ...note,
    make("h3", {}, "Bytes of kept and dropped slots"),
    bars(tables.map((table) => stack(table.name, [["one", "kept", table.kept], ["two", ["dropped", ...table.dropped_slots].join(", "), table.dropped]], amount)), [["one", "kept"], ["two", "dropped"]]),
    make("h3", {}, "Rows of the checkpoint: kept and dropped"),
    bars(tables.map((table) => stack(table.name, [["one", "kept", table.rows_out], ["two", reasonsOf(table), droppedRows(table)]], count)), [["one", "kept"], ["two", "dropped"]]),
    make("h3", {}, "Dead rows, and rows that are not finite"),
    bad.length ? bars(badBars, [["four", "dead: all values are zero"], ["two", "NaN"], ["three", "Inf"]]) : make("p", {}, "None in the rows that were read of these tables."),
    make("h3", {}, "Norms of the embeddings"),
    make("p", { class: "dim" }, "The norm is the root of the sum of squares. Dead rows, and rows that are not finite, are not in the columns. The axis is logarithmic: each column ends at the same multiple of where it begins."),
    make("div", { class: "many" }, ...read.map(histogram)),
  ];
}

// ---- the other sections ----

function overviewSection() {
  section(
    "package", "Package",
    make("dl", {}, ...facts.overview.flatMap(([label, text]) => [make("dt", {}, label), make("dd", {}, text)])),
    ...(facts.notes.length ? [make("h3", {}, "Notes of the export"), make("ul", {}, ...facts.notes.map((note) => make("li", {}, note)))] : []),
    make("p", { class: "dim" }, "The manifest does not repeat all settings of the export; these are the ones that shaped the package."),
  );
}

function accountSection() {
  if (facts.account === null) {
    section("account", "Account", make("p", {}, "Not recorded: the source does not list what it contains besides tables."));
    return;
  }
  const kinds = { exported: "one", "in the program": "three", dropped: "two", "left out": "four" };
  const rows = facts.account.parts.map(([fate, reason, size]) => stack(reason ? `${fate}: ${reason}` : fate, [[kinds[fate], fate, size]], amount));
  const others = facts.account.others.map(([name, fate, reason, size]) => [name, fate, reason, amount(size)]);
  section(
    "account", "Account of the checkpoint's bytes", make("p", {}, facts.account.text), bars(rows),
    ...(others.length ? [make("h3", {}, "Tensors that are in no table"), limited([["Tensor", false], ["Fate", false], ["Reason", false], ["Bytes", true]], others)] : []),
  );
}

/** A long list, of which the first rows are drawn; the reader chooses how many. */
function limit(rows, what, drawRows) {
  const result = make("div");
  const show = (most) => result.replaceChildren(drawRows(rows.slice(0, most)));
  show(25);
  const control = make("div", { class: "controls" }, choice(`${what} of ${count(rows.length)}`, SIZES, "25", (most) => show(Number(most))));
  return make("div", {}, ...(rows.length > 25 ? [control] : []), result);
}

const limited = (columns, rows) => limit(rows, "Rows", (shown) => grid(columns, shown));
const limitedBars = (rows, legend, what) => limit(rows, what, (shown) => bars(shown, legend));

function shardSection() {
  const rows = facts.shards.bars.map(([name, size, num]) => ({
    label: name, text: amount(size), segments: [{ from: 0, to: size, kind: "one", tip: `${name}\n${amount(size)}, ${count(num)} rows` }],
  }));
  section("shards", "Balance of the shards", make("p", {}, facts.shards.text), limitedBars(rows, [], "Largest shards"));
}

function timelineSection() {
  const rows = facts.timeline.bars.map(({ rank, stage, start, seconds }) => ({
    label: `rank ${rank}: ${stage}`,
    text: `${figure(seconds)} s`,
    segments: [{ from: start, to: start + seconds, kind: "one", tip: `rank ${rank}: ${stage}\n${figure(seconds)} s from second ${figure(start)}` }],
  }));
  section("timeline", "Timeline of the run", make("p", {}, facts.timeline.text), limitedBars(rows, [], "Bars"));
}

function signatureSection() {
  const columns = ["Program", "Kind", "Name", "Dtype", "Shape"].map((title) => [title, false]);
  const features = ["Feature", "Table", "Columns", "Pooling", "Padding"].map((title) => [title, false]);
  section(
    "tensors", "Inputs and outputs",
    facts.tensors.length ? limited(columns, facts.tensors) : make("p", {}, "The package has no program."),
    ...(facts.features.length ? [make("h3", {}, "Features of the serving contract"), limited(features, facts.features)] : []),
  );
}

function scoreSection() {
  const { texts, columns, rows, drift_text, drift } = facts.scores;
  const titles = ["Output", "Largest difference", "Mean", "Pairs that change their order", "Not finite on one side"];
  section(
    "scores", "Parity and drift", ...texts.map((text) => make("p", {}, text)),
    ...(rows.length ? [limited(columns.map((title, place) => [title, place > 1]), rows)] : []),
    make("h3", {}, "Drift"), make("p", {}, drift_text),
    ...(drift.length ? [limited(titles.map((title, place) => [title, place > 0]), drift)] : []),
  );
}

function versionSection() {
  if (facts.versions === null) return;
  const titles = ["Version", "Published", "Step", ""].map((title) => [title, false]);
  section("versions", "Versions", make("p", {}, facts.versions.text), limited(titles, facts.versions.rows));
}

function againstSection() {
  if (facts.against === null) return;
  const { lines, tables, num_tables } = facts.against;
  const others = [...tables].sort((one, two) => two.changed + two.new + two.deleted - (one.changed + one.new + one.deleted));
  const legend = [["one", "changed"], ["three", "new"], ["two", "deleted"]];
  const rows = others.map((table) => stack(table.name, [["one", "changed", table.changed], ["three", "new", table.new], ["two", "deleted", table.deleted]], count));
  const titles = ["Table", "Same", "Changed", "New", "Deleted", "Largest change", "Other differences"];
  const cells = others.map((table) => [
    table.name, ...[table.same, table.changed, table.new, table.deleted].map(count), table.max_abs, [...table.slots, table.not_compared].filter(Boolean).join("; "),
  ]);
  section(
    "against", "Comparison with another package",
    make("p", {}, `${count(tables.length)} of ${count(num_tables)} tables differ. A is the other package, B this one.`),
    make("ul", {}, ...lines.slice(0, 40).map((line) => make("li", {}, line))),
    ...(lines.length > 40 ? [make("p", { class: "dim" }, `${count(lines.length - 40)} more lines; \`diff\` prints all.`)] : []),
    ...(rows.length ? [make("h3", {}, "Rows that differ"), limitedBars(rows, legend, "Tables"), limited(titles.map((title, place) => [title, place > 0 && place < 6]), cells)] : []),
  );
}

// ---- tooltips ----

function watchPointer() {
  const tip = document.getElementById("tip");
  document.addEventListener("pointermove", (event) => {
    const text = event.target instanceof Element ? event.target.getAttribute("data-tip") : null;
    tip.hidden = text === null;
    if (text === null) return;
    tip.textContent = text;
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (event.clientY + 16 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 8 : event.clientY + 16) + "px";
  });
}

document.title = `Package report: ${facts.title}`;
document.getElementById("title").textContent = `${facts.title}. Made by ${facts.made_by}`;
overviewSection();
accountSection();
tableSection();
shardSection();
timelineSection();
signatureSection();
scoreSection();
versionSection();
againstSection();
watchPointer();
