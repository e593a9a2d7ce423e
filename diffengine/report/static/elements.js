"use strict";
// What pages are made of. All data is in #data; text from it goes into the page by textContent only.

const DATA = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, item] of Object.entries(value)) node.style.setProperty(key, item);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.round(seconds),
    hours = Math.floor(whole / 3600),
    minutes = Math.floor((whole % 3600) / 60);
  const two = (value) => String(value).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

const moment = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString() : "–");
const share = (value) => `${number(100 * value, 3)} %`;
const bytes = (size) => (size >= 1e9 ? `${number(size / 1e9, 3)} GB` : `${number(size / 1e6, 3)} MB`);
const steps = (count) => count.toLocaleString("en-US");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function shot(source, text, size) {
  return source
    ? el("img", {
        src: source,
        alt: text,
        class: "shot",
        onload: (event) => {
          if (event.target.naturalWidth <= 96) event.target.classList.add("fine");
        },
      })
    : el("span", { class: "soft small", text: "missing" });
}

function bars(title, rows) {
  const most = Math.max(...rows.map(([, count]) => count));
  return el(
    "div",
    {},
    el("h3", { text: title, style: { "margin-bottom": "6px" } }),
    el(
      "div",
      { class: "bars" },
      ...rows.flatMap(([label, count]) => [
        el("span", { text: label }),
        el("i", { style: { width: `${(100 * count) / most}%` } }),
        el("span", { class: "soft", text: steps(count) }),
      ]),
    ),
  );
}

function body(sections, credits) {
  return [
    el(
      "nav",
      { "aria-label": "Sections" },
      ...sections.map((item) => el("a", { href: `#${item.id}`, text: item.querySelector("h2").textContent })),
    ),
    ...sections,
    el("p", {
      class: "soft small",
      style: { "margin-top": "32px" },
      text: `Written by diffengine ${DATA.version}, ${moment(DATA.written)}.${credits}`,
    }),
  ];
}

function pairs(rows) {
  return el(
    "dl",
    { class: "pairs" },
    ...rows.filter(Boolean).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]),
  );
}

function valueTable(header, rows) {
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": header.join(", ") },
    el(
      "table",
      { class: "values", style: { width: "100%" } },
      el("thead", {}, el("tr", {}, ...header.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, ...rows),
    ),
  );
}

function section(id, title, ...children) {
  return el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title`, text: title }),
    ...children,
  );
}
