// The page of a data set, made of elements.js.

function head() {
  const stops = DATA.problems.length > 0;
  const items = [
    ...DATA.problems.map((text) => el("li", { class: "bad", text })),
    ...DATA.warnings.map((text) => el("li", { text })),
  ];
  return el(
    "section",
    { class: "card head", "aria-label": "What was found" },
    el(
      "div",
      { class: "row" },
      el("h1", { text: DATA.name }),
      el("span", { class: `chip ${stops ? "failed" : "done"}`, text: stops ? "stops training" : "can be trained" }),
    ),
    el("p", { text: DATA.summary }),
    items.length ? el("ul", { class: "warnings", "aria-label": "Problems and warnings" }, ...items) : null,
    DATA.note ? el("p", { class: "soft small", text: DATA.note }) : null,
  );
}

// An image with the frames of its crops: what is outside of the solid one is cut off; the dashed one is the square.
function framed(item) {
  const frame = (name, [width, height]) =>
    el("i", { class: `crop ${name}`, style: { width: `${100 * width}%`, height: `${100 * height}%` } });
  const { kept, square } = item.frames;
  const differs = kept && (kept[0] !== square[0] || kept[1] !== square[1]);
  return el(
    "div",
    { class: "framed" },
    shot(item.image, item.name),
    kept ? frame("kept", kept) : null,
    differs ? frame("square", square) : null,
  );
}

function figure(item) {
  return el(
    "figure",
    { class: item.notes.length ? "odd" : null },
    framed(item),
    el(
      "figcaption",
      {},
      el("b", { text: item.name }),
      el("span", { class: "soft", text: ` ${item.size}` }),
      ...item.notes.map((text) => el("span", { class: "mark", text })),
      el("p", { class: "soft text", text: item.caption || "no caption", dir: "auto", title: item.caption }),
    ),
  );
}

function legend() {
  return el(
    "p",
    { class: "soft small" },
    "Outside of the solid frame is what the crop cuts off; the dashed frame is a square crop. Frames are centred; ",
    "a random crop moves them.",
  );
}

function roundTrips() {
  return DATA.trips.map((trip) =>
    el(
      "figure",
      {},
      el("div", { class: "pair" }, shot(trip.image, trip.name), shot(trip.again, `${trip.name}, from its tokens`)),
      el("figcaption", { text: `${trip.name}: PSNR ${number(trip.psnr, 3)} dB` }),
    ),
  );
}

function build() {
  const grid = (items) => el("div", { class: "shots", style: { "--shot": "170px" } }, ...items);
  const groups = DATA.groups.map((group) =>
    el("div", { class: "card stack" }, el("h3", { text: group.why }), grid(group.images.map(figure))),
  );
  const rows = DATA.captions.map(([what, text]) =>
    el("tr", {}, el("th", { scope: "row", text: what }), el("td", { text, dir: "auto" })),
  );
  const charts = Object.entries(DATA.charts).map(([title, counts]) => bars(title, counts));
  const sections = [
    section("images", "Images", el("div", { class: "card stack" }, legend(), grid(DATA.images.map(figure)))),
    groups.length ? section("duplicates", "Duplicates", el("div", { class: "stack" }, ...groups)) : null,
    DATA.trips.length
      ? section(
          "tokens",
          "What the tokens keep",
          el("p", { class: "soft small", text: "Left the image, right what comes back from its tokens: the best that can be learnt." }),
          el("div", { class: "card" }, el("div", { class: "shots", style: { "--shot": "260px" } }, ...roundTrips())),
        )
      : null,
    rows.length
      ? section("captions", "Captions", el("div", { class: "card" }, valueTable(["cut or repeated", "caption"], rows)))
      : null,
    section(
      "numbers",
      "Numbers",
      el("div", { class: "card stack" }, pairs(Object.entries(DATA.pairs)), el("div", { class: "grid narrow" }, ...charts)),
    ),
  ].filter(Boolean);
  const page = document.getElementById("page");
  page.replaceChildren(head(), ...body(sections, ""));
  document.documentElement.dataset.ready = "yes";
}

build();
