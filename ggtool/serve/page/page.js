// The page of `ggtool serve`: a conversation with one model, or with two side by side. Text of models and users only ever
// becomes text nodes. What is kept between visits lies in this browser: settings and the conversation, never the key.
"use strict";

const DEFAULTS = {
  system: "", temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repeat_penalty: 1.1, max_tokens: 256, seed: "",
  surprise: false,
};
const SURPRISED_NATS = [2, 4, 7]; // from here on a token is shaded lightly, clearly, strongly
const POLL_MS = 2000;

const $ = (id) => document.getElementById(id);
const store = {
  read: (name, otherwise) => { try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; } },
  write: (name, value) => { try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* private windows */ } },
};

let settings = { ...DEFAULTS, ...store.read("ggtool.settings", {}) };
// A turn: {user, seed, answers: [{model, text, thought, tokens: [{text, logprob}], cost, error}]}
let turns = store.read("ggtool.turns", []);
let models = [];
let stopping = null; // the AbortController of the answers that are being made
let editing = null; // the number of the turn whose text is being changed

function headers() {
  const key = sessionStorage.getItem("ggtool.key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function notice(text, wrong = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("wrong", wrong);
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Models and what they take

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error.message);
    models = found.data;
  } catch (error) {
    notice(`The models cannot be listed: ${error.message}`, true);
    return;
  }
  const chosen = store.read("ggtool.chosen", []);
  ["model-a", "model-b"].forEach((id, at) => {
    const before = $(id).value || chosen[at];
    $(id).replaceChildren(...models.map((model) => {
      const option = element("option", "", `${model.id} (${model.meta.format})`);
      option.value = model.id;
      return option;
    }));
    const fallback = models[Math.min(at, models.length - 1)];
    $(id).value = models.some((model) => model.id === before) ? before : fallback ? fallback.id : "";
  });
  $("compare").disabled = models.length < 2;
  notice("");
}

async function poll() {
  try {
    const { loaded } = await (await fetch("health")).json();
    const all = Object.values(loaded);
    const bytes = all.reduce((sum, one) => sum + one.memory_bytes, 0);
    const busy = all.reduce((sum, one) => sum + one.busy, 0);
    $("live").textContent = all.length ? `${(bytes / 2 ** 20).toFixed(0)} MiB · ${busy} running` : "nothing loaded";
  } catch {
    $("live").textContent = "the server is gone";
  }
  setTimeout(poll, POLL_MS);
}

// Drawing

function drawText(place, answer, other) {
  place.replaceChildren();
  const scored = answer.tokens && answer.tokens.length && (settings.surprise || other);
  if (!scored) {
    drawMarkdown(place, answer.text);
    return;
  }
  // Behind the first token that differs the two texts are about different things, and every token is marked there.
  let parted = false;
  answer.tokens.forEach((token, at) => {
    const span = element("span", "token", token.text);
    const twin = other && other.tokens && other.tokens[at];
    const parts = !parted && Boolean(other) && Boolean(twin) && twin.text !== token.text;
    parted = parted || parts;
    if (parts) span.classList.add("parts");
    if (parted) span.classList.add("differs");
    if (token.logprob !== null) {
      const nats = -token.logprob;
      const level = SURPRISED_NATS.filter((from) => nats >= from).length;
      if (level && (settings.surprise || parted)) span.classList.add(`s${level}`);
      span.title = `probability ${(100 * Math.exp(token.logprob)).toPrecision(3)} %, surprise ${nats.toFixed(2)} nats`;
    }
    place.append(span);
  });
}

// Code in fences, code in backticks and **bold**: what matters to read an answer, and no more.
function drawMarkdown(place, text) {
  text.split(/^```.*\n?/m).forEach((part, at) => {
    if (at % 2) {
      const pre = element("pre");
      pre.append(element("code", "", part.replace(/\n$/, "")));
      place.append(pre);
      return;
    }
    for (const piece of part.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/s.test(piece)) place.append(element("code", "", piece.slice(1, -1)));
      else if (/^\*\*.+\*\*$/s.test(piece)) place.append(element("strong", "", piece.slice(2, -2)));
      else if (piece) place.append(piece);
    }
  });
}

function drawAnswer(box, turn, at) {
  const answer = turn.answers[at];
  box.replaceChildren();
  const who = element("div", "who");
  who.append(element("span", "", answer.model));
  const copy = element("button", "", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", `Copy the answer of ${answer.model}`);
  copy.onclick = () => navigator.clipboard.writeText(answer.text).then(() => notice("Copied."), () => notice("The browser does not let pages copy here.", true));
  who.append(copy);
  const said = element("div", "said");
  if (answer.thought) said.append(element("div", "thought", answer.thought));
  const text = element("div", "text");
  drawText(text, answer, turn.answers.length > 1 ? turn.answers[1 - at] : null);
  said.append(text);
  if (answer.error) said.append(element("div", "cost wrong", answer.error));
  box.append(who, said, element("div", "cost", answer.cost || ""));
}

function drawTurn(turn, number) {
  const place = element("div", `turn${turn.answers.length > 1 ? " two" : ""}`);
  const user = element("div", "user");
  const who = element("div", "who");
  who.append(element("span", "", "You"));
  const edit = element("button", "", "Edit");
  edit.type = "button";
  edit.setAttribute("aria-label", `Edit message ${number + 1}`);
  edit.onclick = () => {
    editing = number;
    $("entry").value = turn.user;
    $("entry").focus();
    notice("Sending replaces this message and everything after it. Esc leaves it as it is.");
  };
  who.append(edit);
  const said = element("div", "said");
  said.append(element("div", "text", turn.user));
  user.append(who, said);
  const answers = element("div", "answers");
  turn.boxes = turn.answers.map((_, at) => {
    const box = element("div", "answer");
    answers.append(box);
    return box;
  });
  place.append(user, answers);
  turn.boxes.forEach((box, at) => drawAnswer(box, turn, at));
  return place;
}

function drawAll() {
  $("talk").replaceChildren(...turns.map(drawTurn));
  updateButtons();
  $("talk").scrollTop = $("talk").scrollHeight;
}

function updateButtons() {
  const busy = Boolean(stopping);
  $("send").disabled = busy;
  $("stop").disabled = !busy;
  for (const id of ["again", "export-markdown", "export-json", "clear"]) $(id).disabled = busy || !turns.length;
}

function save() {
  store.write("ggtool.turns", turns.map(({ boxes, ...turn }) => turn));
}

// Asking

function requestOf(model, number, at, seed) {
  const options = {
    model, seed, stream: true, stream_options: { include_usage: true }, max_tokens: Number(settings.max_tokens),
    temperature: Number(settings.temperature), top_k: Number(settings.top_k), top_p: Number(settings.top_p),
    min_p: Number(settings.min_p), repeat_penalty: Number(settings.repeat_penalty),
  };
  const before = turns.slice(0, number).map((turn) => [turn.user, (turn.answers[at] || turn.answers[0]).text]);
  const facts = models.find((one) => one.id === model);
  if (facts && facts.meta.can_chat) {
    const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
    for (const [user, answer] of before) {
      messages.push({ role: "user", content: user }, { role: "assistant", content: answer });
    }
    messages.push({ role: "user", content: turns[number].user });
    return ["v1/chat/completions", { ...options, messages, logprobs: true, top_logprobs: 0 }];
  }
  // A base model continues one running text, as `ggtool chat` has it.
  const start = settings.system ? `${settings.system}\n\n` : "";
  const prompt = start + [...before.map(([user, answer]) => user + answer), turns[number].user].join("\n");
  return ["v1/completions", { ...options, prompt, logprobs: 0 }];
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (pending + value.replaceAll("\r", "")).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((one) => one.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// Take one event of a stream into an answer.
function take(answer, event, held) {
  if (event.error) throw new Error(event.error.message);
  const choice = event.choices && event.choices[0];
  if (choice) {
    const delta = choice.delta || { content: choice.text };
    answer.thought = (answer.thought || "") + (delta.reasoning_content || "");
    answer.text += delta.content || "";
    held.text += delta.content || "";
    const scores = choice.logprobs && (choice.logprobs.content || choice.logprobs.token_logprobs);
    if (scores && scores.length) {
      const last = scores[scores.length - 1];
      answer.tokens.push({ text: held.text, logprob: typeof last === "number" ? last : last.logprob });
      held.text = "";
    }
  }
  if (event.timings) {
    const { timings, usage } = event;
    const rate = timings.predicted_per_second;
    const first = held.first ? `first after ${held.first.toFixed(0)} ms` : "the model ended its answer at once";
    answer.cost = `${usage.completion_tokens} tokens · ${rate ? `${rate.toFixed(1)} tokens/s · ` : ""}${first} · ` +
      `prompt ${usage.prompt_tokens} tokens, ${timings.cache_n} cached`;
  }
}

async function answerOne(number, at, seed, signal) {
  const turn = turns[number];
  const answer = turn.answers[at];
  const held = { text: "", first: 0 };
  const started = performance.now();
  let drawn = 0;
  const draw = () => {
    turn.boxes.forEach((box, other) => drawAnswer(box, turn, other));
    $("talk").scrollTop = $("talk").scrollHeight;
    drawn = performance.now();
  };
  const facts = models.find((one) => one.id === answer.model);
  try {
    answer.cost = facts && !facts.meta.is_loaded ? "loading the model…" : "reading the prompt…";
    draw();
    const [path, body] = requestOf(answer.model, number, at, seed);
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of readEvents(response)) {
      if (facts) facts.meta.is_loaded = true;
      take(answer, event, held);
      if (!held.first && answer.text) held.first = performance.now() - started;
      const made = answer.tokens.length;
      if (made > 1 && !event.timings) {
        answer.cost = `${made} tokens · ${(1000 * (made - 1) / (performance.now() - started - held.first)).toFixed(1)} tokens/s`;
      }
      if (performance.now() - drawn > 40) draw(); // as often as the eye can use
    }
  } catch (error) {
    if (signal.aborted) answer.cost = `${answer.tokens.length} tokens · stopped`;
    else [answer.cost, answer.error] = ["", error.message];
  }
  draw();
}

async function ask(number) {
  const turn = turns[number];
  const names = [$("model-a").value, ...($("compare").checked ? [$("model-b").value] : [])];
  turn.seed = settings.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(settings.seed);
  turn.answers = names.map((model) => ({ model, text: "", tokens: [], cost: "" }));
  stopping = new AbortController();
  notice("");
  drawAll();
  $("talk").setAttribute("aria-busy", "true");
  await Promise.all(names.map((_, at) => answerOne(number, at, turn.seed, stopping.signal)));
  $("talk").setAttribute("aria-busy", "false");
  stopping = null;
  updateButtons();
  save();
}

function send() {
  const text = $("entry").value;
  if (!text.trim() || stopping) return;
  if (editing !== null) turns = turns.slice(0, editing);
  editing = null;
  $("entry").value = "";
  turns.push({ user: text, answers: [] });
  ask(turns.length - 1);
}

// Taking it home

function download(name, kind, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function asMarkdown() {
  const system = settings.system ? [`*System:* ${settings.system}`] : [];
  const parts = turns.flatMap((turn) => [
    `**You:** ${turn.user}`,
    ...turn.answers.map((answer) => `**${answer.model}** (seed ${turn.seed}): ${answer.text}`),
  ]);
  return `${[...system, ...parts].join("\n\n")}\n`;
}

function asJson() {
  const { ...kept } = settings;
  return `${JSON.stringify({ settings: kept, turns: turns.map(({ boxes, ...turn }) => turn) }, null, 2)}\n`;
}

// Settings

function showSettings() {
  for (const name of Object.keys(DEFAULTS)) {
    if (name === "surprise") $(name).checked = settings[name];
    else $(name).value = settings[name];
  }
  $("key").value = sessionStorage.getItem("ggtool.key") || "";
}

function keepSettings() {
  for (const [name, value] of Object.entries(DEFAULTS)) {
    if (name === "surprise") settings[name] = $(name).checked;
    else if (typeof value === "number") settings[name] = $(name).value === "" || !$(name).validity.valid ? value : Number($(name).value);
    else settings[name] = $(name).value;
  }
  sessionStorage.setItem("ggtool.key", $("key").value);
  store.write("ggtool.settings", settings);
  drawAll();
  loadModels();
}

// Wiring

$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("entry").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if (stopping) stopping.abort();
  if (editing !== null) { editing = null; $("entry").value = ""; notice(""); }
});
$("stop").onclick = () => { if (stopping) stopping.abort(); };
$("again").onclick = () => ask(turns.length - 1);
$("clear").onclick = () => { turns = []; save(); drawAll(); $("entry").focus(); };
$("export-markdown").onclick = () => download("conversation.md", "text/markdown", asMarkdown());
$("export-json").onclick = () => download("conversation.json", "application/json", asJson());
$("compare").onchange = () => { $("model-b").disabled = !$("compare").checked; };
for (const id of ["model-a", "model-b"]) {
  $(id).onchange = () => store.write("ggtool.chosen", [$("model-a").value, $("model-b").value]);
}
$("open-settings").onclick = () => { showSettings(); $("settings").showModal(); };
$("settings").onclose = keepSettings;
$("reset").onclick = () => { settings = { ...DEFAULTS }; showSettings(); };

drawAll();
loadModels().then(() => $("entry").focus());
poll();
