const ask = document.getElementById("ask");
const said = ask.querySelector("[role=status]");
const choices = JSON.parse(document.getElementById("choices").textContent);
const KINDS = ["window", "text", "messages"];
const ROLES = ["system", "user", "assistant", "tool"];
let numAsked = 0;

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, label]) => element("option", label, { value, selected: value === chosen })));
}

function kind() { return ask.elements.kind.value; }

function showKind() {
  KINDS.forEach((each) => { document.getElementById("ask-" + each).hidden = each !== kind(); });
  // A number out of range would stop the form without a word where it is hidden.
  ask.elements.window.disabled = kind() !== "window";
}

function showLast() {
  const last = choices.splits[ask.elements.split.value] - 1;
  ask.elements.window.max = String(Math.max(0, last));
  document.getElementById("last").textContent = last < 0 ? "there are none" : "0 to " + last;
}

function addMessage(role, content) {
  const row = element("div", null, { className: "message" });
  const roles = element("select"), words = element("textarea", null, { rows: 2, dir: "auto" });
  options(roles, ROLES.map((each) => [each, each]), role);
  roles.setAttribute("aria-label", "Role");
  words.setAttribute("aria-label", "Message");
  words.value = content;
  const remove = element("button", "Remove", { type: "button" });
  remove.addEventListener("click", () => row.remove());
  row.append(roles, words, remove);
  document.getElementById("messages").append(row);
}

function asked() {
  const strategies = [ask.elements.first.value, ask.elements.second.value].filter(Boolean);
  const common = { strategies, top: Number(ask.elements.top.value) };
  if (kind() === "text") return { text: document.getElementById("own").value, ...common };
  if (kind() === "window") return { split: ask.elements.split.value, window: Number(ask.elements.window.value), ...common };
  const messages = Array.from(document.querySelectorAll("#messages .message"), (row) => ({
    role: row.querySelector("select").value, content: row.querySelector("textarea").value,
  }));
  return { messages, ...common };
}

function say(words, wrong) {
  said.textContent = words;
  said.className = wrong ? "wrong" : "";
}

function showView(answer) {
  document.title = document.getElementById("heading").textContent = answer.title;
  const before = document.getElementById("before");
  before.textContent = answer.before;
  before.hidden = !answer.before;
  text.replaceChildren(...answer.view.tokens.map((token, place) => {
    const span = element("span", token, { id: "t" + place });
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    return span;
  }));
  detail.replaceChildren(element("p", "Select a token: click it, or focus the text and use the arrow keys."));
  begin(answer.view);
}

async function send() {
  const number = ++numAsked;
  say("The sources are asked ...", false);
  text.setAttribute("aria-busy", "true");
  try {
    const token = new URLSearchParams(location.search).get("token");
    const response = await fetch("view", {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: "Bearer " + token },
      body: JSON.stringify(asked()),
    });
    const answer = await response.json();
    if (number !== numAsked) return;
    if (!response.ok) {
      say(answer.error, true);
      return;
    }
    showView(answer);
    say("", false);
  } catch (error) {
    if (number === numAsked) say("No answer: is `fusion view` still running? (" + error.message + ")", true);
  } finally {
    if (number === numAsked) text.removeAttribute("aria-busy");
  }
}

const strategies = choices.strategies.map((each) => [each, each === "recipe" ? "the recipe's: " + choices.recipe_strategy : each]);
options(ask.elements.split, Object.keys(choices.splits).map((each) => [each, each]), choices.first.split);
options(ask.elements.first, strategies, choices.first.strategies[0]);
options(ask.elements.second, [["", "no other"], ...strategies], choices.first.strategies[1] || "");
ask.elements.window.value = String(choices.first.window || 0);
ask.elements.top.value = String(choices.first.top);
if (typeof choices.first.text === "string") {
  ask.elements.kind.value = "text";
  document.getElementById("own").value = choices.first.text;
}
addMessage("user", "");
addMessage("assistant", "");
showKind();
showLast();
ask.addEventListener("change", () => { showKind(); showLast(); });
ask.addEventListener("submit", (event) => { event.preventDefault(); send(); });
document.getElementById("own").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
});
document.getElementById("add").addEventListener("click", () => addMessage("user", ""));
send();
