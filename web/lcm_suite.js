// The panel of LCM Distiller: loss curve, the same picture before and after, time left, stop and save.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "lcm_suite.distiller";
const WORDS = {
  en: { step: "step", of: "of", left: "left", stop: "Stop and keep", save: "Save now", saved: "saved at", idle: "Run to see it learn" },
  ko: { step: "스텝", of: "/", left: "남음", stop: "중단하고 보관", save: "지금 저장", saved: "저장됨:", idle: "실행하면 학습이 보입니다" },
  ja: { step: "ステップ", of: "/", left: "残り", stop: "中断して保持", save: "今すぐ保存", saved: "保存済み:", idle: "実行すると学習の様子が見えます" },
  zh: { step: "步", of: "/", left: "剩余", stop: "停止并保留", save: "立即保存", saved: "已保存:", idle: "运行后可看到学习过程" },
};

function words() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? app.ui?.settings?.getSettingValue("Comfy.Locale");
  return WORDS[String(locale ?? "en").slice(0, 2)] ?? WORDS.en;
}

function element(tag, style, parent) {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  parent?.append(made);
  return made;
}

function button(label, parent, press) {
  const made = element("button", { flex: "1", cursor: "pointer" }, parent);
  made.textContent = label;
  made.addEventListener("click", async () => {
    made.disabled = true; // until the run has answered
    const heard = await press().catch(() => null);
    if (!heard?.ok) made.disabled = false;
  });
  return made;
}

function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

function drawLosses(canvas, losses, share) {
  const [width, height] = [(canvas.width = canvas.clientWidth || 240), (canvas.height = 80)];
  const logs = losses.map((loss) => Math.log(Math.max(loss, 1e-12)));
  const low = Math.min(...logs);
  const span = Math.max(...logs) - low || 1;
  const pen = canvas.getContext("2d");
  pen.strokeStyle = "cornflowerblue";
  pen.lineWidth = 2;
  pen.beginPath();
  logs.forEach((log, i) => {
    const x = (share * width * i) / Math.max(logs.length - 1, 1);
    pen.lineTo(x, height - 4 - ((log - low) / span) * (height - 8));
  });
  pen.stroke();
}

function makePanel() {
  const say = words();
  const column = { flexDirection: "column", gap: "4px" };
  const root = element("div", {}); // as high as the node lets it be
  root.className = "lcm-suite-panel";
  const content = element("div", { display: "flex", font: "12px sans-serif", ...column }, root);
  const line = element("div", {}, content);
  line.textContent = say.idle;
  const shown = element("div", { display: "none", ...column }, content);
  const canvas = element("canvas", { width: "100%", height: "80px", background: "#1118" }, shown);
  const pair = element("div", { position: "relative", width: "128px", height: "128px", alignSelf: "center" }, shown);
  const place = { position: "absolute", inset: "0", width: "100%", height: "100%", imageRendering: "pixelated" };
  const before = element("img", place, pair);
  const after = element("img", place, pair);
  const slider = element("input", { width: "128px", alignSelf: "center" }, shown);
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  const divide = () => (after.style.clipPath = `inset(0 0 0 ${slider.value}%)`); // left of it: before
  slider.addEventListener("input", divide);
  divide();
  const row = element("div", { display: "flex", gap: "4px" }, shown);
  const ask = (what) => api.fetchApi(`/lcm_suite/${what}`, { method: "POST" });
  const stop = button(say.stop, row, () => ask("stop")); // this run, where an interrupt would end whatever runs by then
  const save = button(say.save, row, () => ask("save"));
  let last = { saved: null, running: false };
  const show = (told) => {
    shown.style.display = "flex";
    const [loss] = told.losses.slice(-1);
    const left = told.running && told.seconds_left !== null ? `, ${clock(told.seconds_left)} ${say.left}` : "";
    const kept = told.saved === null ? "" : `, ${say.saved} ${told.saved}`;
    line.textContent = `${say.step} ${told.step} ${say.of} ${told.steps}${left}, loss ${loss?.toPrecision(3) ?? ""}${kept}`;
    if (told.losses.length) drawLosses(canvas, told.losses, told.step / told.steps);
    if (told.before) before.src = told.before;
    if (told.after) after.src = told.after;
    if (last.saved !== told.saved || !told.running) save.disabled = stop.disabled = false;
    last = told;
    row.style.display = told.running ? "flex" : "none";
  };
  const catchUp = (told) => {
    if (told?.running || last.running) show(told ?? { ...last, running: false }); // the server has begun anew
  };
  return { root, content, show, catchUp };
}

function addPanel(node) {
  const panel = makePanel();
  let height = 20;
  const widget = node.addDOMWidget("panel", "lcm_suite_panel", panel.root, {
    serialize: false, // nothing of it belongs into the graph
    getMinHeight: () => height,
  });
  widget.serialize = false;
  node.lcmSuitePanel = panel;
  new ResizeObserver(() => {
    if (panel.content.offsetHeight <= height) return; // 0 while the node is out of sight
    height = panel.content.offsetHeight;
    const [width, least] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least)]);
    app.graph.setDirtyCanvas(true, true);
  }).observe(panel.content);
}

// Every panel with its node's name, which inside of a subgraph follows that of the subgraph: "3:5".
function panelsOf(graph, within = "") {
  return graph._nodes.flatMap((node) => [
    ...(node.lcmSuitePanel ? [[`${within}${node.id}`, node.lcmSuitePanel]] : []),
    ...(node.subgraph ? panelsOf(node.subgraph, `${within}${node.id}:`) : []),
  ]);
}

let events = 0;

// What a page that is loaded, shown, or connected again has missed of a run.
async function catchUp() {
  const before = events;
  const answer = await api.fetchApi("/lcm_suite/shown").catch(() => null);
  if (!answer?.ok) return;
  const told = new Map((await answer.json()).map((each) => [each.node, each]));
  if (events !== before) return catchUp(); // the answer may be older than what has come meanwhile
  for (const [name, panel] of panelsOf(app.graph)) panel.catchUp(told.get(name));
}

app.registerExtension({
  name: "lcm_suite.distiller",
  nodeCreated(node) {
    if (node.comfyClass !== "LCMDistiller") return;
    addPanel(node);
  },
  afterConfigureGraph() {
    catchUp(); // which the graph need not wait for
  },
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      events += 1;
      for (const [name, panel] of panelsOf(app.graph)) if (name === detail.node) panel.show(detail);
    });
    api.addEventListener("reconnected", catchUp);
  },
});
