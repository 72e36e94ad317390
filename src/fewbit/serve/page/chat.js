// The chat page: keeps one conversation, streams the answers from /v1/chat/completions.

import { button, copy, make, show } from "./markdown.js";

const find = (id) => document.getElementById(id);
const [scroll, empty, messages, composer, input, send] =
  ["scroll", "empty", "messages", "composer", "input", "send"].map(find);
const [settings, system, temperature, maxTokens, key] =
  ["settings", "system", "temperature", "max-tokens", "key"].map(find);

let model = "";
let turns = []; // {role, content} of the conversation, without the system prompt
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

function numbers(tokens, first, last, start) {
  const rate = tokens > 1 && last > first ? `${(1000 * (tokens - 1) / (last - first)).toFixed(1)} tokens/s` : "";
  const wait = first ? `${((first - start) / 1000).toFixed(2)} s to the first` : "";
  return [`${tokens} token${tokens === 1 ? "" : "s"}`, rate, wait].filter(Boolean).join(" \u00b7 ");
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

async function request(signal) {
  const body = {
    model,
    messages: [...(system.value.trim() ? [{ role: "system", content: system.value }] : []), ...turns],
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
  throw new Error(await refusal(response));
}

async function answer() {
  const control = new AbortController();
  running = control;
  update();
  const { message, text } = addMessage("model");
  message.classList.add("busy");
  messages.setAttribute("aria-busy", "true");
  const foot = make("div", "foot");
  const shown = make("span", "numbers");
  foot.append(shown);
  message.append(foot);
  toEnd();

  let content = "";
  let tokens = 0;
  let reason = "";
  let problem = "";
  let first = 0;
  let last = 0;
  let blocks = [];
  let drawing = 0;
  const start = performance.now();
  const draw = () => {
    drawing = 0;
    const follow = nearEnd();
    blocks = show(content, text, blocks);
    shown.textContent = tokens ? numbers(tokens, first, last, start) : "";
    if (follow) toEnd();
  };
  try {
    const response = await request(control.signal);
    for await (const event of events(response)) {
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      last = performance.now();
      first ||= last;
      tokens += 1;
      content += choice.delta.content;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
  }
  cancelAnimationFrame(drawing);
  if (running !== control) return; // a new chat has begun
  running = null;
  message.classList.remove("busy");
  messages.setAttribute("aria-busy", "false");
  const follow = nearEnd();
  draw();
  if (control.signal.aborted) shown.textContent += `${tokens ? " \u00b7 " : ""}stopped`;
  if (reason === "length") shown.textContent += " \u00b7 the limit of tokens was reached";
  const again = button("Try again", () => retry(message, content));
  again.classList.add("again");
  foot.prepend(again);
  if (content) {
    turns.push({ role: "assistant", content });
    foot.prepend(button("Copy", (element) => copy(content, element)));
  }
  if (problem) {
    const error = make("div", "error", `${problem[0].toUpperCase()}${problem.slice(1)}.`);
    error.setAttribute("role", "alert");
    message.insertBefore(error, foot);
  }
  update();
  if (follow) toEnd();
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
  for (const old of messages.querySelectorAll(".again")) old.remove();
  // After a failure there is a question without an answer; chats alternate.
  if (turns.at(-1)?.role === "user") turns.at(-1).content += `\n\n${content}`;
  else turns.push({ role: "user", content });
  addUser(content);
  answer();
}

function newChat() {
  running?.abort();
  running = null;
  turns = [];
  messages.replaceChildren();
  messages.setAttribute("aria-busy", "false");
  empty.hidden = false;
  update();
  input.focus();
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
    model = health.model;
    name.textContent = model;
    name.title = model;
    name.classList.toggle("off", health.status !== "ok");
    document.title = `${model} \u00b7 fewbit`;
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
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) composer.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !settings.open) running.abort();
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.code === "KeyN") newChat();
  else if (event.code === "KeyS") settings.open ? settings.close() : settings.showModal();
  else return;
  event.preventDefault();
});

for (const idea of document.querySelectorAll(".idea")) idea.addEventListener("click", () => ask(idea.textContent));
for (const field of [system, temperature, maxTokens, key]) field.addEventListener("input", remember);
find("new").addEventListener("click", newChat);
find("open-settings").addEventListener("click", () => settings.showModal());
settings.addEventListener("close", () => input.focus());
settings.addEventListener("click", (event) => {
  if (event.target === settings) settings.close(); // beside the dialog
});

recall();
update();
connect();
