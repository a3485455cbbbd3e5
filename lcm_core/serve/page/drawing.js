// The canvas: strokes by pointer, touch and keys, pictures that are laid on it, and undo.

const $ = (id) => document.getElementById(id);
const SIDE = 512; // pixels of the canvas
const MOST_UNDONE = 20;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export const canvas = $("canvas");
export const tool = { erasing: false, pressed: false };
const pen = canvas.getContext("2d", { willReadFrequently: true });
const small = document.createElement("canvas"); // what is sent: the model needs no more pixels than its own
let drawn = false;
let last = null; // the stroke's last point
let undo = [];
let changed; // told of every change
let say; // shows a line to the user

export function start(onChange, onMessage) {
  changed = onChange;
  say = onMessage;
  wipe();
}

// The drawing at `side` pixels as a PNG's address; null of an empty canvas: the picture then comes from the prompt alone.
export function shrunk(side) {
  if (!drawn) return null;
  small.width = small.height = side;
  const brush = small.getContext("2d");
  brush.imageSmoothingQuality = "high";
  brush.drawImage(canvas, 0, 0, side, side);
  return small.toDataURL("image/png");
}

export function choose(name) {
  tool.erasing = name === "eraser";
  for (const each of ["brush", "eraser"]) $(each).setAttribute("aria-pressed", String(each === name));
}

export function resize(factor) {
  $("size").value = Number($("size").value) * factor;
}

export function clear() {
  remember();
  wipe();
  changed();
}

function wipe() {
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, SIDE, SIDE);
  drawn = false;
}

function remember() {
  undo.push({ pixels: pen.getImageData(0, 0, SIDE, SIDE), drawn });
  if (undo.length > MOST_UNDONE) undo.shift();
}

export function takeBack() {
  const before = undo.pop();
  if (!before) return;
  pen.putImageData(before.pixels, 0, 0);
  drawn = before.drawn;
  changed();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * SIDE) / box.width, ((event.clientY - box.top) * SIDE) / box.height];
}

function strokeTo(point) {
  const [x, y] = point;
  pen.strokeStyle = pen.fillStyle = tool.erasing ? "#ffffff" : $("colour").value;
  pen.lineWidth = Number($("size").value);
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  if (last && (last[0] !== x || last[1] !== y)) {
    pen.moveTo(...last);
    pen.lineTo(x, y);
    pen.stroke();
  } else { // a line of no length has no caps: HTML's "trace a path", which newer browsers keep to
    pen.arc(x, y, pen.lineWidth / 2, 0, 2 * Math.PI);
    pen.fill();
  }
  last = point;
  drawn = true;
  changed();
}

export async function lay(file) {
  const picture = await createImageBitmap(file).catch(() => null);
  if (!picture) { say("that file is no picture; choose a PNG, JPEG or WebP", true); return; }
  remember();
  wipe();
  const scale = Math.max(SIDE / picture.width, SIDE / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  pen.drawImage(picture, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
  drawn = true;
  changed();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = null;
  tool.pressed = true;
  strokeTo(place(event));
});
canvas.addEventListener("pointermove", (event) => {
  if (!event.isPrimary || !canvas.hasPointerCapture(event.pointerId)) return;
  const points = event.getCoalescedEvents?.() ?? [];
  for (const step of points.length ? points : [event]) strokeTo(place(step));
});

canvas.addEventListener("lostpointercapture", () => { tool.pressed = false; changed(); });

canvas.addEventListener("keydown", (event) => {
  const way = ARROWS[event.key];
  if (!way && event.key !== " ") return;
  event.preventDefault();
  const [x, y] = last ?? [SIDE / 2, SIDE / 2];
  const step = Number($("size").value) / 2;
  const clamp = (value) => Math.min(Math.max(value, 0), SIDE);
  const point = way ? [clamp(x + way[0] * step), clamp(y + way[1] * step)] : [x, y];
  if (event.shiftKey || !way) { remember(); strokeTo(point); }
  last = point;
});

canvas.addEventListener("dragover", (event) => { event.preventDefault(); canvas.classList.add("over"); });
canvas.addEventListener("dragleave", () => canvas.classList.remove("over"));
canvas.addEventListener("drop", (event) => {
  event.preventDefault();
  canvas.classList.remove("over");
  if (event.dataTransfer.files[0]) lay(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) lay(file);
});
