// The chat page: one question goes to one or two models of this server at once.
//
// talk.turns is a list of {question, replies}, replies a map from model id to {text, state, stoppedBy}. Each model
// sees its own replies alone. Everything is kept in this browser, so that a reload loses nothing.
import { WORDS } from "./words.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const kept = JSON.parse(localStorage.getItem("tunesmith") ?? "{}");
const talk = {
  turns: kept.turns ?? [],
  models: kept.models ?? [],
  language: kept.language ?? (navigator.language.startsWith("zh") ? "zh" : "en"),
  settings: kept.settings ?? {},
};
let served = []; // what the server says of its models
let running = new Map(); // reply object -> AbortController
const word = (name) => WORDS[talk.language][name];

function keep() {
  localStorage.setItem("tunesmith", JSON.stringify(talk));
}

// --- the server -------------------------------------------------------------------------------------------------------

class Refused extends Error {}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("tunesmith-key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(word("no_server"));
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("key-label").hidden = false;
    throw new Refused(word("wrong_key"));
  }
  const said = await answer.json().catch(() => ({}));
  throw new Refused(said.error?.message ?? `${answer.status} ${answer.statusText}`);
}

/** The values of an event stream's `data:` lines. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

/** What `model` has read before turn number `until` is answered. */
function messages(model, until) {
  const system = talk.settings.system?.trim();
  const said = system ? [{ role: "system", content: system }] : [];
  for (const turn of talk.turns.slice(0, until + 1)) {
    if (turn !== talk.turns[until] && !turn.replies[model]?.text) continue; // it was not asked then
    said.push({ role: "user", content: turn.question });
    if (turn !== talk.turns[until]) said.push({ role: "assistant", content: turn.replies[model].text });
  }
  return said;
}

async function answer(number, model) {
  const turn = talk.turns[number];
  const reply = (turn.replies[model] = { text: "", state: "writing" });
  const stopper = new AbortController();
  running.set(reply, stopper);
  draw();
  try {
    const body = { model, messages: messages(model, number), stream: true };
    for (const name of FIELDS.slice(1)) if (talk.settings[name] !== undefined) body[name] = talk.settings[name];
    for await (const event of events(await call("v1/chat/completions", body, stopper.signal))) {
      if (event.error) throw new Refused(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      reply.text += choice.delta.content ?? "";
      if (choice.finish_reason) reply.stoppedBy = choice.finish_reason;
      drawReply(number, model);
    }
    reply.state = "done";
  } catch (error) {
    reply.state = error.name === "AbortError" ? "stopped" : "refused";
    if (reply.state === "refused") reply.problem = error instanceof Refused ? error.message : String(error);
  } finally {
    running.delete(reply);
    keep();
    drawReply(number, model);
    drawButtons();
  }
}

const chosen = () => [...new Set(talk.models.filter((id) => served.some((model) => model.id === id)))];

function ask(question) {
  talk.turns.push({ question, replies: {} });
  const number = talk.turns.length - 1;
  for (const model of chosen()) answer(number, model);
  keep();
  $("talk").scrollTop = $("talk").scrollHeight;
}

// --- what is seen -----------------------------------------------------------------------------------------------------

function draw() {
  const list = $("talk");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  list.replaceChildren(...talk.turns.map(turnElement));
  if (!talk.turns.length) {
    list.append(Object.assign(document.createElement("p"), { className: "welcome", textContent: word("welcome") }));
  }
  translate(list);
  drawButtons();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function drawButtons() {
  $("send").hidden = running.size > 0;
  $("stop").hidden = running.size === 0;
}

function turnElement(turn, number) {
  const element = $("turn").content.cloneNode(true).firstElementChild;
  element.dataset.number = number;
  element.querySelector(".question p").textContent = turn.question;
  element.querySelector(".replies").append(
    ...Object.keys(turn.replies).map((model) => fillReply($("reply").content.cloneNode(true).firstElementChild, number, model)),
  );
  return element;
}

function fillReply(element, number, model) {
  const reply = talk.turns[number].replies[model];
  const tuned = served.find((one) => one.id === model)?.tuned;
  element.dataset.model = model;
  element.classList.toggle("tuned", Boolean(tuned));
  element.classList.toggle("writing", reply.state === "writing");
  element.querySelector("h3").textContent = tuned === undefined ? model : `${model} · ${word(tuned ? "tuned" : "base")}`;
  element.querySelector(".text").textContent = reply.text;
  const note = element.querySelector(".note");
  const notes = { stopped: word("stopped"), refused: reply.problem, corrected: word("corrected") };
  note.textContent = notes[reply.state] ?? (reply.stoppedBy === "length" ? word("length") : "");
  note.hidden = !note.textContent;
  for (const button of element.querySelectorAll(".tools button:not([hidden])")) button.disabled = reply.state === "writing";
  return element;
}

function drawReply(number, model) {
  const list = $("talk");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  const turn = list.querySelector(`article[data-number="${number}"]`);
  const element = [...(turn?.querySelectorAll(".reply") ?? [])].find((one) => one.dataset.model === model);
  if (element) fillReply(element, number, model);
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function translate(root) {
  for (const element of root.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
}

function drawFrame() {
  document.documentElement.lang = talk.language === "zh" ? "zh-CN" : "en";
  translate(document);
  $("language").textContent = word("other");
  $("question").placeholder = word("ask_here");
  $("question").setAttribute("aria-label", word("ask_here"));
  [0, 1].forEach((pane) => {
    const options = served.map((model) => new Option(`${model.id} · ${word(model.tuned ? "tuned" : "base")}`, model.id));
    if (pane === 1) options.unshift(new Option(word("nobody"), ""));
    $(`model-${pane}`).replaceChildren(...options);
    $(`model-${pane}`).value = talk.models[pane] ?? "";
  });
  const own = [...new Set(chosen().map((id) => served.find((model) => model.id === id).system).filter(Boolean))];
  $("system").placeholder = own.length ? `${word("own_system")}: ${own.join(" / ")}` : "";
  for (const name of FIELDS) $(name).value = talk.settings[name] ?? "";
  draw();
}

function say(problem) {
  $("problem").textContent = problem ?? "";
  $("problem").hidden = !problem;
}

// --- what can be done -------------------------------------------------------------------------------------------------

const stopAll = () => running.forEach((stopper) => stopper.abort());

/** Shows a text area in place of a text; `done` gets what was written. */
function edit(place, text, end, done) {
  const [shown, area] = [place.querySelector("p"), place.querySelector("textarea")];
  const show = (editing) => {
    [shown.hidden, area.hidden] = [editing, !editing];
    for (const button of place.querySelectorAll(".tools button")) {
      button.hidden = editing !== [end, "leave"].includes(button.dataset.act);
    }
  };
  area.value = text;
  show(true);
  area.focus();
  place.querySelector("[data-act=leave]").onclick = (event) => (event.stopPropagation(), show(false));
  place.querySelector(`[data-act=${end}]`).onclick = (event) => (event.stopPropagation(), done(area.value.trim()));
}

function save(model, until) {
  const turns = talk.turns.slice(0, until + 1);
  const said = messages(model, until);
  said.push({ role: "assistant", content: turns[until].replies[model].text });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify({ messages: said })}\n`], { type: "application/jsonl" }));
  link.download = `talk-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function showTokens(number, model) {
  const said = await (await call("tunesmith/prompt", { model, messages: messages(model, number) })).json();
  $("tokens-count").textContent = word("tokens_count")(said.tokens.length);
  $("tokens-text").replaceChildren(
    ...said.tokens.map((token) => {
      const span = document.createElement("span");
      span.textContent = token.text;
      span.title = token.id;
      span.classList.toggle("special", token.special);
      return span;
    }),
  );
  $("tokens").showModal();
}

$("talk").addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  const number = Number(button.closest("article").dataset.number);
  const turn = talk.turns[number];
  const element = button.closest(".reply");
  const model = element?.dataset.model;
  const reply = turn.replies[model];
  say();
  try {
    if (button.dataset.act === "edit") {
      edit(button.closest(".question"), turn.question, "ask-again", (question) => {
        if (!question) return;
        stopAll();
        talk.turns.length = number;
        ask(question);
      });
    } else if (button.dataset.act === "correct") {
      edit(element, reply.text, "keep", (text) => {
        Object.assign(reply, { text, state: "corrected" });
        keep();
        draw();
      });
    } else if (button.dataset.act === "copy") {
      await navigator.clipboard.writeText(reply.text);
      button.textContent = word("copied");
    } else if (button.dataset.act === "regenerate") {
      stopAll();
      talk.turns.length = number + 1; // what was said after it was said after another answer
      answer(number, model);
    } else if (button.dataset.act === "rows") {
      save(model, number);
    } else if (button.dataset.act === "tokens") {
      await showTokens(number, model);
    }
  } catch (error) {
    say(error.message);
  }
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running.size || !chosen().length) return;
  say();
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  // While an input method composes Chinese, Enter takes its word and does not send.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", stopAll);
$("new").addEventListener("click", () => {
  stopAll();
  talk.turns = [];
  keep();
  draw();
  $("question").focus();
});
$("settings-button").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("settings-button").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("language").addEventListener("click", () => {
  talk.language = talk.language === "zh" ? "en" : "zh";
  keep();
  drawFrame();
});
[0, 1].forEach((pane) =>
  $(`model-${pane}`).addEventListener("change", (event) => {
    talk.models[pane] = event.target.value;
    keep();
    drawFrame();
  }),
);
FIELDS.forEach((name) =>
  $(name).addEventListener("change", (event) => {
    const { value } = event.target;
    if (!event.target.reportValidity()) return;
    talk.settings[name] = value === "" ? undefined : name === "system" ? value : Number(value);
    keep();
  }),
);
$("key").addEventListener("change", (event) => {
  sessionStorage.setItem("tunesmith-key", event.target.value);
  begin();
});

async function begin() {
  say();
  try {
    served = await (await call("tunesmith/models")).json();
    if (!chosen().length) {
      const [base, tuned] = [served.find((model) => !model.tuned), served.find((model) => model.tuned)];
      talk.models = [(base ?? tuned)?.id, base && tuned ? tuned.id : ""];
    }
  } catch (error) {
    say(error.message);
    if (!$("key-label").hidden) $("settings").hidden = false;
  }
  drawFrame();
}

for (const turn of talk.turns) {
  for (const reply of Object.values(turn.replies)) if (reply.state === "writing") reply.state = "stopped";
}
begin();
