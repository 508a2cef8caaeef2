// The page at /: asks the server's own endpoints, shows what comes, and measures it. Texts go in as text, never as HTML.
const $ = (id) => document.getElementById(id);
const LATENCIES = {
  ttft_ms: "First token", tpot_ms: "Each further token", e2e_ms: "Whole answer",
  score_ms: "Scores of all items", encode_ms: "Vectors or labels",
};
const seen = Object.fromEntries(Object.keys(LATENCIES).map((name) => [name, []]));
let facts;
let running = null;

const shown = (ms) => `${ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0)} ms`;
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};
const lines = (id) => $(id).value.split("\n").filter((line) => line !== "");

function tell(id, text, bad = false) {
  $(id).textContent = text;
  $(id).classList.toggle("bad", bad);
}

function cell(text, className = "", tag = "td") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells);
  return made;
}

// A page's few requests say nothing about a 99th percentile, so every limit is held against the last request alone.
function verdict(name, last) {
  const made = document.createElement("td");
  for (const { metric, limit } of facts.budget.filter((each) => each.metric.startsWith(`${name}_p`))) {
    const within = last <= limit;
    const part = document.createElement("div");
    part.className = within ? "within" : "beyond";
    part.textContent = `${within ? "within" : "beyond"} ${metric} ≤ ${limit}`;
    made.append(part);
  }
  if (!made.childNodes.length) made.textContent = "none set";
  return made;
}

function measured(name, ms) {
  seen[name].push(ms);
  const rows = Object.entries(seen).filter(([, values]) => values.length).map(([each, values]) => {
    const head = cell(LATENCIES[each], "", "th");
    head.scope = "row";
    const last = values.at(-1);
    return row(head, cell(shown(last), "number"), cell(shown(median(values)), "number"),
      cell(String(values.length), "number"), verdict(each, last));
  });
  $("latency").tBodies[0].replaceChildren(...rows);
}

function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function answerOf(response) {
  const text = await response.text();
  let body;
  try { body = JSON.parse(text); } catch { throw new Error(`The server answered ${response.status} without a reason.`); }
  if (!response.ok) throw new Error(body.error.message);
  return body;
}

// The data of each server-sent event, whatever pieces the network cuts them into.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function pieceOf(text) {
  const body = JSON.parse(text);
  if (body.error) throw new Error(body.error.message);
  const choice = body.choices[0];
  return { text: (facts.chat ? choice?.delta?.content : choice?.text) ?? "", usage: body.usage, reason: choice?.finish_reason };
}

async function stream(response, began) {
  let first = null, last = began, usage = null, reason = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const piece = pieceOf(data);
    usage = piece.usage ?? usage;
    reason = piece.reason ?? reason;
    if (!piece.text) continue;
    last = performance.now();
    if (first === null) measured("ttft_ms", (first = last) - began);
    $("answer").append(piece.text);
  }
  if (first === null) return "The answer is empty.";
  measured("e2e_ms", last - began);
  if (usage?.completion_tokens > 1) measured("tpot_ms", (last - first) / (usage.completion_tokens - 1));
  const ended = reason === "length" ? "the limit of tokens" : "the model's own end";
  return `${usage?.completion_tokens ?? "?"} tokens behind ${usage?.prompt_tokens ?? "?"} of the prompt, ended by ${ended}.`;
}

async function generate(event) {
  event.preventDefault();
  running?.abort();
  const own = running = new AbortController();
  const prompt = $("prompt").value;
  const input = facts.chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = {
    model: facts.model, ...input, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
  };
  $("answer").textContent = "";
  $("answer").classList.add("busy");
  $("stop").disabled = false;
  tell("generate-note", "Generating …");
  try {
    const began = performance.now();
    const response = await ask(facts.chat ? "/v1/chat/completions" : "/v1/completions", body, own.signal);
    if (!response.ok) await answerOf(response);
    tell("generate-note", await stream(response, began));
  } catch (error) {
    if (running === own) tell("generate-note", own.signal.aborted ? "Stopped." : error.message, !own.signal.aborted);
  } finally {
    if (running === own) {
      $("answer").classList.remove("busy");
      $("stop").disabled = true;
    }
  }
}

async function score(event) {
  event.preventDefault();
  tell("score-note", "Scoring …");
  const items = lines("items");
  try {
    const began = performance.now();
    const { scores } = await answerOf(await ask("/score", { prefix: $("prefix").value, items }));
    measured("score_ms", performance.now() - began);
    const order = items.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
    $("scores").tBodies[0].replaceChildren(...order.map((i) => row(cell(items[i]), cell(scores[i].toFixed(4), "number"))));
    $("scores").hidden = false;
    tell("score-note", `${items.length} items scored.`);
  } catch (error) {
    tell("score-note", error.message, true);
  }
}

function described(body) {
  if (body.data[0].embedding) {
    const start = (vector) => vector.slice(0, 6).map((value) => value.toFixed(4)).join(", ");
    return body.data.map(({ embedding }) => `[${start(embedding)}, …]  ${embedding.length} dimensions`).join("\n");
  }
  const labels = (each) => each.tokens?.map((token) => token.label).join(" ") ?? `${each.label}  ${each.score.toFixed(4)}`;
  return body.data.map(labels).join("\n");
}

async function runTexts(event) {
  event.preventDefault();
  tell("texts-note", "Running …");
  const embeds = facts.tasks.includes("embed");
  try {
    const began = performance.now();
    const body = await answerOf(await ask(embeds ? "/v1/embeddings" : "/classify", { model: facts.model, input: lines("text") }));
    measured("encode_ms", performance.now() - began);
    $("found").textContent = described(body);
    $("found").hidden = false;
    tell("texts-note", `${body.data.length} texts, ${body.usage.prompt_tokens} tokens.`);
  } catch (error) {
    tell("texts-note", error.message, true);
  }
}

async function watch() {
  const words = { ready: "Ready.", loading: "Loading the model …", draining: "Stopping.", broken: "Broken: see the server's log." };
  try {
    const { state } = await (await fetch("/health")).json();
    tell("state", words[state] ?? state, state === "broken");
    $("state").classList.toggle("well", state === "ready");
  } catch {
    tell("state", "The server does not answer.", true);
    $("state").classList.remove("well");
  }
  setTimeout(watch, document.hidden ? 30000 : 5000);
}

async function begin() {
  facts = await (await fetch("/page.json")).json();
  $("generate").hidden = !facts.tasks.includes("generate");
  $("score").hidden = !facts.tasks.includes("score");
  $("texts").hidden = !facts.tasks.some((task) => task === "embed" || task === "classify");
  $("key-form").hidden = !facts.needs_key;
  $("key-form").addEventListener("submit", (event) => event.preventDefault());
  $("prompt-label").textContent = facts.chat ? "Message" : "Prompt";
  $("max-tokens").max = facts.max_tokens;
  $("max-tokens").value = Math.min(64, facts.max_tokens);
  $("generate-form").addEventListener("submit", generate);
  $("score-form").addEventListener("submit", score);
  $("texts-form").addEventListener("submit", runTexts);
  $("stop").addEventListener("click", () => running?.abort());
  watch();
}

begin();
