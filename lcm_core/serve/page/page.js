// The canvas on the left is sent after every change; the server answers with a picture of the newest state.
import { canvas, choose, clear, lay, resize, shrunk, start, takeBack, tool } from "./drawing.js";

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const SMALL = 256;
const LEAST_PAUSE = 50; // milliseconds between messages: more of them than pictures would only take from the painting
const MOST_PAUSE = 150; // a slow model must not wait for the last stroke
const SHARE = 0.8; // of the time in which the server paints another picture, between messages
const FRESH = 3000; // milliseconds over which pictures per second are counted
const COLOURS = ["#d92b2b", "#f08c1a", "#f7d23e", "#3f9b43", "#2d6cdf", "#7a3fb0", "#6b4423", "#1d1d1f", "#ffffff"];
const STRIP = 6; // other seeds
const FRAMES = 24; // of a loop
const SETTINGS = [
  "prompt", "second_prompt", "blend", "negative_prompt", "nag", "strength", "steps", "guidance", "seed", "model", "lora", "lora_strength",
];
const NUMBERS = new Set(["blend", "nag", "strength", "steps", "guidance", "seed", "lora_strength"]);

let socket = null;
let choices = { models: [] };
let dirty = false;
let frame = 0;
let wanted = SMALL; // side of the drawing that is sent
let pause = LEAST_PAUSE;
let sent = -LEAST_PAUSE; // when the last message went out
let number = 0; // of the last change
let since = new Map(); // number of a change -> when it was made
let shown = []; // when pictures were shown
let header = null;

// --- talking to the server -----------------------------------------------------------------------------------------

function openSocket() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const opened = new WebSocket(`${scheme}://${location.host}/live${token ? `?token=${encodeURIComponent(token)}` : ""}`);
  opened.binaryType = "blob";
  return opened;
}

function connect() {
  socket = openSocket();
  socket.onopen = () => { say("ready"); changed(); };
  socket.onclose = () => { say("the server is away; trying again", true); since.clear(); setTimeout(connect, 1000); };
  socket.onmessage = (event) => (typeof event.data === "string" ? answered(JSON.parse(event.data)) : show(event.data));
}

function changed() {
  dirty = true;
  since.set(++number, performance.now());
  canvas.dataset.id = number;
  if (!frame) frame = requestAnimationFrame(send);
}

function send() {
  frame = 0;
  if (!dirty || !socket || socket.readyState !== WebSocket.OPEN) return;
  const now = performance.now();
  if (socket.bufferedAmount > 0 || now - sent < pause) { frame = requestAnimationFrame(send); return; }
  dirty = false;
  sent = now;
  socket.send(JSON.stringify(state()));
}

function state() {
  const message = { id: number, image: shrunk(wanted), draft: tool.pressed }; // a draft while the pen is down
  for (const name of SETTINGS) message[name] = NUMBERS.has(name) ? Number($(name).value) : $(name).value;
  if (!message.lora) delete message.lora_strength;
  return message;
}

// What takes longer than a picture has a connection of its own, so that no stroke replaces it.
function ask(more, answers) {
  return new Promise((resolve, reject) => {
    const found = [];
    let head = null;
    const line = openSocket();
    line.onopen = () => line.send(JSON.stringify({ ...state(), ...more }));
    line.onclose = () => reject(new Error("the server is away"));
    line.onmessage = ({ data }) => {
      if (typeof data === "string") {
        head = JSON.parse(data);
        if (head.error) reject(new Error(head.error));
        else return;
      } else if (found.push({ blob: data, seed: head.seed }) < answers) return;
      resolve(found);
      line.close();
    };
  });
}

async function busy(button, work) {
  if (button.ariaBusy === "true") return;
  button.ariaBusy = "true";
  await work().catch((error) => say(error.message, true));
  button.ariaBusy = "false";
}

async function showSeeds() {
  const first = crypto.getRandomValues(new Uint32Array(1))[0] - STRIP;
  const others = await ask({ seed: Math.max(first, 0), count: STRIP }, STRIP);
  for (const image of $("strip").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("strip").replaceChildren(...others.map(({ blob, seed }) => {
    const [button, image, words] = ["button", "img", "span"].map((name) => document.createElement(name));
    image.src = URL.createObjectURL(blob);
    image.alt = `seed ${seed}`;
    words.textContent = seed;
    button.append(image, words);
    button.onclick = () => { $("seed").value = seed; changed(); };
    return button;
  }));
}

async function showLoop() {
  const [{ blob, seed }] = await ask({ frames: FRAMES }, 1);
  const [image, link] = [$("loop").querySelector("img"), $("loop").querySelector("a")];
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = link.href = URL.createObjectURL(blob);
  link.download = `${slug($("prompt").value)}-${seed}.webp`;
  $("loop").hidden = false;
}

function answered(answer) {
  if (answer.error) say(answer.error, true);
  header = answer.error ? null : answer;
}

async function show(blob) {
  const { id, seed, side, every } = header;
  wanted = Math.min(side, SMALL); // a small model's picture is drawn, sent and read in less time
  pause = Math.min(Math.max(LEAST_PAUSE, SHARE * 1000 * every), MOST_PAUSE);
  const address = URL.createObjectURL(blob);
  const picture = $("picture");
  const old = picture.src;
  picture.src = address;
  await picture.decode().catch(() => {});
  if (old) URL.revokeObjectURL(old);
  $("download").href = address;
  $("download").download = `${slug($("prompt").value)}-${seed}.png`;
  count(id);
}

function count(id) {
  const now = performance.now();
  const took = now - (since.get(id) ?? now);
  for (const key of since.keys()) if (key <= id) since.delete(key);
  shown = [...shown.filter((time) => now - time < FRESH), now];
  const rate = shown.length > 1 ? ((shown.length - 1) * 1000) / (now - shown[0]) : 0;
  $("numbers").textContent = `${Math.round(took)} ms` + (rate >= 1 ? `, ${rate.toFixed(1)} pictures a second` : "");
  $("picture").dataset.id = id;
  $("picture").dataset.milliseconds = took;
  say("ready");
}

function say(text, isError = false) {
  if ($("status").textContent === text) return;
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

const slug = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "picture";

async function loadChoices() {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch("choices", { headers });
  if (!response.ok) { say((await response.json()).detail, true); return; }
  choices = await response.json();
  $("model").replaceChildren(...choices.models.map(({ name }) => new Option(name, name, false, name === choices.usual)));
  $("steps").max = Math.min(choices.steps, 25);
  loadLoras();
}

function loadLoras() {
  const model = choices.models.find(({ name }) => name === $("model").value) ?? { loras: [] };
  const kept = $("lora").value;
  $("lora").replaceChildren(new Option("none", ""), ...model.loras.map((name) => new Option(name)));
  if (model.loras.includes(kept)) $("lora").value = kept;
}

// --- controls ------------------------------------------------------------------------------------------------------

function anotherSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  changed();
}

function label(input) {
  const output = document.querySelector(`output[for="${input.id}"]`);
  if (output) output.value = input.value;
}

for (const colour of COLOURS) {
  const button = document.createElement("button");
  button.style.background = colour;
  button.title = button.ariaLabel = colour;
  button.onclick = () => { $("colour").value = colour; choose("brush"); };
  $("palette").append(button);
}
for (const name of SETTINGS) {
  label($(name));
  $(name).addEventListener("input", () => { label($(name)); changed(); });
}
$("model").addEventListener("input", loadLoras, { capture: true }); // before the message is put together
$("colour").oninput = () => choose("brush");
$("brush").onclick = () => choose("brush");
$("eraser").onclick = () => choose("eraser");
$("undo").onclick = takeBack;
$("clear").onclick = clear;
$("random").onclick = anotherSeed;
$("seeds").onclick = () => busy($("seeds"), showSeeds);
$("travel").onclick = () => busy($("travel"), showLoop);
$("open").onchange = (event) => { if (event.target.files[0]) lay(event.target.files[0]); event.target.value = ""; };
$("reuse").onclick = async () => { if ($("picture").src) lay(await (await fetch($("picture").src)).blob()); };

const KEYS = { b: () => choose("brush"), e: () => choose("eraser"), r: anotherSeed, "[": () => resize(0.8), "]": () => resize(1.25) };
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=text], input[type=number], select");
  if (typing || event.altKey || event.metaKey && event.key !== "z") return;
  if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); takeBack(); return; }
  if (!event.ctrlKey) KEYS[event.key.toLowerCase()]?.();
});

start(changed, say);
loadChoices().then(connect);
