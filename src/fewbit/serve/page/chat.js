// The chat page: keeps one conversation, streams the answers from /v1/chat/completions.

import { button, copy, make, show } from "./markdown.js";

const find = (id) => document.getElementById(id);
const [scroll, empty, messages, composer, input, send] =
  ["scroll", "empty", "messages", "composer", "input", "send"].map(find);
const [settings, system, temperature, maxTokens, key] =
  ["settings", "system", "temperature", "max-tokens", "key"].map(find);

// The conversation without the system prompt: {role: "user", parts} and {role: "assistant", content}.
// A question has several parts where earlier ones found no answer, as chats alternate.
let turns = [];
let left = null; // {turns, shown} of the chat before this one, until the next is left
let running = null; // the AbortController of the answer that is coming

// ---- The conversation on the page ----

function nearEnd() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
}

function addMessage(role) {
  empty.hidden = true;
  const message = make("article", `message ${role}`);
  message.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const text = make("div", "text");
  message.append(text);
  messages.append(message);
  return { message, text };
}

function addUser(content) {
  addMessage("user").text.textContent = content;
  toEnd();
}

function addReply() {
  const reply = { ...addMessage("model"), foot: make("div", "foot"), numbers: make("span", "numbers") };
  reply.message.classList.add("busy");
  messages.setAttribute("aria-busy", "true");
  reply.foot.append(reply.numbers);
  reply.message.append(reply.foot);
  toEnd();
  return reply;
}

function numbers({ tokens, exact, first, last, start }) {
  if (!tokens) return "";
  const count = `${exact ? "" : "at least "}${tokens} token${tokens === 1 ? "" : "s"}`;
  const rate = tokens > 1 && last > first ? `${(1000 * (tokens - 1) / (last - first)).toFixed(1)} tokens/s` : "";
  const wait = first ? `${((first - start) / 1000).toFixed(2)} s to the first` : "";
  return [[count, rate].filter(Boolean).join(exact ? " \u00b7 " : ", "), wait].filter(Boolean).join(" \u00b7 ");
}

// ---- Talking to the server ----

function headers() {
  const fields = { "content-type": "application/json" };
  if (key.value) fields.authorization = `Bearer ${key.value}`;
  return fields;
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function request(talk, signal) {
  const said = talk.map(({ role, content, parts }) => ({ role, content: content ?? parts.join("\n\n") }));
  const body = {
    messages: [...(system.value.trim() ? [{ role: "system", content: system.value }] : []), ...said],
    temperature: Number(temperature.value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (Number(maxTokens.value) >= 1) body.max_tokens = Math.floor(Number(maxTokens.value));
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  throw Object.assign(new Error(await refusal(response)), { refused: response.status < 500 });
}

// Adds an event to what has come so far; whether there is more text.
function take(event, got) {
  if (event.usage) Object.assign(got, { tokens: event.usage.completion_tokens, exact: true });
  const choice = event.choices[0];
  got.reason = choice?.finish_reason ?? got.reason;
  if (!choice?.delta.content) return false;
  got.last = performance.now();
  got.first ||= got.last;
  got.tokens += 1; // until the end tells, which it does not if stopped: a chunk has a token or more
  got.content += choice.delta.content;
  return true;
}

async function answer() {
  const control = new AbortController();
  const talk = turns; // a new chat may begin meanwhile
  const reply = addReply();
  const got = { content: "", tokens: 0, exact: false, reason: "", first: 0, last: 0, start: performance.now() };
  let blocks = [];
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    const follow = nearEnd();
    blocks = show(got.content, reply.text, blocks);
    reply.numbers.textContent = numbers(got);
    if (follow) toEnd();
  };
  let problem = null;
  running = control;
  update();
  try {
    for await (const event of events(await request(talk, control.signal))) {
      if (take(event, got)) drawing ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (!control.signal.aborted) problem = error;
  }
  cancelAnimationFrame(drawing);
  draw();
  const follow = reply.message.isConnected && nearEnd();
  if (running === control) {
    running = null;
    messages.setAttribute("aria-busy", "false");
  }
  finish(reply, got, talk, problem, control.signal.aborted);
  if (problem || find("model").classList.contains("off")) connect();
  update();
  if (follow) toEnd();
}

function finish({ message, numbers: shown, foot }, { content, reason }, talk, problem, stopped) {
  message.classList.remove("busy");
  if (stopped) shown.textContent += `${shown.textContent ? " \u00b7 " : ""}stopped`;
  if (reason === "length") shown.textContent += " \u00b7 the limit of tokens was reached";
  if (problem?.refused) {
    takeBack(message, talk);
  } else {
    const again = button("Try again", () => retry(message, content));
    again.classList.add("again");
    foot.prepend(again);
  }
  if (content) {
    talk.push({ role: "assistant", content });
    foot.prepend(button("Copy", (element) => copy(content, element)));
  }
  if (problem) {
    const words = problem.message;
    const error = make("div", "error", `${words[0].toUpperCase()}${words.slice(1)}.`);
    error.setAttribute("role", "alert");
    message.insertBefore(error, foot);
  }
}

// What the server refuses is no part of the conversation, or it would refuse all that follows as well.
function takeBack(message, talk) {
  message.classList.add("refused");
  message.previousElementSibling.remove();
  const { parts } = talk.at(-1);
  const content = parts.pop();
  if (!parts.length) talk.pop();
  input.value = [content, input.value].filter(Boolean).join("\n\n");
}

function retry(message, content) {
  if (running) return;
  if (content) turns.pop();
  message.remove();
  answer();
  input.focus(); // the button that had the focus is gone
}

function ask(content) {
  if (running || !content.trim()) return;
  for (const old of messages.querySelectorAll(".again, .refused")) old.remove();
  if (turns.at(-1)?.role === "user") turns.at(-1).parts.push(content);
  else turns.push({ role: "user", parts: [content] });
  addUser(content);
  answer();
}

function newChat() {
  running?.abort();
  running = null;
  if (turns.length) left = { turns, shown: [...messages.children] };
  begin([], []);
}

function begin(talk, shown) {
  turns = talk;
  messages.replaceChildren(...shown);
  messages.setAttribute("aria-busy", "false");
  empty.hidden = shown.length > 0;
  find("back").hidden = !left;
  update();
  toEnd();
  input.focus();
}

function goBack() {
  const { turns: talk, shown } = left;
  left = null;
  begin(talk, shown);
}

// ---- Controls ----

function update() {
  composer.classList.toggle("working", running !== null);
  send.disabled = running === null && !input.value.trim();
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function askForKey() {
  find("key-row").hidden = false;
  if (!settings.open) settings.showModal();
  key.focus();
}

function remember() {
  find("temperature-value").textContent = Number(temperature.value).toFixed(2);
  try {
    localStorage.setItem("fewbit", JSON.stringify([system.value, temperature.value, maxTokens.value]));
    sessionStorage.setItem("fewbit-key", key.value);
  } catch {
    // Without storage the settings last as long as the page.
  }
}

function recall() {
  temperature.value = "0.7";
  try {
    const stored = JSON.parse(localStorage.getItem("fewbit"));
    if (stored) [system.value, temperature.value, maxTokens.value] = stored;
    key.value = sessionStorage.getItem("fewbit-key") ?? "";
  } catch {
    // Nothing stored, or nothing that can be read.
  }
  remember();
}

async function connect() {
  const name = find("model");
  try {
    const health = await (await fetch("health")).json();
    name.textContent = name.title = health.model;
    name.classList.toggle("off", health.status !== "ok");
    document.title = `${health.model} \u00b7 fewbit`;
    if (health.key_required) {
      find("key-row").hidden = false;
      if (!key.value) askForKey();
    }
  } catch {
    name.textContent = "no connection";
    name.classList.add("off");
  }
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const content = input.value;
  input.value = "";
  ask(content);
  update();
  input.focus();
});

input.addEventListener("input", update);

// The key belongs to an input method. Safari ends the composition before it sends the Enter that did so: that is 229.
const composing = (event) => event.isComposing || event.keyCode === 229;

input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
  event.preventDefault();
  if (!running) composer.requestSubmit();
});

// On a Mac Option and a letter type a character, elsewhere Control, Alt and a letter do.
const MAC = /^(Mac|iP)/.test(navigator.platform);
if (MAC) {
  for (const element of [find("new"), find("open-settings")]) {
    element.title = element.title.replace("Alt+", "Control+Option+");
    element.setAttribute("aria-keyshortcuts", `Control+${element.getAttribute("aria-keyshortcuts")}`);
  }
}

document.addEventListener("keydown", (event) => {
  if (composing(event)) return;
  if (event.key === "Escape" && running && !settings.open) running.abort();
  if (!event.altKey || event.ctrlKey !== MAC || event.metaKey) return;
  if (event.code === "KeyN" && !settings.open) newChat();
  else if (event.code === "KeyS") settings.open ? settings.close() : settings.showModal();
  else return;
  event.preventDefault();
});

for (const idea of document.querySelectorAll(".idea")) idea.addEventListener("click", () => ask(idea.textContent));
for (const field of [system, temperature, maxTokens, key]) field.addEventListener("input", remember);
find("new").addEventListener("click", newChat);
find("back").addEventListener("click", goBack);
find("open-settings").addEventListener("click", () => settings.showModal());
settings.addEventListener("close", () => input.focus());

function beside(event) {
  const { left: x, right, top: y, bottom } = settings.getBoundingClientRect();
  return event.clientX < x || event.clientX > right || event.clientY < y || event.clientY > bottom;
}

// A click beside the dialog closes it; dragging a selection out of it ends there, too, but does not begin there.
let pressedBeside = false;
settings.addEventListener("pointerdown", (event) => { pressedBeside = beside(event); });
settings.addEventListener("click", (event) => {
  if (event.target === settings && pressedBeside && beside(event)) settings.close();
});

recall();
update();
connect();
