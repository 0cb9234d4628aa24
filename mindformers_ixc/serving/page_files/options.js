/* How answers are made: a form of numbers and the instruction, kept in the browser. What is empty is not sent. */
const OPTIONS = {
  temperature: { least: 0, most: 2, step: 0.1, usual: "0" },
  top_p: { least: 0, most: 1, step: 0.05, usual: "1" },
  max_tokens: { least: 1, most: 1024, whole: true, limit: "max_new_tokens", usual: "" },
  num_beams: { least: 1, most: 8, whole: true, limit: "max_beams", usual: "1" },
  repetition_penalty: { least: 0.01, most: 10, step: 0.005, usual: "1" },
  seed: { least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, usual: "" },
  hd_num: { least: 1, most: 256, whole: true, usual: "" },
};
let given = readGiven();

function readGiven() {
  try {
    const found = JSON.parse(kept("options") || "{}");
    return found && typeof found === "object" ? found : {};
  } catch { return {}; }
}

/* the value of a number's text; null for one that is none or out of bounds, undefined for nothing */
function numberOf(name, text) {
  const rule = OPTIONS[name];
  if (text === undefined || text.trim() === "") return undefined;
  const value = Number(text), isOne = rule.whole ? Number.isInteger(value) : Number.isFinite(value);
  return isOne && value >= rule.least && value <= rule.most ? value : null;
}

const wrong = (name) => t(OPTIONS[name].whole ? "error_whole" : "error_number",
  { name: t("option_" + name), min: OPTIONS[name].least, max: OPTIONS[name].most });

/* what a request says of it; what is wrong is left out */
function optionValues() {
  const found = {};
  for (const name of Object.keys(OPTIONS)) {
    const value = numberOf(name, given[name]);
    if (value !== undefined && value !== null) found[name] = value;
  }
  if ((given.meta_instruction || "").trim()) found.meta_instruction = given.meta_instruction;
  return found;
}

/* the first sentence about an option that is wrong, or "" */
function wrongOption() {
  const name = Object.keys(OPTIONS).find((one) => numberOf(one, given[one]) === null);
  return name ? wrong(name) : "";
}

/* the limits of the server, and what the model takes by itself */
function limitOptions(model) {
  if (model.images && model.images.hd_num) OPTIONS.hd_num.usual = String(model.images.hd_num);
  for (const rule of Object.values(OPTIONS)) if (rule.limit && model[rule.limit]) rule.most = model[rule.limit];
}

function drawOptions() {
  const form = byId("options");
  form.replaceChildren(...Object.keys(OPTIONS).map(numberField), instructionField(),
    make("button", { type: "button", class: "plain", click: reset }, t("reset")));
}

function reset() {
  given = {};
  keep("options", null);
  drawOptions();
}

function changed(name, value) {
  if (value.trim()) given[name] = value;
  else delete given[name];
  keep("options", JSON.stringify(given));
  byId("open-settings").classList.toggle("set", Object.keys(given).length > 0);
}

function numberField(name) {
  const rule = OPTIONS[name], id = "option-" + name, about = t("about_" + name, { max: rule.most });
  const note = make("small", { id: id + "-about" }, about);
  const field = make("input", { type: "number", id: id, min: rule.least, max: rule.most, step: rule.step || 1,
    inputmode: rule.whole ? "numeric" : "decimal",
    placeholder: rule.usual || (rule.limit ? String(rule.most) : ""), "aria-describedby": id + "-about",
    input: check });
  field.value = given[name] || "";
  check();
  function check() {
    const text = field.validity.badInput ? "?" : field.value, bad = numberOf(name, text) === null;
    changed(name, text);
    field.setAttribute("aria-invalid", String(bad));
    note.textContent = bad ? wrong(name) : about;
  }
  return make("div", { class: "option" }, make("label", { for: id }, t("option_" + name)), field, note);
}

function instructionField() {
  const field = make("textarea", { id: "option-meta_instruction", rows: "4", maxlength: "65536",
    "aria-describedby": "option-meta_instruction-about", input: () => changed("meta_instruction", field.value) });
  field.value = given.meta_instruction || "";
  return make("div", { class: "option long" }, make("label", { for: field.id }, t("option_meta_instruction")), field,
    make("small", { id: field.id + "-about" }, t("about_meta_instruction")));
}
