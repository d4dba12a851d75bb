// The page: asks the service, plays what it says, shows what it knows.

import { Spectrogram } from "/static/spectrogram.js";
import { Stream, WavReader } from "/static/sound.js";

const $ = (id) => document.getElementById(id);
const canvas = $("spectrogram");
let speaking = null; // { abort, stream } while something is said
let model = "lina";

/** Asks the service; what it refuses becomes an Error with its words. */
async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) $("token-form").hidden = false;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The service answered ${answer.status}`);
}

function tell(id, text, bad = false) {
  $(id).textContent = text;
  $(id).classList.toggle("bad", bad);
}

async function start() {
  try {
    const health = await (await ask("/healthz")).json();
    tell("service", `ready · ${health.codec} · ${health.rate / 1000} kHz`);
    $("service").className = "up";
    $("text").maxLength = health.longest_text;
    $("text").oninput();
    $("token-form").hidden = !health.tokens || Boolean(sessionStorage.getItem("token"));
    if (!health.tokens || sessionStorage.getItem("token")) {
      model = (await (await ask("/v1/models")).json()).data[0].id;
      await showVoices();
    }
  } catch (error) {
    tell("service", error.message);
    $("service").className = "down";
  }
}

/** Every voice, page after page. */
async function allVoices() {
  const data = [];
  for (let after = ""; ; ) {
    const page = await (await ask(`/v1/voices?limit=1000&after=${encodeURIComponent(after)}`)).json();
    data.push(...page.data);
    if (!page.has_more) return data;
    after = page.last_id;
  }
}

async function showVoices(chosen = $("voice").value) {
  const data = await allVoices();
  const ready = data.filter((voice) => voice.status === "ready");
  $("voice").replaceChildren(...ready.map(({ id }) => new Option(id === "default" ? "default (the model’s own)" : id, id)));
  $("voice").value = ready.some(({ id }) => id === chosen) ? chosen : "default";
  $("voices").replaceChildren(...data.map(voiceItem));
}

function voiceItem(voice) {
  const item = document.createElement("li");
  const about = Object.assign(document.createElement("div"), { className: "about" });
  const name = Object.assign(document.createElement("strong"), { textContent: voice.id });
  const detail = document.createElement("span");
  detail.textContent = describe(voice);
  detail.classList.toggle("bad", voice.status === "failed");
  about.append(name, detail);
  item.append(about);
  if (!voice.shared) {
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Delete" });
    remove.setAttribute("aria-label", `Delete voice ${voice.id}`);
    remove.onclick = async () => {
      if (!confirm(`Delete voice “${voice.id}”? Nobody can speak with it from then on.`)) return;
      remove.disabled = true;
      try {
        await ask(`/v1/voices/${encodeURIComponent(voice.id)}`, { method: "DELETE" });
        tell("changed", `Voice “${voice.id}” is deleted`);
        await showVoices();
      } catch (error) {
        tell("changed", `Voice “${voice.id}”: ${error.message}`, true);
      } finally {
        remove.disabled = false;
      }
    };
    item.append(remove);
  }
  return item;
}

function describe(voice) {
  if (voice.id === "default") return "the model’s own voice";
  if (voice.status === "failed") return voice.error.message;
  if (voice.status !== "ready") return "being made";
  return `${voice.consent.who} · ${voice.shared ? "shared" : "yours"}`;
}

$("text").oninput = () => {
  const { value, maxLength } = $("text");
  $("count").textContent = maxLength < 0 ? `${value.length} characters` : `${value.length} of ${maxLength} characters`;
};

$("token-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  $("token").value = "";
  start();
};

$("speak").onsubmit = async (event) => {
  event.preventDefault();
  stop();
  const streamed = new FormData($("speak")).get("way") === "stream";
  const abort = new AbortController();
  const mine = (speaking = { abort, stream: null });
  $("stop").disabled = false;
  $("player").hidden = $("download").hidden = true;
  tell("said", "Thinking …");
  const asked = performance.now();
  try {
    const answer = await ask("/v1/audio/speech", {
      method: "POST",
      signal: abort.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model,
        input: $("text").value,
        voice: $("voice").value,
        seed: Number($("seed").value) || 0,
        response_format: "wav",
        stream: streamed,
      }),
    });
    const report = JSON.parse(answer.headers.get("X-Lina-Report") ?? "null");
    const { seconds, wav } = await listen(answer, mine, streamed, asked);
    await show(seconds, wav, report, streamed);
  } catch (error) {
    if (error.name === "AbortError") tell("said", "Stopped");
    else tell("said", error.message, true);
  } finally {
    // What has come is still being heard
    const idle = () => speaking === mine && ($("stop").disabled = true);
    if (mine.stream?.sources.size) mine.stream.onidle = idle;
    else idle();
  }
};

/** Reads an answer to its end, draws it, and plays it meanwhile if wanted. */
async function listen(answer, mine, aloud, asked) {
  const reader = answer.body.getReader();
  const wav = new WavReader();
  let spectrogram = null;
  let first = null;
  let drawn = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const part = wav.read(value);
    if (!part.length) continue;
    first ??= performance.now() - asked;
    spectrogram ??= new Spectrogram(canvas, wav.rate);
    spectrogram.add(part);
    if (aloud) (mine.stream ??= new Stream(wav.rate)).add(part);
    tell("said", `${(spectrogram.length / wav.rate).toFixed(1)} s said, the first after ${(first / 1000).toFixed(2)} s`);
    if (performance.now() - drawn > 250) {
      spectrogram.draw();
      drawn = performance.now();
    }
  }
  const seconds = spectrogram ? spectrogram.length / wav.rate : 0;
  spectrogram?.end();
  spectrogram?.draw();
  return { seconds, wav };
}

async function show(seconds, wav, report, played) {
  canvas.setAttribute("aria-label", `Spectrogram of ${seconds.toFixed(1)} seconds of speech, up to 8 kilohertz`);
  $("to").textContent = `${seconds.toFixed(1)} s`;
  if ($("player").src) URL.revokeObjectURL($("player").src);
  $("player").src = $("file").href = URL.createObjectURL(wav.file());
  $("player").hidden = $("download").hidden = false;
  const faults = report?.faults.length ? `faults: ${report.faults.join(", ")}` : "no faults";
  $("report").textContent = report ? `${counted(report.pieces, "sentence")}, ${counted(report.attempts, "attempt")}, ${faults}` : "";
  if (!played) await $("player").play().catch(() => tell("said", "Press play to hear it"));
}

const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

function stop() {
  speaking?.abort.abort();
  speaking?.stream?.stop();
  speaking = null;
  $("stop").disabled = true;
}
$("stop").onclick = stop;

// --- making a voice

const recordings = []; // { file, line: its place in the list, text: the input of its transcript }

async function take(files) {
  const audio = [...files].filter((file) => !file.name.endsWith(".txt"));
  const texts = new Map();
  for (const file of files) if (file.name.endsWith(".txt")) texts.set(stem(file), (await file.text()).trim());
  for (const file of audio) recordings.push({ file, ...item(file, texts.get(stem(file)) ?? "") });
  for (const { file, text } of recordings) text.value ||= texts.get(stem(file)) ?? "";
}

const stem = (file) => file.name.replace(/\.[^.]*$/, "");

function item(file, said) {
  const line = document.createElement("li");
  const name = Object.assign(document.createElement("span"), { className: "file", textContent: file.name, title: file.name });
  const text = Object.assign(document.createElement("input"), { value: said, required: true, placeholder: "What is said in it" });
  text.setAttribute("aria-label", `What is said in ${file.name}`);
  const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove ${file.name}`);
  remove.onclick = () => drop((recording) => recording.line === line);
  line.append(name, text, remove);
  $("list").append(line);
  return { line, text };
}

/** Takes recordings off the list. */
function drop(chosen) {
  for (const recording of recordings.filter(chosen)) {
    recordings.splice(recordings.indexOf(recording), 1);
    recording.line.remove();
  }
}

$("samples").onchange = () => {
  take($("samples").files);
  $("samples").value = "";
};
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files);
});

$("enroll").onsubmit = async (event) => {
  event.preventDefault();
  if (!recordings.length) return tell("enrolled", "Drop at least one recording first", true);
  const id = $("name").value;
  const sent = [...recordings];
  const told = ["name", "who", "scope"].map((field) => [field, $(field).value]);
  const form = new FormData();
  form.set("id", id);
  form.set("consent_who", $("who").value);
  form.set("consent_when", new Date().toISOString().slice(0, 10));
  form.set("consent_scope", $("scope").value);
  for (const { file, text } of sent) {
    form.append("samples", file);
    form.append("transcripts", text.value);
  }
  $("make").disabled = true;
  try {
    tell("enrolled", "Sending …");
    await ask("/v1/voices", { method: "POST", body: form });
    await follow(id);
    // What was added meanwhile is for another voice, which needs a consent of its own.
    drop((recording) => sent.includes(recording));
    for (const [field, value] of told) if ($(field).value === value) $(field).value = "";
    $("consent").checked = false;
  } catch (error) {
    tell("enrolled", error.message, true);
  } finally {
    $("make").disabled = false;
    $("progress").hidden = true;
  }
};

/** Watches a voice being made, to its end. */
async function follow(id) {
  $("progress").hidden = false;
  await showVoices();
  for (;;) {
    const voice = await (await ask(`/v1/voices/${encodeURIComponent(id)}`)).json();
    if (voice.status === "failed") throw new Error(voice.error.message);
    if (voice.status === "ready") break;
    const { state, place, steps, of } = voice.progress ?? {};
    if (steps) {
      $("progress").value = steps / of;
      tell("enrolled", `Step ${steps} of at most ${of}`);
    } else {
      $("progress").removeAttribute("value");
      tell("enrolled", state === "waiting" && place > 1 ? `Number ${place} in the queue` : "Listening to the recordings …");
    }
    await new Promise((done) => setTimeout(done, 500));
  }
  await showVoices(id);
  tell("enrolled", `Voice “${id}” is there: it is chosen above`);
}

$("text").oninput();
new Spectrogram(canvas, 24000).draw();
start();
