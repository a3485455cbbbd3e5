// The panel of LCM Distiller: loss curve, the same picture before and after, time left, stop and save.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "lcm_suite.distiller";
const WORDS = {
  en: { step: "step", of: "of", left: "left", stop: "Stop and keep", save: "Save now", saved: "saved", idle: "Run to see it learn" },
  ko: { step: "스텝", of: "/", left: "남음", stop: "중단하고 보관", save: "지금 저장", saved: "저장됨", idle: "실행하면 학습이 보입니다" },
  ja: { step: "ステップ", of: "/", left: "残り", stop: "中断して保持", save: "今すぐ保存", saved: "保存済み", idle: "実行すると学習の様子が見えます" },
  zh: { step: "步", of: "/", left: "剩余", stop: "停止并保留", save: "立即保存", saved: "已保存", idle: "运行后可看到学习过程" },
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
  made.addEventListener("click", press);
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
  const root = element("div", { display: "flex", flexDirection: "column", gap: "4px", font: "12px sans-serif" });
  root.className = "lcm-suite-panel";
  const line = element("div", {}, root);
  line.textContent = say.idle;
  const running = element("div", { display: "none", flexDirection: "column", gap: "4px" }, root);
  const canvas = element("canvas", { width: "100%", height: "80px", background: "#1118" }, running);
  const pair = element("div", { position: "relative", width: "128px", height: "128px", alignSelf: "center" }, running);
  const place = { position: "absolute", inset: "0", width: "100%", height: "100%", imageRendering: "pixelated" };
  const before = element("img", place, pair);
  const after = element("img", place, pair);
  const slider = element("input", { width: "128px", alignSelf: "center" }, running);
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  const divide = () => (after.style.clipPath = `inset(0 0 0 ${slider.value}%)`); // left of it: before
  slider.addEventListener("input", divide);
  divide();
  const row = element("div", { display: "flex", gap: "4px" }, running);
  button(say.stop, row, () => api.interrupt());
  button(say.save, row, async () => {
    const answer = await api.fetchApi("/lcm_suite/save", { method: "POST" });
    if (answer.ok) line.textContent += `, ${say.saved}`;
  });
  const show = (told) => {
    running.style.display = "flex";
    const [loss] = told.losses.slice(-1);
    const left = told.seconds_left === null ? "" : `, ${clock(told.seconds_left)} ${say.left}`;
    line.textContent = `${say.step} ${told.step} ${say.of} ${told.steps}${left}, loss ${loss?.toPrecision(3) ?? ""}`;
    if (told.losses.length) drawLosses(canvas, told.losses, told.step / told.steps);
    if (told.before) before.src = told.before;
    if (told.after) after.src = told.after;
    row.style.display = told.step < told.steps ? "flex" : "none";
  };
  return { root, show };
}

app.registerExtension({
  name: "lcm_suite.distiller",
  nodeCreated(node) {
    if (node.comfyClass !== "LCMDistiller") return;
    const panel = makePanel();
    const widget = node.addDOMWidget("panel", "lcm_suite_panel", panel.root, {
      serialize: false, // nothing of it belongs into the graph
      getMinHeight: () => 20,
      getHeight: () => 270,
    });
    widget.serialize = false;
    node.lcmSuiteShow = panel.show;
  },
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      const node = app.graph.getNodeById(detail.node) ?? app.graph.getNodeById(Number(detail.node));
      node?.lcmSuiteShow?.(detail);
    });
  },
});
