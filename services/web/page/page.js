"use strict";
const text = document.getElementById("text");
const other = document.getElementById("other");
const side = document.getElementById("side");
const detail = document.getElementById("detail");
const legend = document.getElementById("legend");
const NUM_SOURCE_STYLES = 6;
const UPPER = { entropy: [0.5, 1.5, 3], disagreement: [0.02, 0.1, 0.3], loss: [0.7, 2.3, 4.6] };
let view = null, spans = [], others = [], mode = "winner", strategy = 0, selected = -1;

function element(name, content, options) {
  const made = document.createElement(name);
  if (content !== undefined && content !== null) made.textContent = content;
  return Object.assign(made, options || {});
}

function isolated(content) { return element("bdi", content); }

function percent(p) {
  if (p === null) return "-";
  if (p < 1e-9) return "0 %";
  return p >= 0.0995 ? (100 * p).toFixed(0) + " %" : p >= 0.000995 ? (100 * p).toFixed(1) + " %" : p.toExponential(1);
}

function nats(value) { return value === null ? "no row" : value.toFixed(3) + " nats"; }

function change(token) {
  const [a, b] = view.strategies.map((each) => each.loss[token]);
  return a === null || b === null ? null : b - a;
}

function styleOf(token, now) {
  if (mode === "winner") return now.winner[token] < 0 ? "" : "s" + (now.winner[token] % NUM_SOURCE_STYLES);
  if (mode === "change") {
    const by = change(token);
    return by === null || Math.abs(by) < 0.01 ? "" : by < 0 ? "better" : "worse";
  }
  const value = now[mode][token];
  return value === null ? "" : "h" + (1 + UPPER[mode].filter((upper) => value >= upper).length);
}

function paint(row, now) {
  row.forEach((span, token) => {
    const classes = [styleOf(token, now)];
    if (token > 0) classes.push("gap");
    if (now.loss[token] === null) classes.push("masked");
    if (row === others && token === selected) classes.push("chosen");
    span.className = classes.filter(Boolean).join(" ");
  });
}

function showSides() {
  const two = side.checked && view.strategies.length > 1;
  document.getElementById("sides").className = two ? "two" : "";
  [other, ...document.querySelectorAll(".by")].forEach((each) => { each.hidden = !two; });
  if (two && others.length === 0) {
    others = spans.map((span) => element("span", span.textContent));
    other.replaceChildren(...others);
  }
  if (!two) return;
  document.getElementById("by-text").textContent = view.strategies[strategy].name;
  document.getElementById("by-other").textContent = view.strategies[1 - strategy].name;
  paint(others, view.strategies[1 - strategy]);
  other.scrollTop = text.scrollTop;
}

function colour() {
  paint(spans, view.strategies[strategy]);
  showSides();
  const entries = mode === "winner"
    ? view.sources.map((source, place) => [source.name, "s" + (place % NUM_SOURCE_STYLES)])
    : mode === "change"
      ? [["less loss with " + view.strategies[1].name, "better"], ["more loss with " + view.strategies[1].name, "worse"]]
      : [0, 1, 2, 3].map((step) => {
        const [low, high] = [UPPER[mode][step - 1], UPPER[mode][step]];
        return [low === undefined ? "below " + high : high === undefined ? "from " + low + " nats" : low + " to " + high, "h" + (step + 1)];
      });
  legend.replaceChildren(...entries.map(([name, style]) => {
    const entry = element("span", null, { className: style });
    entry.append(isolated(name));
    return entry;
  }));
}

function table(caption, heads, rows) {
  const made = element("table");
  made.append(element("caption", caption));
  const head = made.createTHead().insertRow();
  heads.forEach((name) => head.append(element("th", name, { scope: "col" })));
  const body = made.createTBody();
  rows.forEach(([cells, real]) => {
    const row = body.insertRow();
    if (real) row.className = "real";
    cells.forEach((cell) => {
      const made = row.insertCell();
      if (typeof cell === "number" || cell === null) {
        made.className = "number";
        made.textContent = percent(cell);
      } else {
        made.append(isolated(cell));
      }
    });
  });
  return made;
}

function entries(flat, token, width) {
  const rows = [], real = view.realised[token];
  for (let at = 0; at < flat.length; at += width) {
    const cells = [view.labels[flat[at]], flat[at + 1]];
    if (width === 3) cells.push(view.labels[flat[at + 2]]);
    rows.push([cells, width === 2 && flat[at] === real]);
  }
  return rows;
}

function withTail(rows, tail, width) {
  return rows.concat([[["all others", tail].concat(width === 3 ? [""] : []), false]]);
}

function listed(flat, tail, token) {
  const rows = entries(flat, token, 2);
  const inside = rows.reduce((sum, [cells]) => sum + cells[1], 0);
  return rows.concat([[["other candidates", Math.max(0, 1 - inside - (tail || 0))], false], [["tail", tail], false]]);
}

function show(token) {
  const now = view.strategies[strategy];
  const parts = [];
  const heading = element("h2", "Token " + (token + 1) + " of " + spans.length + ": ");
  heading.append(isolated(view.labels[view.realised[token]]));
  parts.push(heading);
  view.strategies.forEach((each) => {
    const by = view.strategies.length > 1 ? each.name + ": " : "";
    if (each.loss[token] === null) {
      parts.push(element("p", by + "This token has no fused row: it is not learned from."));
      return;
    }
    parts.push(element("p", by + "loss " + nats(each.loss[token]) + ", entropy " + nats(each.entropy[token]) + ", disagreement " + nats(each.disagreement[token]) + "."));
    const real = Math.exp(-each.loss[token]);
    parts.push(table("Fused, " + each.name + ": the real token has " + percent(real), ["target token", "p"], listed(each.fused[token][0], each.fused[token][1], token)));
  });
  view.sources.forEach((source, place) => {
    const weights = view.strategies.map((each) => percent(each.weights[place][token]) + (view.strategies.length > 1 ? " by " + each.name : ""));
    const title = element("h3", "Source ");
    title.append(isolated(source.name));
    title.append(": weight " + weights.join(", ") + (now.winner[token] === place ? ", best at this token" : ""));
    parts.push(title);
    const [opens, own] = source.own[token];
    const before = token > 0 || opens > 0 ? " (its row opens at byte " + opens + ")" : "";
    parts.push(table("In its own tokens" + before, ["its token", "p", "in the target's tokens"], withTail(entries(own, token, 3), 1 - own.reduce((sum, value, at) => at % 3 === 1 ? sum + value : sum, 0), 3)));
    if (source.reasons[token] >= 0) {
      parts.push(element("p", "No row in the target's tokens: " + view.labels[source.reasons[token]] + "."));
    } else {
      parts.push(table("In the target's tokens: the real one has " + percent(source.realised[token]), ["target token", "p"], listed(source.rows[token][0], source.rows[token][1], token)));
    }
  });
  detail.replaceChildren(...parts);
}

function select(token) {
  if (token < 0 || token >= spans.length) return;
  if (selected >= 0) spans[selected].setAttribute("aria-selected", "false");
  if (others[selected]) others[selected].classList.remove("chosen");
  if (others[token]) others[token].classList.add("chosen");
  selected = token;
  spans[token].setAttribute("aria-selected", "true");
  text.setAttribute("aria-activedescendant", spans[token].id);
  spans[token].scrollIntoView({ block: "nearest" });
  show(token);
}

function nextLine(step) {
  const here = spans[Math.max(0, selected)].getClientRects()[0];
  let best = -1, line = null;
  for (let token = selected + step; token >= 0 && token < spans.length; token += step) {
    const there = spans[token].getClientRects()[0];
    if (!there || step * (there.top - here.top) < here.height / 2) continue;
    if (line === null) line = there.top;
    if (Math.abs(there.top - line) > here.height / 2) break;
    if (best < 0 || Math.abs(there.left - here.left) < Math.abs(spans[best].getClientRects()[0].left - here.left)) best = token;
  }
  return best;
}

text.addEventListener("click", (event) => {
  const span = event.target.closest("[role=option]");
  if (span) select(spans.indexOf(span));
});
other.addEventListener("click", (event) => { if (event.target !== other) select(others.indexOf(event.target)); });
text.addEventListener("scroll", () => { other.scrollTop = text.scrollTop; });
other.addEventListener("scroll", () => { text.scrollTop = other.scrollTop; });
text.addEventListener("keydown", (event) => {
  const moves = { ArrowRight: selected + 1, ArrowLeft: selected - 1, Home: 0, End: spans.length - 1 };
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    select(selected < 0 ? 0 : nextLine(event.key === "ArrowDown" ? 1 : -1));
  } else if (event.key in moves) {
    select(moves[event.key]);
  } else {
    return;
  }
  event.preventDefault();
});
document.getElementById("modes").addEventListener("change", (event) => {
  if (event.target.name === "mode") mode = event.target.value;
  if (event.target.name === "strategy") strategy = Number(event.target.value);
  if (view === null) return;
  colour();
  if (selected >= 0) show(selected);
});

function begin(next) {
  view = next;
  spans = Array.from(text.children);
  others = [];
  other.replaceChildren();
  strategy = 0;
  selected = -1;
  const single = view.strategies.length < 2;
  if (single && mode === "change") {
    mode = "winner";
    document.querySelector("input[value=winner]").checked = true;
  }
  document.getElementById("strategies").hidden = document.getElementById("change").hidden = single;
  document.getElementById("each").replaceChildren(...view.strategies.map((each, place) => {
    const label = element("label");
    label.append(element("input", null, { type: "radio", name: "strategy", value: String(place), checked: place === 0 }), " ", isolated(each.name));
    return label;
  }));
  const scores = view.strategies.map((each) => ["fused, " + each.name, each.nats_per_byte])
    .concat(view.sources.map((each) => ["source " + each.name, each.nats_per_byte]));
  document.getElementById("scores").replaceChildren(...scores.map(([name, nats]) => {
    const row = element("tr"), head = element("th", null, { scope: "row" });
    head.append(isolated(name));
    row.append(head, element("td", nats === null ? "-" : nats.toFixed(3)));
    return row;
  }));
  text.removeAttribute("aria-activedescendant");
  colour();
}

const given = JSON.parse(document.getElementById("data").textContent);
if (given) begin(given);
