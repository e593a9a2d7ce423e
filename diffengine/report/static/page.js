// The page of a run, made of elements.js.

const RUNS = DATA.runs;
const MANY = RUNS.length > 1;
const STATUS = {
  running: "running",
  done: "done",
  stopped: "stopped",
  diverged: "diverged",
  failed: "failed",
};

const last = (values) => [...(values || [])].reverse().find((value) => value !== null && value !== undefined);
const mean = (values) => {
  const known = (values || []).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

// The shortest of config name, folder name and path that tells the runs apart.
function names() {
  const choices = [RUNS.map((run) => run.name), RUNS.map((run) => run.folder.split("/").at(-1))];
  return choices.find((list) => new Set(list).size === RUNS.length) || RUNS.map((run) => run.folder);
}
const NAMES = names();

// ---------------------------------------------------------------------------------------------------- the head

function head(run, at) {
  const total = run.max_iters,
    facts = el("dl", { class: "facts" });
  const fact = (name, value) => facts.append(el("div", {}, el("dt", { text: name }), el("dd", { text: value })));
  fact("step", total ? `${steps(run.step)} of ${steps(total)}` : steps(run.step));
  if (run.status === "running") fact("time left", duration(run.seconds_left));
  if (run.seconds) fact("time trained", duration(run.seconds));
  const loss = (run.train.loss || []).at(-1);
  if (run.train.loss) fact("loss", loss === null ? "not a number" : number(loss));
  const held = last(run.val["val/loss"]);
  if (held !== undefined) fact("held-out loss", number(held));
  const title = el(MANY ? "h2" : "h1", { text: NAMES[at] });
  if (MANY) title.style.margin = "0";
  return el(
    "section",
    { class: "card head", "aria-label": `The run ${NAMES[at]}` },
    el(
      "div",
      { class: "row" },
      MANY ? el("i", { class: "key", style: { background: `var(--c${at % 8})` } }) : null,
      title,
      el("span", { class: `chip ${run.status}`, text: STATUS[run.status] || run.status, "data-status": run.status }),
    ),
    facts,
    total ? el("progress", { max: total, value: run.step, "aria-label": "Steps taken" }) : null,
    warnings(run),
    commands(run),
    el("p", {
      class: "soft small",
      text: [
        run.folder,
        run.started ? `started ${moment(run.started)}` : null,
        run.updated ? `as of ${moment(run.updated)}` : `page written ${moment(DATA.written)}`,
        run.status === "running" ? "written again with every preview: reload to see more" : null,
      ]
        .filter(Boolean)
        .join(" · "),
    }),
  );
}

function warnings(run) {
  const items = run.warnings.map((item) => el("li", { text: `Step ${steps(item.step)}: ${item.text}` }));
  if (run.error) items.unshift(el("li", { class: "bad", text: run.error }));
  return items.length ? el("ul", { class: "warnings", "aria-label": "Warnings" }, ...items) : null;
}

function commands(run) {
  const rows = Object.entries(run.commands).map(([name, command]) => {
    const button = el("button", {
      type: "button",
      text: "Copy",
      "aria-label": `Copy the command to ${name}`,
      onclick: () => copy(command, button),
    });
    return el(
      "div",
      { class: "command" },
      el("span", { class: "soft", text: name }),
      el("code", { text: command, tabindex: "0" }),
      button,
    );
  });
  return rows.length ? el("div", { class: "commands" }, ...rows) : null;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // an old browser, or a page that is not trusted
    const area = el("textarea", { style: { position: "fixed", opacity: "0" } });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => {
    button.textContent = "Copy";
  }, 1500);
}

// ------------------------------------------------------------------------------------------------------ curves

const charts = [];
const settings = { smooth: 0.6, log: false };

// A moving average without a bias at the start; gaps stay gaps and count for nothing.
function smoothed(values, weight) {
  let sum = 0,
    norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// A curve is {label, x, y, color, width, dash, faint, smooth}.
function curve(label, group, key, color, more = {}) {
  const y = group[key];
  return y && y.some((value) => value !== null) ? { label, x: group.iter, y, color, width: 2, ...more } : null;
}

function perRun(key, where = "train", label = null, more = {}) {
  return RUNS.map((run, at) => curve(MANY ? NAMES[at] : label || key, run[where], key, at % 8, more)).filter(Boolean);
}

function lossCurves() {
  return RUNS.flatMap((run, at) => {
    const name = MANY ? `${NAMES[at]} ` : "";
    return [
      curve(`${name}raw`, run.train, "loss", at % 8, { width: 1, faint: true }),
      curve(`${name}smoothed`, run.train, "loss", at % 8, { smooth: true }),
    ];
  }).filter(Boolean);
}

function heldOutCurves() {
  const types = [
    ["val/loss", "held-out", []],
    ["val/loss_uncaptioned", "held-out, no caption", [8, 5]],
    ["val/train_loss", "training images", [2, 4]],
  ];
  return RUNS.flatMap((run, at) =>
    types.map(([key, label, dash], index) =>
      curve(MANY ? `${NAMES[at]}: ${label}` : label, run.val, key, MANY ? at % 8 : index, { dash, points: true }),
    ),
  ).filter(Boolean);
}

// Curves of each run for [key, label] pairs; their colors differ or, with many runs, their dashes.
function keyedCurves(where, pairs, more) {
  return RUNS.flatMap((run, at) =>
    pairs.map(([key, label], index) =>
      curve(MANY ? `${NAMES[at]}: ${label}` : label, run[where], key, MANY ? at % 8 : index % 8, {
        width: 1.5,
        dash: MANY ? [1 + index, 3] : [],
        ...more,
      }),
    ),
  ).filter(Boolean);
}

function levelCurves(where, prefix, more) {
  const label = (level) => `t ${((level + 0.5) / 8).toFixed(2)}`;
  const pairs = [...Array(8).keys()].map((level) => [`${prefix}loss_t${level}`, label(level)]);
  return keyedCurves(where, pairs, more);
}

function groupCurves() {
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.train)))];
  const groups = keys.filter((key) => key.startsWith("grad_norm_"));
  return keyedCurves(
    "train",
    groups.map((key) => [key, key.slice("grad_norm_".length).replaceAll("_", " ")]),
  );
}

// The names of all runs' sources, of which each has its own loss.
function sourceNames() {
  return [...new Set(RUNS.flatMap((run) => (run.data.sources || []).map((source) => source.name)))];
}

function sourceCurves(where, prefix, more) {
  const pairs = sourceNames().map((name) => [`${prefix}loss/${name}`, name]);
  return keyedCurves(where, pairs, more);
}

function throughputNotes() {
  return RUNS.flatMap((run, at) => {
    const tokens = mean(run.train.tokens_per_second);
    const name = MANY ? `${NAMES[at]}: ` : "";
    return tokens === null ? [] : [{ text: `${name}${number(tokens, 3)} image tokens per second` }];
  });
}

function references() {
  const found = {};
  for (const run of RUNS) for (const [name, value] of Object.entries(run.references)) found[name] = value;
  return Object.entries(found).map(([name, value]) => ({ name, value }));
}

function lossNotes() {
  return RUNS.flatMap((run, at) => {
    const broken = (run.train.loss || [])
      .map((value, index) => (value === null ? run.train.iter[index] : null))
      .filter((step) => step !== null);
    const name = MANY ? `${NAMES[at]}: ` : "";
    if (!broken.length) return [];
    return [
      {
        bad: true,
        text: `${name}the loss is not a number on ${broken.length} log lines, first at step ${steps(broken[0])}`,
      },
    ];
  });
}

function heldOutNotes() {
  return RUNS.flatMap((run, at) => {
    const values = run.val["val/loss"] || [],
      known = values.filter((value) => value !== null);
    if (!known.length) return [];
    const lowest = Math.min(...known),
      step = run.val.iter[values.indexOf(lowest)],
      now = last(values);
    const name = MANY ? `${NAMES[at]}: ` : "",
      later = now > lowest ? `; ${number(now)} at the last evaluation` : "";
    return [{ text: `${name}lowest ${number(lowest)} at step ${steps(step)}${later}` }];
  });
}

function accuracyCurves() {
  const heldOut = MANY ? [] : perRun("val/accuracy", "val", "held-out", { dash: [6, 4], points: true });
  return [...perRun("accuracy", "train", "training"), ...heldOut.map((item) => ({ ...item, color: 1 }))];
}

// What a model or a hook logs besides: a chart for each metric that no other chart shows.
function otherSpecifications() {
  const known = /^(iter|epoch|time|loss(_t\d)?|accuracy|lr|(images|tokens)_per_second|seconds_per_step|data_wait)$/;
  const groups = /^(grad_norm|memory_|checkpoint_|skipped_|loss\/)/;
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.train)))].filter(
    (key) => !known.test(key) && !groups.test(key),
  );
  return keys.slice(0, 16).map((key) => ({
    title: key[0].toUpperCase() + key.slice(1).replaceAll("_", " "),
    curves: perRun(key, "train", "value"),
  }));
}

function specifications() {
  return [
    { title: "Loss", curves: lossCurves(), lines: references(), notes: lossNotes(), log: true, tall: true },
    {
      title: "Held-out loss",
      curves: heldOutCurves(),
      lines: references(),
      notes: heldOutNotes(),
      log: true,
      tall: true,
    },
    {
      title: "Caption gain",
      about: "held-out loss without − with caption",
      curves: perRun("val/caption_gain", "val", "gain", { points: true }),
      lines: [{ name: "captions ignored", value: 0 }],
    },
    {
      title: "Training loss by t",
      about: "near t = 0 nearly all tokens are masked, near 1 few; smoothed",
      curves: levelCurves("train", "", { smooth: true }),
      log: true,
    },
    {
      title: "Held-out loss by t",
      about: "near t = 0 nearly all tokens are masked, near 1 few",
      curves: levelCurves("val", "val/", { points: true }),
      log: true,
    },
    {
      title: "Training loss by source",
      about: "smoothed",
      curves: sourceCurves("train", "", { smooth: true }),
      log: true,
    },
    { title: "Held-out loss by source", curves: sourceCurves("val", "val/", { points: true }), log: true },
    { title: "Token accuracy", curves: accuracyCurves() },
    { title: "Learning rate", curves: perRun("lr", "train", "learning rate") },
    { title: "Gradient norm", about: "before clipping", curves: perRun("grad_norm", "train", "norm"), log: true },
    { title: "Gradient norm by group", about: "before clipping", curves: groupCurves(), log: true },
    {
      title: "Throughput",
      about: "images per second",
      curves: perRun("images_per_second", "train", "images/s"),
      notes: throughputNotes(),
    },
    {
      title: "Memory",
      about: "most memory that training took so far, in GB",
      curves: perRun("memory_gb", "train", "GB"),
    },
    {
      title: "Data wait",
      about: "share of the time spent waiting for data",
      curves: perRun("data_wait", "train", "share"),
    },
    ...otherSpecifications(),
  ].filter((item) => item.curves.length);
}

// The first and the last step of all runs: every chart shows them, so that they line up.
function ends() {
  const all = RUNS.flatMap((run) => [run.train.iter, run.val.iter].flatMap((list) => list || []));
  return all.length ? [Math.min(...all), Math.max(...all, 1)] : [];
}

// All curves over one list of steps.
function table(curves) {
  const at = [...new Set([...ends(), ...curves.flatMap((item) => item.x)])].sort((a, b) => a - b);
  const columns = curves.map((item) => {
    const y = item.smooth ? smoothed(item.y, settings.smooth) : item.y;
    const known = new Map(item.x.map((step, index) => [step, y[index]]));
    return at.map((step) => (known.has(step) ? known.get(step) : undefined));
  });
  return [at, ...columns];
}

function range(spec, log) {
  return (u, low, high) => {
    if (low === null || low === undefined || !isFinite(low)) return [0, 1];
    for (const line of spec.lines || []) {
      const near = line.value <= high + (high - low) && line.value >= low - (high - low);
      if (near && (line.value > 0 || !log)) {
        low = Math.min(low, line.value);
        high = Math.max(high, line.value);
      }
    }
    if (log) return [low > 0 ? low * 0.9 : 1e-9, Math.max(high, 1e-9) * 1.1];
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1,
      room = (spec.lines || []).length ? margin : 0;
    return [low >= 0 && !spec.log && low < high * 0.7 ? 0 : low - margin, high + margin + room];
  };
}

function drawLines(spec, log) {
  return (u) => {
    const context = u.ctx,
      { left, top, width, height } = u.bbox,
      ratio = devicePixelRatio;
    context.save();
    context.font = `${11.5 * ratio}px system-ui, sans-serif`;
    let above = -Infinity; // a label close to the line above it goes under its own
    const placed = (spec.lines || [])
      .map((line) => ({ ...line, y: u.valToPos(line.value, "y", true) }))
      .filter(({ y }) => isFinite(y) && y >= top - 1 && y <= top + height + 1)
      .sort((a, b) => a.y - b.y);
    for (const line of placed) {
      const y = line.y;
      context.strokeStyle = context.fillStyle = css("--soft");
      context.setLineDash([5 * ratio, 4 * ratio]);
      context.lineWidth = ratio;
      context.beginPath();
      context.moveTo(left, y);
      context.lineTo(left + width, y);
      context.stroke();
      context.textAlign = "right";
      context.textBaseline = y - Math.max(above, top) > 18 * ratio ? "bottom" : "top";
      above = y;
      const at = left + width - 6 * ratio,
        gap = context.textBaseline === "top" ? 4 : -3;
      context.fillText(`${line.name}${line.value ? ` (${number(line.value)})` : ""}`, at, y + gap * ratio);
    }
    context.restore();
  };
}

// The index nearest to the pointer's at which a series has a value.
function nearest(u, series, hovered) {
  const values = u.data[series];
  for (let away = 0; away < values.length; away++) {
    for (const index of [hovered - away, hovered + away]) if (Number.isFinite(values[index])) return index;
  }
  return hovered;
}

function axis(extra) {
  return {
    stroke: css("--soft"),
    font: "12px system-ui, sans-serif",
    grid: { stroke: css("--grid"), width: 1 },
    ticks: { stroke: css("--grid"), width: 1 },
    ...extra,
  };
}

const height = (spec) => (spec.tall ? 320 : 200);
const WHOLE = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].flatMap((ten) => [ten, 2 * ten, 5 * ten]);

function options(spec, width) {
  const log = settings.log && Boolean(spec.log),
    colors = [...Array(8).keys()].map((index) => css(`--c${index}`));
  const series = spec.curves.map((item) => ({
    label: item.label,
    stroke: colors[item.color] + (item.faint ? "80" : ""),
    width: item.width,
    dash: item.dash,
    spanGaps: true,
    points: {
      show: (Boolean(item.points) && item.x.length < 60) || item.x.length === 1,
      size: 5,
      fill: colors[item.color],
    },
    value: (u, value) => number(value),
  }));
  return {
    width,
    height: height(spec),
    series: [{ label: "step", value: (u, value) => number(value, 9) }, ...series],
    scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: range(spec, log) } },
    axes: [
      axis({ incrs: WHOLE, space: 64, values: (u, values) => values.map((value) => number(value, 9)) }),
      axis({ size: 62, values: (u, values) => values.map((value) => (value === null ? "" : number(value))) }),
    ],
    cursor: {
      dataIdx: nearest,
      sync: { key: "steps", setSeries: false },
      drag: { x: true, y: false },
      focus: { prox: 24 },
    },
    legend: { live: true },
    hooks: { draw: [drawLines(spec, log)], setScale: [(u, key) => key === "x" && zoomTogether(u)] },
  };
}

let zooming = false;
function zoomTogether(source) {
  if (zooming) return;
  zooming = true;
  const { min, max } = source.scales.x,
    [low, high] = [source.data[0][0], source.data[0].at(-1)];
  const whole = min <= low && max >= high;
  for (const { plot } of charts) {
    if (plot === source || !plot) continue;
    const x = plot.data[0];
    plot.setScale("x", whole ? { min: x[0], max: x.at(-1) } : { min, max });
  }
  zooming = false;
}

function summary(spec) {
  return spec.curves
    .filter((item) => !item.faint)
    .map((item) => {
      const known = item.x.map((step, index) => [step, item.y[index]]).filter(([, value]) => Number.isFinite(value));
      const [first, final] = [known[0], known.at(-1)];
      return `${item.label}: from ${number(first[1])} at step ${first[0]} to ${number(final[1])} at step ${final[0]}`;
    })
    .join("; ");
}

function makePlot(chart) {
  const shown = chart.plot && chart.plot.scales.x;
  if (chart.plot) chart.plot.destroy();
  const data = table(chart.spec.curves);
  zooming = true;
  chart.plot = new uPlot(options(chart.spec, chart.box.clientWidth || 320), data, chart.box);
  if (shown && isFinite(shown.min) && (shown.min > data[0][0] || shown.max < data[0].at(-1))) {
    chart.plot.setScale("x", { min: shown.min, max: shown.max });
  }
  zooming = false;
}

function chartCard(spec) {
  const box = el("div", { class: "plot", role: "img", "aria-label": `${spec.title}. ${summary(spec)}` });
  charts.push({ spec, box, plot: null });
  return el(
    "figure",
    { class: "card chart", "data-chart": spec.title },
    el(
      "div",
      { class: "row" },
      el("h3", { text: spec.title }),
      spec.about ? el("span", { class: "soft small", text: spec.about }) : null,
    ),
    box,
    ...(spec.notes || []).map((note) => el("p", { class: note.bad ? "note bad" : "note", text: note.text })),
  );
}

function tools() {
  const shown = el("output", { text: settings.smooth.toFixed(2), for: "smoothing" });
  const slider = el("input", {
    type: "range",
    id: "smoothing",
    min: 0,
    max: 0.99,
    step: 0.01,
    value: settings.smooth,
    oninput: () => {
      settings.smooth = Number(slider.value);
      shown.textContent = settings.smooth.toFixed(2);
      for (const chart of charts)
        if (chart.spec.curves.some((item) => item.smooth)) chart.plot.setData(table(chart.spec.curves), false);
      for (const chart of charts) if (chart.spec.curves.some((item) => item.smooth)) chart.plot.redraw();
    },
  });
  const log = el("input", {
    type: "checkbox",
    id: "log",
    onchange: () => {
      settings.log = log.checked;
      charts.forEach(makePlot);
    },
  });
  const reset = el("button", {
    type: "button",
    text: "Whole run",
    onclick: () => {
      const plot = charts[0].plot;
      plot.setScale("x", { min: plot.data[0][0], max: plot.data[0].at(-1) });
    },
  });
  return el(
    "div",
    { class: "row tools" },
    el("label", {}, "Smoothing", slider, shown),
    el("label", {}, log, "Log scale"),
    reset,
    el("span", { class: "soft small", text: "Point at a curve for its values; drag sideways to zoom in on all." }),
  );
}

function curves() {
  const specs = specifications();
  const body = specs.length
    ? [
        tools(),
        el("div", { class: "grid" }, ...specs.filter((spec) => spec.tall).map(chartCard)),
        el("div", { class: "grid narrow" }, ...specs.filter((spec) => !spec.tall).map(chartCard)),
      ]
    : [el("p", { class: "soft", text: "No log line yet." })];
  return section("curves", "Curves", ...body);
}

// ---------------------------------------------------------------------------------------------------- previews

// The sliders of all runs on the page: where one is moved, the others follow to the nearest step.
const lapses = [];

function follow(moved) {
  const step = moved.steps[Number(moved.slider.value)];
  lapses
    .filter((lapse) => lapse !== moved)
    .forEach(({ slider, steps: all, show }) => {
      const distances = all.map((other) => Math.abs(other - step));
      slider.value = distances.indexOf(Math.min(...distances));
      show();
    });
}

function timeLapse(run, at) {
  const { steps: all, prompts, images, grid } = run.previews;
  const stepText = (index) => `step ${steps(all[index])}`;
  const shots = prompts.map((prompt, index) => shot(images.at(-1)[index], `${prompt}, ${stepText(all.length - 1)}`));
  const shown = el("output", { text: stepText(all.length - 1), "data-step": all.at(-1) });
  const show = () => {
    const index = Number(slider.value);
    shown.textContent = stepText(index);
    shown.dataset.step = all[index];
    slider.setAttribute("aria-valuetext", stepText(index));
    shots.forEach((image, row) => {
      image.src = images[index][row] || "";
      image.alt = `${prompts[row]}, ${stepText(index)}`;
    });
  };
  const slider = el("input", {
    type: "range",
    min: 0,
    max: all.length - 1,
    value: all.length - 1,
    step: 1,
    class: "time",
    "aria-label": `Step of the previews of ${NAMES[at]}`,
    "aria-valuetext": stepText(all.length - 1),
    oninput: () => moved(),
  });
  const moved = () => {
    show();
    follow(lapse);
  };
  const lapse = { slider, steps: all, show };
  lapses.push(lapse);
  const cards = shots.map((image, index) =>
    el("figure", {}, image, grid ? null : el("figcaption", { text: prompts[index], dir: "auto" })),
  );
  return el(
    "div",
    {},
    el("div", { class: "lapse" }, playButton(slider, moved), slider, shown),
    el("div", { class: grid ? "shots grids" : "shots", style: { "--shot": "132px" } }, ...cards),
  );
}

// Plays a slider from where it is, or from its start; a second press stops it.
function playButton(slider, show) {
  let timer = null;
  const end = Number(slider.max);
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  const advance = () => {
    slider.value = Number(slider.value) + 1;
    show();
    if (Number(slider.value) === end) stop();
  };
  const start = () => {
    if (Number(slider.value) === end) slider.value = 0;
    show();
    play.textContent = "Pause";
    timer = setInterval(advance, Math.max(120, Math.min(600, 6000 / (end + 1))));
  };
  const play = el("button", { type: "button", text: "Play", onclick: () => (timer ? stop() : start()) });
  return play;
}

function everyStep(run) {
  const { steps: all, prompts, images, original = [], round_trip = [] } = run.previews;
  const sources = [
    ["original", original],
    ["round trip", round_trip],
  ].filter(([, list]) => list.length);
  const top = el(
    "tr",
    {},
    el("th", { scope: "col", text: "prompt" }),
    ...sources.map(([name]) => el("th", { scope: "col", text: name })),
    ...all.map((step) => el("th", { scope: "col", text: steps(step) })),
  );
  const rows = prompts.map((prompt, row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: prompt, dir: "auto" }),
      ...sources.map(([name, list]) => el("td", {}, shot(list[row], `${name}: ${prompt}`))),
      ...all.map((step, column) => el("td", {}, shot(images[column][row], `${prompt}, step ${step}`))),
    ),
  );
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Every prompt at every step" },
    el("table", { class: "images", style: { "--cell": "92px" } }, el("thead", {}, top), el("tbody", {}, ...rows)),
  );
}

function beforeAfter(run) {
  const { steps: all, prompts, images } = run.previews;
  const cards = prompts.map((prompt, index) =>
    el(
      "figure",
      {},
      el(
        "div",
        { class: "pair" },
        shot(images[0][index], `${prompt}, before`),
        shot(images.at(-1)[index], `${prompt}, after`),
      ),
      el("figcaption", { text: prompt, dir: "auto" }),
    ),
  );
  return el("div", { class: "shots", style: { "--shot": "200px" } }, ...cards);
}

function previewSection(run, at) {
  const { steps: all, grid, process } = run.previews;
  const title = MANY ? el("h3", { text: NAMES[at] }) : null;
  if (!all.length) return el("div", { class: "card" }, title, el("p", { class: "soft", text: "No previews yet." }));
  const more = [];
  if (!grid) {
    more.push(el("details", { open: !MANY }, el("summary", { text: "Every prompt at every step" }), everyStep(run)));
    if (all.length > 1)
      more.push(
        el("details", {}, el("summary", { text: `Before and after ${steps(all.at(-1))} steps` }), beforeAfter(run)),
      );
  }
  if (process && process.length) {
    more.push(
      el(
        "details",
        {},
        el("summary", { text: `How the first one is generated: ${process.length} steps` }),
        el(
          "div",
          { class: "thumbs" },
          ...process.map((item) =>
            el("figure", {}, shot(item.image, item.label), el("figcaption", { text: item.label })),
          ),
        ),
      ),
    );
  }
  return el("div", { class: "card stack" }, title, timeLapse(run, at), ...more);
}

// --------------------------------------------------------------------------- data, config, environment, differences

function dataFacts(run) {
  const data = run.data;
  const lengths = data.captions;
  const skipped = (run.train.skipped_pictures || []).reduce((sum, count) => sum + (count || 0), 0);
  return pairs([
    ["images", steps(data.images)],
    data.held_out ? ["of these held out", steps(data.held_out)] : null,
    ["times each image is seen", number(data.epochs_per_image, 3)],
    data.shapes ? ["lost by the crop", `${share(data.shapes.lost)} of the area, in ${data.shapes.bars.length} shapes`] : null,
    data.crop ? [data.shapes ? "lost in a square" : "lost by the crop", `${share(data.crop_lost)} of the area, by a square of ${data.crop} px`] : null,
    data.crop ? ["smaller than the crop", `${share(data.enlarged)} of the images, which are enlarged`] : null,
    lengths ? ["longest caption", `${lengths.longest} tokens; the model reads ${lengths.read}`] : null,
    lengths && lengths.cut ? ["captions cut off", `${lengths.cut} of ${lengths.counted} counted`] : null,
    data.unreadable ? ["cannot be read", `${data.unreadable}`] : null,
    skipped ? ["skipped while training", `${steps(skipped)} times`] : null,
  ]);
}

function sourceTable(run) {
  const known = (values) => (values || []).filter((value) => value !== null && value !== undefined);
  const header = ["source", "images", "held out", "repeats", "samples an epoch", "weight", "first loss", "last loss"];
  const rows = run.data.sources.map((source) => {
    const losses = known(run.train[`loss/${source.name}`]);
    const cells = [
      steps(source.images),
      steps(source.images - source.trained),
      source.repeats,
      steps(source.samples),
      number(source.weight),
      number(losses[0]),
      number(losses.at(-1)),
      number(last(run.val[`val/loss/${source.name}`])),
    ];
    return el(
      "tr",
      {},
      el("th", { scope: "row", text: source.name, title: source.path }),
      ...cells.map((text) => el("td", { text })),
    );
  });
  return valueTable([...header, "held-out loss"], rows);
}

function dataCard(run, at) {
  const data = run.data;
  if (!data.images)
    return el(
      "div",
      { class: "card" },
      el("p", { class: "soft", text: `${MANY ? `${NAMES[at]}: ` : ""}this run kept no account of its data.` }),
    );
  const lengths = data.captions;
  const files = (data.unreadable_files || []).map((file) => el("li", { text: file }));
  const histograms = [
    data.sizes ? bars(`Sizes (${data.sizes.of})`, data.sizes.bars) : null,
    data.shapes ? bars("Shapes that are trained (width × height)", data.shapes.bars) : null,
    lengths ? bars("Tokens per caption", lengths.bars) : null,
  ].filter(Boolean);
  const thumbs = data.thumbnails.map((item) =>
    el(
      "figure",
      {},
      shot(item.image, item.caption),
      el("figcaption", { text: item.caption, title: item.caption, dir: "auto" }),
    ),
  );
  return el(
    "div",
    { class: "card stack" },
    MANY ? el("h3", { text: NAMES[at] }) : null,
    el("div", { class: "grid narrow", style: { "margin-top": "0" } }, dataFacts(run), ...histograms),
    data.sources ? sourceTable(run) : null,
    files.length
      ? el(
          "details",
          {},
          el("summary", { text: "Images that cannot be read" }),
          el("ul", { class: "mono", style: { "padding-left": "20px" } }, ...files),
        )
      : null,
    thumbs.length ? el("h3", { text: "As the model sees them, after the crop" }) : null,
    thumbs.length ? el("div", { class: "thumbs" }, ...thumbs) : null,
  );
}

function configCard(run, at) {
  const changed = run.config.filter((row) => row.changed);
  const line = (row) =>
    el(
      "tr",
      { class: row.changed ? "changed" : null },
      el("th", { scope: "row", class: "mono", text: row.key }),
      el("td", { class: "mono", text: row.value }),
      el("td", { class: "mono", text: row.changed ? row.shipped : "" }),
    );
  const header = ["name", "value", "as shipped, where it differs"];
  const title = MANY ? el("h3", { text: NAMES[at] }) : null;
  if (!run.config.length)
    return el("div", { class: "card" }, title, el("p", { class: "soft", text: "No config.py that can be read." }));
  return el(
    "div",
    { class: "card stack" },
    title,
    changed.length
      ? el("p", {
          text: `${changed.length} value${changed.length > 1 ? "s differ" : " differs"} from the shipped ${run.name}:`,
        })
      : null,
    changed.length ? valueTable(header, changed.map(line)) : null,
    el(
      "details",
      {},
      el("summary", { text: `All ${run.config.length} values` }),
      valueTable(header, run.config.map(line)),
    ),
  );
}

function timeRows(run) {
  const train = run.train,
    pace = mean(train.seconds_per_step),
    wait = mean(train.data_wait);
  return [
    run.seconds ? ["time, previews included", duration(run.seconds)] : null,
    pace ? ["seconds per step", number(pace, 3)] : null,
    run.seconds && pace ? ["share of the time in steps", share(Math.min(1, (pace * run.step) / run.seconds))] : null,
    wait !== null ? ["waiting for data", share(wait)] : null,
    train.images_per_second ? ["images per second", number(mean(train.images_per_second), 3)] : null,
    train.tokens_per_second ? ["image tokens per second", number(mean(train.tokens_per_second), 3)] : null,
    ...Object.entries(run.memory)
      .filter(([, size]) => size)
      .map(([name, size]) => [
        {
          trained: "trained weights",
          frozen: "frozen weights",
          optimizer: "optimizer state",
          average: "average of the weights",
          peak: "most memory taken",
          checkpoint: "one checkpoint on disk",
        }[name] || name,
        bytes(size),
      ]),
  ];
}

function environmentCard(run, at) {
  const environment = Object.entries(run.environment),
    costs = timeRows(run).filter(Boolean);
  return el(
    "div",
    { class: "card stack" },
    MANY ? el("h3", { text: NAMES[at] }) : null,
    el(
      "div",
      { class: "grid" },
      costs.length ? el("div", { class: "stack" }, el("h3", { text: "Time and memory" }), pairs(costs)) : null,
      environment.length
        ? el("div", { class: "stack" }, el("h3", { text: "Environment" }), pairs(environment))
        : null,
    ),
  );
}

function differencesCard() {
  const rows = DATA.differences.map((row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", class: "mono", text: row.key }),
      ...row.values.map((value) => el("td", { class: "mono", text: value })),
    ),
  );
  return rows.length
    ? valueTable(["name", ...NAMES], rows)
    : el("p", { class: "soft", text: "The configs are equal." });
}

// ---------------------------------------------------------------------------------------------------- the whole

function build() {
  const page = document.getElementById("page");
  page.replaceChildren();
  if (MANY) page.append(el("h1", { text: `${RUNS.length} runs`, style: { "margin-bottom": "14px" } }));
  page.append(el("div", { class: MANY ? "grid" : "" }, ...RUNS.map(head)));
  const each = (card) => el("div", { class: "stack" }, ...RUNS.map(card));
  const sections = [
    MANY ? section("differences", "What differs in their configs", differencesCard()) : null,
    curves(),
    section("previews", "Previews", each(previewSection)),
    section("data", "Data", each(dataCard)),
    section("config", "Config", each(configCard)),
    section("environment", "Time, memory and environment", each(environmentCard)),
  ].filter(Boolean);
  page.append(...body(sections, " Curves by uPlot."));
  charts.forEach(makePlot);
  new ResizeObserver(() => {
    for (const { plot, box, spec } of charts) {
      if (box.clientWidth && plot.width !== box.clientWidth)
        plot.setSize({ width: box.clientWidth, height: height(spec) });
    }
  }).observe(page);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(makePlot));
  document.documentElement.dataset.ready = "yes";
}

build();
